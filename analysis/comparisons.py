"""Which value of a study is best, and which values cannot be distinguished from it.

The data that compare the best with all others have chosen it, so the procedure covers all pairs:
Games and Howell's (1976, 10.3102/10769986001002113), studentised ranges of means with unequal
variances and Welch's degrees of freedom. Measured rates: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.config import UserError

if TYPE_CHECKING:
    import pandas as pd

PROCEDURE = "Games-Howell"

# Nominal level of the procedure. With 3 to 5 seeds it rejects more often than it should: at .05,
# 6.4 % of simulated studies of 14 equal values and 3 seeds call one worse, at .03 at most 4.6 %.
NOMINAL = 0.03

POWER = 0.8  # of `seeds_for`
DRAWS = 150  # of means, and as many that are their mirror images

CAPTION = (
    f"Which differences are distinguishable is decided by the {PROCEDURE} procedure over all pairs "
    "of values, for each metric: at most 5 % of studies of equal values mark one of them. The "
    "intervals are of single differences, paired by seed, and decide nothing."
)
"""Caption of the table of `frames.differences`, behind the name of its reference."""

NOT_NEGATIVE = {
    *("mse", "mse_class", "mae", "rate", "kl", "active_units", "calibration_ratio", "pca_floor"),
    *("frechet", "frechet_reconstructions", "frechet_floor", "aggregate_gap", "mutual_information"),
    *("bits_per_dim", "latent_std", "posterior_sigma", "fitted_scale", "effective_samples"),
    *("learned_variance", "learned_scale", "epoch", "neg_elbo_se", "neg_log_likelihood_se"),
}
SHARES = {"probe_accuracy", "knn_accuracy", "feature_accuracy"}


@dataclass(frozen=True)
class Ranking:
    """The best value of a study, and how the others compare with it.

    Attributes:
        keys: columns of a value; several where the study has groups or two axes.
        metric: validation metric by which values are compared, the lowest mean being best.
        best: the value, a tuple of several keys' values.
        not_distinguishable: values, without the best, whose difference from it could be chance.
        worse: all other values.
        seeds: runs of the best value.
        visible: smallest difference that these seeds would have shown, the median over the values
            that are not worse (over all if there are none); NaN for one seed.
        seeds_for: seeds that would distinguish the best from the next value in 80 % of studies, if
            their means and spreads are those of today; None above 100 and where that is not known.
        more: a larger number of seeds, and the smallest difference that it would show.
        winner: mean of the best value and the limits of its 95 % interval, which reaches further up
            by `selection_bias`; NaN for one seed.
    """

    keys: tuple[str, ...]
    metric: str
    best: Any
    not_distinguishable: list[Any]
    worse: list[Any]
    seeds: int
    visible: float
    seeds_for: int | None
    more: tuple[int, float]
    winner: tuple[float, float, float]

    @property
    def values(self) -> int:
        """Number of values that were compared."""
        return 1 + len(self.not_distinguishable) + len(self.worse)


def rank(frame: pd.DataFrame, keys: str | list[str], metric: str = "") -> Ranking:
    """Compare the best value with all others over all pairs at 5 %; of one seed nothing is worse.

    Runs without the metric are left out, and so are values that have no other runs.

    Args:
        frame: runs, one row each.
        keys: the axis, or several columns.
        metric: lowest is best; by default `val/neg_elbo`, or `val/loss` where runs lack it.

    Raises:
        UserError: if no run has the metric.
    """
    metric = metric or f"val/{compared(frame)}"
    points = _points(frame, keys, metric)
    if points.empty:
        raise UserError(f"no run has a finite {metric!r}, so that nothing can be ranked")
    place = int(points["mean"].argmin())
    best, others = points.iloc[place], points[np.arange(len(points)) != place]
    found, seeds = _against(best, others, len(points)), int(best["seeds"])
    differs = found["gap"] > found["limit"]
    equal, shown = others[~differs], ~differs if not differs.all() else differs
    more = next((n for n in (3, 5, 10, 20) if n > seeds), 2 * seeds)
    then = _against({**best, "seeds": more}, {**others, "seeds": more}, len(points))
    return Ranking(
        (keys,) if isinstance(keys, str) else tuple(keys),
        metric,
        points.index.tolist()[place],
        equal.index.tolist(),
        others.index[differs].tolist(),
        seeds,
        float(found["limit"][shown].median()),
        _seeds_for(best, equal.loc[equal["mean"].idxmin()], len(points)) if len(equal) else seeds,
        (more, float(then["limit"][shown].median())),
        _winner(points, place, metric),
    )


def compared(frame: pd.DataFrame) -> str:
    """Return the metric by which runs are compared: `neg_elbo` if all have it, else `loss`."""
    lacking = "neg_elbo" not in frame or frame["neg_elbo"].isna().any()
    return "loss" if lacking and "loss" in frame else "neg_elbo"


def limits(metric: str) -> tuple[float, float]:
    """Return the least and the largest value that a metric can have, whatever its prefix."""
    names = {*metric.split("/")}
    if "term" in names or not names & (NOT_NEGATIVE | SHARES):
        return -np.inf, np.inf
    return 0.0, 1.0 if names & SHARES else np.inf


def distinguished(
    frame: pd.DataFrame, keys: list[str], one: tuple[Any, ...], metric: str
) -> set[tuple[Any, ...]]:
    """Return the values that differ from one of them in a metric, over all pairs."""
    points = _points(frame, keys, metric)
    values = [value if len(keys) > 1 else (value,) for value in points.index]
    if one not in values:
        return set()
    found = _against(points.iloc[values.index(one)], points, len(points))
    return {v for v, worse in zip(values, found["gap"] > found["limit"], strict=True) if worse}


def selection_bias(means: np.ndarray, errors: np.ndarray) -> float:
    """Estimate by how much the lowest of several means is too low, by a parametric bootstrap.

    Means are drawn anew around those found, with their standard errors: how far is the lowest of
    them below the mean that it was drawn around, on average?
    """
    noise = np.random.default_rng(0).standard_normal((DRAWS, len(means))) * errors
    drawn = means + np.concatenate([noise, -noise])
    return float((means[drawn.argmin(1)] - drawn.min(1)).mean())


def critical(count: int, freedom: np.ndarray, level: float = NOMINAL) -> np.ndarray:
    """Return what a difference must exceed, in standard errors, to be distinguishable.

    It is the quantile of the studentised range of `count` means over sqrt(2): c with P(W > c s) =
    level, where W is the range of normal numbers and freedom s^2 is chi-square. The integral over
    ln s is a sum over equal steps; ln c is found by halving. scipy's takes 0.2 s a value.

    Args:
        count: number of values of the study.
        freedom: degrees of freedom.
        level: probability of exceeding it.
    """
    v = np.minimum(freedom, 1e4)[:, None]
    spread = 7 / np.sqrt(2 * v)
    log_s = np.linspace(-20 / v - spread, spread, 151, axis=1)[..., 0]
    weights = np.exp(v * (log_s - np.exp(2 * log_s) / 2 + 0.5))
    weights /= weights.sum(1, keepdims=True)
    log_c = np.full(len(freedom), 4.5)
    for step in 7.5 / 2.0 ** np.arange(1, 33):
        below = (weights * np.interp(np.exp(log_s + log_c[:, None]), *_range_of(count))).sum(1)
        log_c += np.where(below < 1 - level, step, -step)
    return np.exp(log_c) / np.sqrt(2)


@lru_cache(maxsize=32)
def _range_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return places, and the probability that the range of normal numbers is below each.

    P(w) = k times the integral of phi(z) [Phi(z) - Phi(z - w)]^(k - 1), z being the largest.
    """
    from scipy import special

    places = np.linspace(0, 16, 1601)
    z, step = np.linspace(-8.5, 8.5, 171, retstep=True)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    inside = special.ndtr(z) - special.ndtr(z - places[:, None])
    return places, count * step * (inside ** (count - 1) @ density)


