"""Claims as data: a number that a source states, its measurement, and the values that pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness.config import RunConfig

if TYPE_CHECKING:
    from studies.ledger.evidence import Evidence

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"


@dataclass(frozen=True)
class Runs:
    """Runs that a claim is measured on: one configuration, several seeds.

    Attributes:
        label: name of the configuration. It identifies its trials: other settings need another.
        gpu: whether only the full form on a GPU trains them, since a CPU would take a day.
    """

    label: str
    config: RunConfig
    seeds: int
    gpu: bool = False


Obtained = float | tuple[float, float]
"""A value, or a range where the reference is a single draw from one."""

Measure = Callable[..., Obtained]
"""(`Evidence`, *the runs that the claim needs) -> the obtained value."""


@dataclass(frozen=True)
class Claim:
    """A number that a source states, and the obtained values that agree with it.

    Attributes:
        reference: the number as the source prints it.
        low, high: least and largest value that passes.
        tolerance: those two in words.
        reason: why this tolerance.
        digits: decimals of the obtained value.
        needs: runs that it is obtained from; none for linear algebra.
    """

    name: str
    source: str
    reference: str
    low: float
    high: float
    tolerance: str
    reason: str
    digits: int
    measure: Measure = field(repr=False)
    needs: tuple[Runs, ...] = ()

    def verdict(self, obtained: Obtained) -> str:
        """Judge a number, which passes from `low` to `high`, or a spread, if it overlaps them."""
        low, high = obtained if isinstance(obtained, tuple) else (obtained, obtained)
        return PASS if low <= self.high and high >= self.low else FAIL

    def write(self, obtained: Obtained) -> str:
        """Format an obtained value."""
        parts = obtained if isinstance(obtained, tuple) else (obtained,)
        return " to ".join(f"{part:.{self.digits}f}" for part in parts)


Ledger = Mapping[str, Sequence[Claim]]
"""Heading -> claims."""


def printed(name: str, source: str, reference: str, measure: Measure) -> Claim:
    """Claim a number to its last printed digit, as linear algebra should give it."""
    half = 0.5 * 10 ** -decimals(reference)
    reason = "half a unit of the last printed digit: no chance is involved"
    return about(name, source, reference, half, reason, measure)


def about(
    name: str, source: str, reference: str, half: float, reason: str, measure: Measure, *needs: Runs
) -> Claim:
    """Claim a number up to a tolerance, `half`, either way."""
    value, digits = float(reference), decimals(reference) + 1
    limits, words = (value - half, value + half), f"± {half:.2g}"
    return Claim(name, source, reference, *limits, words, reason, digits, measure, needs)


def between(
    name: str,
    source: str,
    reference: str,
    limits: tuple[float, float],
    reason: str,
    measure: Measure,
    *needs: Runs,
    digits: int = 1,
) -> Claim:
    """Claim that a number lies within limits, which may be infinite; the reference is words."""
    low, high = limits
    words = f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
    return Claim(name, source, reference, low, high, words, reason, digits, measure, needs)


def inside(
    name: str, source: str, reference: str, reason: str, measure: Measure, *needs: Runs
) -> Claim:
    """Claim that a reference, itself one draw, lies in the obtained spread."""
    value, digits = float(reference), min(decimals(reference), 5)
    words = "inside the range"
    return Claim(name, source, reference, value, value, words, reason, digits, measure, needs)


def decimals(number: str) -> int:
    """Count the printed decimals of a number."""
    return len(number.partition(".")[2])


def required(ledger: Ledger, *, gpu: bool = True) -> list[Runs]:
    """Return the runs that a ledger's claims need, each once, in the order of the claims."""
    every = (runs for claims in ledger.values() for claim in claims for runs in claim.needs)
    return [runs for runs in dict.fromkeys(every) if gpu or not runs.gpu]


@dataclass(frozen=True)
class Row:
    """A judged claim; `obtained` is the formatted value, `note` why it was not run."""

    heading: str
    claim: Claim
    obtained: str
    verdict: str
    note: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """Claim, reference, obtained, tolerance and verdict as text."""
        verdict = f"{self.verdict}: {self.note}" if self.note else self.verdict
        claim = self.claim
        return claim.name, claim.reference, self.obtained, claim.tolerance, verdict


def judge(ledger: Ledger, evidence: Evidence) -> list[Row]:
    """Measure and judge every claim whose runs have finished."""
    rows = []
    for heading, claims in ledger.items():
        for claim in claims:
            obtained, verdict, missing = "", NOT_RUN, evidence.missing(claim.needs)
            if not missing:
                value = claim.measure(evidence, *claim.needs)
                obtained, verdict = claim.write(value), claim.verdict(value)
            rows.append(Row(heading, claim, obtained, verdict, missing))
    return rows


def count(rows: Iterable[Row], verdict: str) -> int:
    """Count the rows of a verdict."""
    return sum(row.verdict == verdict for row in rows)
