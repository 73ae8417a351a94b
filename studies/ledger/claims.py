"""Claims as data: a number that a source states, its measurement, and the values that pass."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from harness.config import RunConfig

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"


@dataclass(frozen=True)
class Runs:
    """Runs that a claim is measured on: one configuration, several seeds.

    The label identifies their trials: other settings need another. With `gpu` only the full form on
    a GPU trains them, since a CPU would take a day.
    """

    label: str
    config: RunConfig
    seeds: int
    gpu: bool = False


Obtained = float | tuple[float, float]
"""A value, or a range where the reference is a single draw from one."""


@dataclass(frozen=True)
class Claim:
    """A number that a source states, and the obtained values that agree with it.

    Attributes:
        reference: the number, or words, as the source prints it.
        within: a tolerance either way; limits, which may be infinite; or None where the number is
            one draw, which the obtained range should hold.
        reason: why this tolerance.
        measure: (`Evidence`, *the runs of `needs`) -> the obtained value.
        needs: runs that it is obtained from; none for linear algebra.
        digits: decimals of the obtained value; None for one more than the reference has.
    """

    name: str
    source: str
    reference: str
    within: float | tuple[float, float] | None
    reason: str
    measure: Callable[..., Obtained] = field(repr=False)
    needs: tuple[Runs, ...] = ()
    digits: int | None = None

    @property
    def tolerance(self) -> str:
        """The values that pass, in words."""
        if self.within is None:
            return "inside the range"
        if isinstance(self.within, tuple):
            low, high = self.within
            return f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
        return f"± {self.within:.2g}"

    def verdict(self, obtained: Obtained) -> str:
        """Judge a number, which passes within the limits, or a range, if it overlaps them."""
        if isinstance(self.within, tuple):
            least, most = self.within
        else:
            value, half = float(self.reference), self.within or 0.0
            least, most = value - half, value + half
        low, high = obtained if isinstance(obtained, tuple) else (obtained, obtained)
        return PASS if low <= most and high >= least else FAIL

    def write(self, obtained: Obtained) -> str:
        """Format an obtained value."""
        digits = decimals(self.reference) + 1 if self.digits is None else self.digits
        parts = obtained if isinstance(obtained, tuple) else (obtained,)
        return " to ".join(f"{part:.{digits}f}" for part in parts)


Ledger = Mapping[str, Sequence[Claim]]
"""Heading -> claims."""


def decimals(number: str) -> int:
    """Count the printed decimals of a number."""
    return len(number.partition(".")[2])


def required(ledger: Ledger, *, gpu: bool = True) -> list[Runs]:
    """Return the runs that a ledger's claims need, each once, in the order of the claims."""
    every = (runs for claims in ledger.values() for claim in claims for runs in claim.needs)
    return [runs for runs in dict.fromkeys(every) if gpu or not runs.gpu]