def _points(frame: pd.DataFrame, keys: str | list[str], metric: str) -> pd.DataFrame:
    """Return mean, variance and seeds of each value, in the order of the frame."""
    runs = frame[np.isfinite(frame[metric].to_numpy(float))] if metric in frame else frame[:0]
    names = keys if isinstance(keys, str) or len(keys) > 1 else keys[0]
    if runs.empty:
        return runs
    values = runs.groupby(names, sort=False, observed=True)[metric]
    return values.agg(mean="mean", variance="var", seeds="size")


def _against(one: Mapping[Any, Any], others: Mapping[Any, Any], count: int) -> dict[str, Any]:
    """Compare points with one, or with one each, of numbers or of columns.

    Returns the difference `gap`, its standard `error` and degrees of `freedom`, and the `limit`
    above which it is distinguishable over all pairs of so many points; NaN for one seed.
    """
    gap = np.abs(others["mean"] - one["mean"])
    # Equal values of a metric without noise may differ by rounding.
    least = 1e-24 * (others["mean"] ** 2 + one["mean"] ** 2) + 1e-100
    a, b = (part["variance"] / part["seeds"] + least for part in (one, others))
    freedom = (a + b) ** 2 / (a**2 / (one["seeds"] - 1) + b**2 / (others["seeds"] - 1))
    error = np.sqrt(a + b)
    limit = error * critical(count, np.asarray(freedom))
    return {"gap": gap, "error": error, "freedom": freedom, "limit": limit}


def _seeds_for(best: pd.Series, following: pd.Series, count: int) -> int | None:
    from scipy import special

    seeds = np.arange(2, 101)
    found = _against({**best, "seeds": seeds}, {**following, "seeds": seeds}, count)
    luck = special.stdtrit(found["freedom"], POWER) * found["error"]
    enough = seeds[found["gap"] > found["limit"] + luck]
    return int(enough[0]) if len(enough) else None


def _winner(points: pd.DataFrame, place: int, metric: str) -> tuple[float, float, float]:
    from scipy import special

    means, errors = points["mean"], np.sqrt(points["variance"] / points["seeds"])
    mean, seeds = float(means.iloc[place]), points["seeds"].iloc[place]
    half = special.stdtrit(seeds - 1, 0.975) * errors.iloc[place] if seeds > 1 else np.nan
    bias = selection_bias(means.to_numpy(), errors.fillna(0).to_numpy())
    low, high = limits(metric)
    return mean, float(np.maximum(mean - half, low)), float(np.minimum(mean + bias + half, high))
