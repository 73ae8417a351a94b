"""Which value of a study is best, and which values cannot be distinguished from it.

The data that compare the best with all others have chosen it, so the procedure covers all pairs:
Games and Howell's (1976, 10.3102/10769986001002113), studentised ranges of means with unequal
variances and Welch's degrees of freedom. Measured rates: docs/statistics.md.
"""

from __future__ import annotations

from bisect import bisect_left
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
MOST_SEEDS = 100

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
        winner: mean of the best value and the limits of its 95 % interval, which is wider upwards
            since a minimum was chosen; NaN for one seed.
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
    best = points.index[points["mean"].argmin()]
    seeds = int(points["seeds"].loc[best])
    others = _against(points, best)
    equal, worse = others[~others["differs"]], others[others["differs"]]
    shown = (equal if len(equal) else worse).index
    more = next((n for n in (3, 5, 10, 20) if n > seeds), 2 * seeds)
    then = _against(_at(points, more), best)
    return Ranking(
        (keys,) if isinstance(keys, str) else tuple(keys),
        metric,
        _plain(best),
        [*map(_plain, equal.index)],
        [*map(_plain, worse.index)],
        seeds,
        float(others.loc[shown, "limit"].median()),
        _seeds_for(points, best, equal.index) if len(equal) else seeds,
        (more, float(then.loc[shown, "limit"].median())),
        _winner(points.loc[best], len(points), metric),
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


def power(ranking: Ranking, unit: str = "") -> str:
    """Return sentences on the differences that the seeds of a ranking could show.

    Args:
        ranking: that of `rank`.
        unit: unit of its metric.
    """
    unit, (more, then) = f" {unit}" * bool(unit), ranking.more
    if ranking.values == 1:
        return "There is one value, so nothing was compared."
    if ranking.visible != ranking.visible:  # NaN
        return f"One seed shows no difference, however large; {more} seeds show large ones."
    words = [
        f"With {ranking.seeds} seeds differences below {_brief(ranking.visible)}{unit} could not "
        f"be seen; {more} seeds would show {_brief(then)}."
    ]
    if ranking.not_distinguishable:
        number = ranking.seeds_for
        words.append(
            f"At today's means and spreads the best and the next value need more than {MOST_SEEDS} "
            "seeds to be told apart."
            if number is None
            else f"At today's means and spreads {number} seeds would tell the best from the next "
            f"value in {POWER:.0%} of studies.".replace("%", " %")
        )
    return " ".join(words)


def distinguished(
    frame: pd.DataFrame, keys: str | list[str], reference: object, metric: str
) -> dict[Any, bool]:
    """Return which values differ from one of them over all pairs, for those with the metric."""
    points = _points(frame, keys, metric)
    if reference not in points.index:
        return {}
    return dict(_against(points, reference)["differs"])


def critical(count: int, freedom: np.ndarray, level: float = NOMINAL) -> np.ndarray:
    """Return what a difference must exceed, in standard errors, to be distinguishable.

    It is the quantile of the studentised range of `count` means over sqrt(2).

    Args:
        count: number of values of the study.
        freedom: degrees of freedom.
        level: probability of exceeding it.
    """
    return _quantile(_range_of(count), freedom, level) / np.sqrt(2)


def above_winner(count: int, freedom: np.ndarray, level: float = 0.025) -> np.ndarray:
    """Return how many standard errors a chosen minimum's true mean is above it, at most.

    The minimum chosen among `count` values deviates from its own mean by no more standard errors
    than the lowest of as many normal numbers, whatever the means and spreads, and its standard
    deviation is independent of that: the studentised maximum (Pillai & Ramachandran 1954).
    """
    return _quantile(_maximum_of(count), freedom, level)


def _points(frame: pd.DataFrame, keys: str | list[str], metric: str) -> pd.DataFrame:
    """Return mean, variance and seeds of each value, in the order of the frame."""
    runs = frame[np.isfinite(frame[metric].to_numpy(float))] if metric in frame else frame[:0]
    names = keys if isinstance(keys, str) or len(keys) > 1 else keys[0]
    if runs.empty:
        return runs
    values = runs.groupby(names, sort=False, observed=True)[metric]
    found = values.agg(["mean", "var", "size"])
    return found.set_axis(["mean", "variance", "seeds"], axis=1)


def _at(points: pd.DataFrame, seeds: int) -> pd.DataFrame:
    return points.assign(seeds=seeds)


def _against(points: pd.DataFrame, one: object, among: int = 0) -> pd.DataFrame:
    """Compare all other points with one, over all pairs of them or of a given number of points.

    Columns: the difference `gap`, its standard `error` and degrees of `freedom`, the `limit` above
    which it is distinguishable (NaN for one seed), and whether it `differs`.
    """
    chosen, others = points.loc[one], points[[value != one for value in points.index]]
    gap = (others["mean"] - chosen["mean"]).abs()
    # Equal values of a metric without noise may differ by rounding.
    least = 1e-24 * (others["mean"] ** 2 + chosen["mean"] ** 2) + 1e-100
    a, b = (part["variance"] / part["seeds"] + least for part in (chosen, others))
    freedom = (a + b) ** 2 / (a**2 / (chosen["seeds"] - 1) + b**2 / (others["seeds"] - 1))
    error = np.sqrt(a + b)
    limit = error * critical(among or len(points), freedom.to_numpy())
    differs = gap > limit
    columns = {"gap": gap, "error": error, "freedom": freedom, "limit": limit, "differs": differs}
    return others.assign(**columns)


def _seeds_for(points: pd.DataFrame, best: object, equal: pd.Index) -> int | None:
    """Return the number of seeds that distinguishes the best from the next of equal values."""
    from scipy import special

    following = points.loc[equal, "mean"].idxmin()
    pair = points[[value in (best, following) for value in points.index]]

    def enough(seeds: int) -> bool:
        found = _against(_at(pair, seeds), best, len(points)).iloc[0]
        luck = special.stdtrit(found["freedom"], POWER) * found["error"]
        return bool(found["gap"] > found["limit"] + luck)

    seeds = bisect_left(range(MOST_SEEDS + 1), x=True, lo=2, key=enough)
    return seeds if seeds <= MOST_SEEDS else None


def _winner(best: pd.Series, count: int, metric: str) -> tuple[float, float, float]:
    from scipy import special

    mean, error, freedom = (
        best["mean"],
        np.sqrt(best["variance"] / best["seeds"]),
        best["seeds"] - 1,
    )
    low, high = limits(metric)
    below = special.stdtrit(freedom, 0.975) * error if freedom else np.nan
    (above,) = above_winner(count, np.array([freedom])) * error if freedom else [np.nan]
    return float(mean), float(np.maximum(mean - below, low)), float(np.minimum(mean + above, high))


def _brief(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _plain(value: Any) -> Any:  # noqa: ANN401 - of any kind
    """Return a value of a column as Python's own, which JSON takes."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


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


@lru_cache(maxsize=32)
def _maximum_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return places, and the probability that the largest of normal numbers is below each."""
    from scipy import special

    places = np.linspace(-8, 8, 1601)
    return places, special.ndtr(places) ** count


def _quantile(
    distribution: tuple[np.ndarray, np.ndarray], freedom: np.ndarray, level: float
) -> np.ndarray:
    """Return c with P(X > c s) = level, where X has a distribution and freedom s^2 is chi-square.

    The integral over ln s is a sum over equal steps; ln c is found by halving.
    """
    v = np.minimum(freedom, 1e4)[:, None]
    spread = 7 / np.sqrt(2 * v)
    log_s = np.linspace(-20 / v - spread, spread, 151, axis=1)[..., 0]
    weights = np.exp(v * (log_s - np.exp(2 * log_s) / 2 + 0.5))
    weights /= weights.sum(1, keepdims=True)
    low, high = np.full(len(freedom), -3.0), np.full(len(freedom), 12.0)
    for _ in range(32):
        middle = (low + high) / 2
        below = (weights * np.interp(np.exp(log_s + middle[:, None]), *distribution)).sum(1)
        low, high = (
            np.where(below < 1 - level, middle, low),
            np.where(below < 1 - level, high, middle),
        )
    return np.exp(high)
