"""A ledger as data: what somebody claims, how it is measured here, and what counts as the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from studies.evidence import Evidence
    from studies.runs import Runs

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"


class Spread(NamedTuple):
    """A range that was obtained, where the reference is a single draw from one."""

    low: float
    high: float


Measure = Callable[["Evidence"], float | Spread]
"""Reads what a claim is about off finished runs, or off the data alone."""


@dataclass(frozen=True)
class Claim:
    """A number that somebody states, and when the one obtained here counts as the same.

    Attributes:
        name: what is claimed, in plain words.
        source: who states it.
        reference: the number as it is printed there.
        low: least value that passes.
        high: largest value that passes.
        tolerance: those two in words.
        reason: why this tolerance.
        digits: decimals of what was obtained.
        measure: how it is obtained.
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

    def verdict(self, obtained: float | Spread) -> str:
        """Judge: a number passes from `low` to `high`, a spread if it reaches into that range."""
        low, high = obtained if isinstance(obtained, Spread) else (obtained, obtained)
        return PASS if low <= self.high and high >= self.low else FAIL

    def write(self, obtained: float | Spread) -> str:
        """Write what was obtained."""
        parts = obtained if isinstance(obtained, Spread) else (obtained,)
        return " to ".join(f"{part:.{self.digits}f}" for part in parts)


Ledger = Mapping[str, Sequence[Claim]]
"""Heading -> claims."""


def printed(name: str, source: str, reference: str, measure: Measure) -> Claim:
    """Claim a number to the last digit that is printed, as linear algebra should give it."""
    digits = decimals(reference)
    half = 0.5 * 10**-digits
    reason = "half a unit of the last printed digit: no chance is involved"
    return about(name, source, reference, half, reason, measure)


def about(
    name: str,
    source: str,
    reference: str,
    tolerance: float,
    reason: str,
    measure: Measure,
    needs: tuple[Runs, ...] = (),
) -> Claim:
    """Claim a number up to a tolerance either way."""
    value, digits = float(reference), decimals(reference)
    low, high = value - tolerance, value + tolerance
    words = f"± {tolerance:.2g}"
    return Claim(name, source, reference, low, high, words, reason, digits + 1, measure, needs)


def between(
    name: str,
    source: str,
    reference: str,
    limits: tuple[float, float],
    reason: str,
    measure: Measure,
    needs: tuple[Runs, ...] = (),
    digits: int = 1,
) -> Claim:
    """Claim that a number lies within limits, which may be infinite; the reference is words."""
    low, high = limits
    words = f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
    return Claim(name, source, reference, low, high, words, reason, digits, measure, needs)


def inside(
    name: str,
    source: str,
    reference: str,
    reason: str,
    measure: Measure,
    needs: tuple[Runs, ...] = (),
) -> Claim:
    """Claim that a reference, itself one draw, lies in the spread that is obtained."""
    value = float(reference)
    words, digits = "inside the range", min(decimals(reference), 5)
    return Claim(name, source, reference, value, value, words, reason, digits, measure, needs)


def decimals(number: str) -> int:
    """Count the printed decimals of a number."""
    return len(number.partition(".")[2])


def required(ledger: Ledger) -> list[Runs]:
    """Return all runs that a ledger's claims need, each once, in the order of the claims."""
    every = (runs for claims in ledger.values() for claim in claims for runs in claim.needs)
    return list(dict.fromkeys(every))


def trainable(ledger: Ledger, *, gpu: bool) -> list[Runs]:
    """Return the runs that are trained for a ledger, `gpu` saying whether the large ones are."""
    return [runs for runs in required(ledger) if gpu or not runs.gpu]


@dataclass(frozen=True)
class Row:
    """A judged claim.

    Attributes:
        heading: part of the ledger.
        claim: what was judged.
        obtained: in words; "" if it was not run.
        verdict: "pass", "fail" or "not run".
        note: why it was not run.
    """

    heading: str
    claim: Claim
    obtained: str
    verdict: str
    note: str = ""


def judge(ledger: Ledger, evidence: Evidence) -> list[Row]:
    """Measure and judge every claim whose runs are there."""
    return [
        _judged(heading, claim, evidence, evidence.missing(claim.needs))
        for heading, claims in ledger.items()
        for claim in claims
    ]


def _judged(heading: str, claim: Claim, evidence: Evidence, missing: str) -> Row:
    if missing:
        return Row(heading, claim, "", NOT_RUN, missing)
    obtained = claim.measure(evidence)
    return Row(heading, claim, claim.write(obtained), claim.verdict(obtained))


def count(rows: Iterable[Row], verdict: str) -> int:
    """Count the rows of a verdict."""
    return sum(row.verdict == verdict for row in rows)


@dataclass(frozen=True)
class Reproduction:
    """A ledger, and how it is presented.

    Attributes:
        name: as in `python -m studies.NAME`.
        full: whether it is the full form.
        question: the page's docstring.
        ledger: the claims.
        answer: judged rows in, sentences out.
        figures: file name -> (evidence -> figure, caption, runs that it is drawn from).
        pictured: runs whose reconstructions and samples are shown, if they are there.
    """

    name: str
    full: bool
    question: str
    ledger: Ledger
    answer: Callable[[Sequence[Row], Evidence], str]
    figures: Mapping[str, tuple[Callable[[Evidence], Figure], str, Runs]]
    pictured: Sequence[Runs]

    def trained_on(self, device: str) -> list[Runs]:
        """Return the runs that are trained on a device."""
        return trainable(self.ledger, gpu=self.full and device == "cuda")
