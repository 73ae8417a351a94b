"""Do two trainings of one run agree? Every logged value against the value computed now."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness.records import Logged

TOLERANCE = 0.1
"""Difference allowed on another kind of device, as a share of the metric's scale.

Other devices round otherwise, and training amplifies it, until two trainings of one seed differ
nearly as two seeds do. In float64 instead of float32 on the same CPU, metrics moved by up to 0.023
of their scale in 50 epochs of digits, frechet by 0.058 and active_units by 2; in 3 epochs of MNIST
by 0.026 (LOG).
"""

EARLY_STEPS, EARLY_TOLERANCE = 100, 1e-4
"""Steps before rounding is amplified, and what is allowed of metrics in nats and pixel² until then:
0.0000002 was seen after 120 steps, 0.0002 after 200. This is where another training is found out.
"""

UNITS = {
    "nats": (
        *("neg_elbo", "distortion", "rate", "kl", "aggregate_gap"),
        *("neg_log_likelihood", "neg_log_likelihood_se"),
        *("mutual_information", "mutual_information_lower"),
    ),
    "pixel²": ("loss", "mse", "mse_class"),
    "frechet": ("frechet", "frechet_reconstructions", "frechet_floor"),
    "%": ("gap_to_linear",),
    "count": ("active_units",),
}
"""Metrics that share a scale: neg_elbo is a difference of nats, and may itself be near 0."""

LEAST = {"%": 100.0, "count": 2 / TOLERANCE, "epoch": math.inf}
"""Smallest scale of a unit: a percentage is a share of the whole, a count may differ by 2, and the
best of epochs that are nearly as good may be any of them."""

Rule = Callable[[str, int], float]
"""(unit, epoch) -> difference allowed, as a share of the unit's scale."""


def exact(unit: str, epoch: int) -> float:
    """Allow nothing: the rule on the same kind of device."""
    return 0.0


def rounding(steps: int) -> Rule:
    """Return the rule on another kind of device.

    Args:
        steps: of an epoch.
    """

    def rule(unit: str, epoch: int) -> float:
        early = epoch * steps <= EARLY_STEPS and unit in ("nats", "pixel²")
        return EARLY_TOLERANCE if early else TOLERANCE

    return rule


class Gap(NamedTuple):
    """A logged value, the value now, their difference and what is allowed as shares of a scale."""

    logged: Logged
    now: float
    share: float
    allowed: float

    @property
    def order(self) -> tuple[float, float]:
        """How bad it is: against what is allowed, then in itself."""
        return (self.share / self.allowed if self.allowed else self.share), self.share


@dataclass(frozen=True)
class Agreement:
    """How a training agrees with its record.

    Attributes:
        gaps: one per logged value.
        missing: metrics that are logged but were not computed now, or not at the same epochs.
        new: metrics that were computed now but are not logged.
    """

    gaps: Sequence[Gap]
    missing: tuple[str, ...]
    new: tuple[str, ...]

    @property
    def equal(self) -> int:
        """Number of values that are equal to the last bit."""
        return sum(gap.share == 0 for gap in self.gaps)

    @property
    def worst(self) -> Gap:
        """The worst gap, the first of several."""
        return max(self.gaps, key=lambda gap: gap.order)

    @property
    def reproduces(self) -> bool:
        """Whether every logged value was computed again and differs by no more than allowed."""
        return not self.missing and all(gap.share <= gap.allowed for gap in self.gaps)

    def parts(self) -> dict[str, Agreement]:
        """Split by the first part of the metrics' names: train, val, test, ..."""
        parts: dict[str, list[Gap]] = {}
        for gap in self.gaps:
            parts.setdefault(gap.logged.metric.partition("/")[0], []).append(gap)
        return {name: Agreement(gaps, (), ()) for name, gaps in parts.items()}


def compare(
    logged: Sequence[Logged],
    now: Mapping[tuple[str, int], float],
    rule: Rule = exact,
    leave_out: Sequence[str] = (),
) -> Agreement:
    """Compare all logged values with those of another training.

    Args:
        logged: the record.
        now: (metric, epoch) -> value.
        rule: what is allowed.
        leave_out: metrics that are not compared.
    """
    logged = [value for value in logged if value.metric not in leave_out]
    scales = _scales(logged)
    gaps, missing = [], set()
    for value in logged:
        unit, there = _unit(value.metric), now.get((value.metric, value.step))
        if there is None:
            missing.add(value.metric)
        else:
            share = _share(value.value, there, scales[unit])
            gaps.append(Gap(value, there, share, rule(unit, value.step)))
    new = {metric for metric, _ in now} - {value.metric for value in logged} - set(leave_out)
    return Agreement(gaps, tuple(sorted(missing)), tuple(sorted(new)))


def _share(logged: float, now: float, scale: float) -> float:
    """Return the difference as a share of a scale; 0 means equal to the last bit (0 is -0)."""
    if logged == now or (math.isnan(logged) and math.isnan(now)):
        return 0.0
    share = abs(now - logged) / scale if scale else math.inf
    return math.inf if math.isnan(share) else max(share, math.ulp(0.0))


def _scales(logged: Sequence[Logged]) -> dict[str, float]:
    """Return the largest magnitude of each unit, over its metrics and all epochs."""
    scales: dict[str, float] = {}
    for value in logged:
        unit = _unit(value.metric)
        scales[unit] = max(scales.get(unit, LEAST.get(unit, 0.0)), abs(value.value))
    return scales


def _unit(metric: str) -> str:
    """Return a metric's unit, of one that is not in the table its own name without prefix."""
    plain = re.sub(r"^((best|train|val|test|linear)/)+", "", metric)
    name = re.sub(r"/k?\d+$", "", plain)
    return next((unit for unit, names in UNITS.items() if name in names), name)


def verdict(found: Agreement) -> str:
    """Say in a sentence whether a run reproduces, and where it does not."""
    values, different = len(found.gaps), len(found.gaps) - found.equal
    if found.reproduces and not different:
        metrics = len({gap.logged.metric for gap in found.gaps})
        return f"Reproduced: all {values:,} values of {metrics} metrics are equal to the last bit."
    said = []
    if different:
        (metric, epoch, then), now, share, allowed = found.worst
        where = f"{metric} in epoch {epoch}: {then!r} logged, {now!r} now"
        said.append(f"{different:,} of {values:,} values differ, worst {where}")
        if allowed:
            limit = f"{percent(allowed)} is allowed on another device"
            said.append(f"that is {percent(share)} of its scale, where {limit}")
    if found.missing:
        said.append(f"logged but not computed now: {', '.join(found.missing)}")
    return f"{'Reproduced' if found.reproduces else 'Not reproduced'}: {'; '.join(said)}."


def percent(share: float) -> str:
    """Write a share."""
    return f"{100 * share:.2g} %"
