"""Tidy data frames of runs; means, intervals and paired differences computed from them.

A frame of runs has one row per configuration and seed; its columns are the settings, the derived
`beta` and `decoder_variance`, and the last value of every metric.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lazy_loader
import numpy as np

from analysis import comparisons
from harness.config import UserError, checked_name
from harness.errors import reading
from harness.tracking.addresses import without_secrets

if TYPE_CHECKING:
    import pandas as pd

    from harness.tracking.runs import Run
    from harness.training.engine import RunResult

    Frame = pd.DataFrame
else:
    pd = lazy_loader.load("pandas")  # which --help does not wait for
    Frame = Any  # for annotations of modules that do not import pandas

NUMBERS = ("seed", "beta", "decoder_variance")  # parameters
compared = comparisons.compared
SEARCHED = [
    *("val/neg_elbo", "val/mse", "val/rate", "val/distortion"),
    *("val/active_units", "val/calibration_ratio"),
]


def load_study(
    name: str, dataset: str = "", tracking_uri: str | None = None, *, pruned: bool = False
) -> pd.DataFrame:
    """Load the finished runs of a study, one row each, from a store of MLflow.

    The name is "STUDY-DATASET", or "STUDY" beside a dataset, or the one given with `--study-name`.
    With `pruned` the pruned runs of a search are loaded too, and there is a column `pruned`.
    Columns are run_id, name, every parameter and every metric, those of the test split under their
    plain names.
    """
    from harness.tracking import connect  # MLflow

    name = checked_name(f"{name}-{dataset}" if dataset else name)
    store = connect(tracking_uri, write=False)
    every = [found.name for found in store.call(store.client.search_experiments)]
    runs = [run for each in every for run in store.runs(each, study=name, role="run")]
    frame = tidy_search(runs) if pruned else tidy([r for r in runs if r.status == "FINISHED"])
    if not frame.empty:
        return frame
    tags = [run.tags for each in every for run in store.runs(each, role="run")]
    others = sorted({found["study"] for found in tags if "study" in found} - {name})
    raise UserError(
        f"no finished runs of study {name!r} in {without_secrets(store.uri)}, which has "
        f"{', '.join(others) or 'no other study'}; make them with: "
        f"python -m studies.{name.partition('-')[0]}"
    )


def tidy(runs: Sequence[Run]) -> pd.DataFrame:
    """Return runs of MLflow as a frame, with parameters cast from text."""
    return _frame([{"run_id": r.run_id, "name": r.name, **r.params, **r.metrics} for r in runs])


def tidy_search(runs: Sequence[Run]) -> pd.DataFrame:
    """Return the finished and the pruned ones of some runs, with a column `pruned`."""
    done = [run for run in runs if run.status == "FINISHED" or run.tags.get("pruned") == "true"]
    return tidy(done).assign(pruned=[run.status != "FINISHED" for run in done])


def to_frame(results: Sequence[RunResult]) -> pd.DataFrame:
    """Return results of `train_and_evaluate` as a frame of runs; diverged ones are left out.

    The columns are those of `load_study` but run_id, name, `beta` and the dataset's.
    """
    rows = []
    for result in results:
        if not result.metrics:
            continue
        settings = {name: _plain(value) for name, value in result.config.named().items()}
        best = result.history[result.best_epoch - 1].get("val/neg_elbo")
        at_best = {"best/epoch": float(result.best_epoch)}
        at_best |= {} if best is None else {"best/val/neg_elbo": best}
        final = {k: v for k, v in result.metrics.items() if not k.startswith("test/")}
        rows.append(settings | result.history[-1] | final | at_best)
    return _frame(rows)


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return value if isinstance(value, int | float) else str(value)


def _frame(rows: list[dict[str, object]]) -> pd.DataFrame:
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows).rename(columns=lambda c: c.removeprefix("test/")).apply(_numbers)
    nothing = pd.Series(np.nan, frame.index)
    ratio = frame.get("calibration_ratio", nothing)
    # The variance of runs whose KL weight does not set it. Only a Gaussian decoder has one.
    fitted = frame.get("val/calibration_ratio", nothing) * frame.get("val/mse", nothing)
    if "likelihood" in frame:
        fitted = fitted.where(frame["likelihood"] == "gaussian")
    variance = frame.get("decoder_variance", nothing).fillna(fitted)
    return frame.assign(decoder_variance=variance, calibration_ratio=ratio)


def _numbers(column: pd.Series) -> pd.Series:
    may_be_text = suppress(ValueError, TypeError)
    with reading(f"parameter {column.name}") if column.name in NUMBERS else may_be_text:
        return pd.to_numeric(column)
    return column


def is_numeric(values: pd.Series) -> bool:
    """Return whether a column holds numbers; the values of other axes are categories."""
    return values.dtype.kind in "iuf"


def half_width(values: pd.Series | np.ndarray) -> float:
    """Return the half width of the 95 % t interval of a mean: t_{n-1} s / sqrt(n); NaN for n = 1.

    Examples:
        >>> round(half_width(np.array([1.0, 2.0, 3.0])), 3)
        2.484
    """
    from scipy import special

    n = len(values)
    if n < 2:
        return np.nan
    return float(special.stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(n))


def along_axis(frame: pd.DataFrame, keys: str | list[str], metrics: list[str]) -> pd.DataFrame:
    """Average metrics over seeds at each value of an axis, or of an axis within groups.

    One row per point, numbers in order and names as they come; for each metric its mean under its
    name and the half width of its interval under "NAME±"; `seeds` counts the runs.
    """
    keys = [keys] if isinstance(keys, str) else keys
    named = [key for key in keys if not is_numeric(frame[key])]
    ordered = {key: pd.Categorical(frame[key], frame[key].dropna().unique()) for key in named}
    grouped = frame.assign(**ordered).groupby(keys, observed=True)
    columns = {"seeds": grouped.size()}
    for metric in metrics:
        columns[metric] = grouped[metric].mean()
        columns[f"{metric}±"] = grouped[metric].apply(half_width)
    means = pd.DataFrame(columns).reset_index().astype({key: frame[key].dtype for key in named})
    if "latent_size" in frame:
        means.attrs["latent_size"] = float(frame["latent_size"].max())  # limit of active units
    return means


def interval(means: pd.DataFrame, metric: str) -> tuple[pd.Series, pd.Series]:
    """Return the ends of the intervals of `along_axis`, cut off at the metric's range.

    The mean lies in the range, so that an interval that is cut off covers it as often as before.
    Ends are NaN for one seed.
    """
    low, high = comparisons.limits(metric)
    if metric.rpartition("/")[2] == "active_units":
        high = means.get("latent_size", means.attrs.get("latent_size", high))
    half = means[f"{metric}±"]
    return (means[metric] - half).clip(lower=low), (means[metric] + half).clip(upper=high)


def bars(means: pd.DataFrame, metric: str) -> np.ndarray:
    """Return the lengths of error bars of the intervals, downwards and upwards, 0 for one seed."""
    low, high = interval(means, metric)
    lengths = np.nan_to_num(np.stack([means[metric] - low, high - means[metric]]))
    return np.maximum(lengths, 0)  # a mean can be below 0 by rounding


@dataclass(frozen=True)
class Difference:
    """A paired difference of means with its interval; `half_width` is NaN for a single seed.

    The interval is that of one planned comparison. Where the data chose one of the two, for example
    as the best value, `comparisons.rank` decides.
    """

    mean: float
    half_width: float
    seeds: int

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes 0; False for one seed, which has none."""
        return abs(self.mean) > self.half_width

    def __str__(self) -> str:
        return self.marked(distinguishable=self.distinguishable)

    def marked(self, *, distinguishable: bool) -> str:
        """Return the difference and its interval, marked by a verdict, which one seed lacks."""
        if self.seeds < 2:
            return f"{self.mean:.3g} (one seed)"
        text = f"{self.mean:.3g} ± {self.half_width:.3g}"
        marks = [("2 seeds only", self.seeds == 2), ("not distinguishable", not distinguishable)]
        behind = ", ".join(mark for mark, holds in marks if holds)
        return f"{text} ({behind})" if behind else text


def paired_difference(first: pd.DataFrame, second: pd.DataFrame, metric: str) -> Difference:
    """Compare two sets of runs seed by seed: the metric of the first minus that of the second.

    Equal seeds have equal batches and noise, whose effect the pairing removes.
    """
    gap = (first.set_index("seed")[metric] - second.set_index("seed")[metric]).dropna()
    return Difference(float(gap.mean()), half_width(gap), len(gap))


def compare(frame: pd.DataFrame, axis: str, first: Any, second: Any, metric: str) -> Difference:  # noqa: ANN401
    """Return the paired difference of a metric between two values of an axis."""
    return paired_difference(frame[frame[axis] == first], frame[frame[axis] == second], metric)


def differences(
    frame: pd.DataFrame, keys: list[str], reference: pd.DataFrame, metrics: list[str]
) -> pd.DataFrame:
    """Compare every point with the reference's runs, paired by seed: text, or "-" without pairs.

    The intervals are of single differences; those that `comparisons` does not distinguish, over all
    pairs of points for each metric, are marked.
    """
    one = tuple(reference.iloc[0][keys])
    differs = {m: comparisons.distinguished(frame, keys, one, m) for m in metrics}
    rows = []
    for point, part in frame.groupby(keys, sort=False):
        texts = dict.fromkeys(metrics, "reference")
        for m in metrics if not set(part.index) <= set(reference.index) else ():
            gap = paired_difference(part, reference, m)
            texts[m] = gap.marked(distinguishable=point in differs[m]) if gap.seeds else "-"
        rows.append(dict(zip(keys, point, strict=True)) | texts)
    return pd.DataFrame(rows)


def complete(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return the runs of the points that have as many seeds as most points, or more."""
    seeds = frame.groupby(keys)["seed"].transform("size")
    return frame[seeds >= frame.groupby(keys).size().mode().max()]


def having(frame: pd.DataFrame, *metrics: str) -> pd.DataFrame:
    """Return the runs that have some metrics; deterministic latents have no rate, for example."""
    return frame.dropna(subset=[*metrics]) if {*metrics} <= {*frame} else frame[:0]


def best_value(frame: pd.DataFrame, axis: str | list[str]) -> Any:  # noqa: ANN401 - of any kind
    """Return the axis value with the lowest mean of `val/neg_elbo`, or else of `val/loss`."""
    return frame.groupby(axis)[f"val/{compared(frame)}"].mean().idxmin()


def collapse_value(frame: pd.DataFrame, axis: str) -> float | None:
    """Return the value of a weight axis at and above which the exact linear model has collapsed.

    There the decoder variance is the data's largest eigenvalue. None if the axis is no weight, the
    weight sets no variance, or the frame has no eigenvalue.
    """
    if "sigma" in frame and (frame["sigma"] != "fixed").any():
        return None
    if axis not in ("kl_weight", "decoder_variance") or "linear/collapse_variance" not in frame:
        return None
    known = frame[frame["decoder_variance"] > 0].dropna(subset=["linear/collapse_variance"])
    units = known[axis] / known["decoder_variance"]
    return float((units * known["linear/collapse_variance"]).mean()) if len(known) else None


def ordered_kl(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the test KL of each run's latents, largest first, in columns 1, 2, ... L."""
    columns = [c for c in frame.columns if c.startswith("kl/")]
    falling = -np.sort(-frame[columns].to_numpy(float), axis=1)  # NaN stays last
    ranked = pd.DataFrame(falling, frame.index, range(1, len(columns) + 1))
    return ranked.dropna(axis=1, how="all")


def class_names(frame: pd.DataFrame) -> dict[int, str]:
    """Return the names of the classes, number -> name; {} where classes are numbers."""
    if "class_names" not in frame or not isinstance(frame["class_names"].iloc[0], str):
        return {}
    with reading("parameter class_names"):
        text = re.sub(r"(?<!\\)\\\$", "$", frame["class_names"].iloc[0])  # of `plain_text`
        return {n: str(name) for n, name in enumerate(json.loads(text))}


def class_errors(frame: pd.DataFrame) -> pd.Series:
    """Return the mean test `mse` of each class, worst class first; empty without labels."""
    columns = [c for c in frame.columns if c.startswith("mse_class/")]
    means = frame[columns].mean().rename(lambda c: int(c.removeprefix("mse_class/")))
    return means.sort_values(ascending=False)


def frontier(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that no other beats in both test rate and distortion, by rising rate.

    Examples:
        >>> runs = pd.DataFrame({"rate": [1.0, 2.0, 3.0], "distortion": [9.0, 9.5, 4.0]})
        >>> frontier(runs)["rate"].tolist()
        [1.0, 3.0]
    """
    ordered = frame.dropna(subset=["rate"]).sort_values(["rate", "distortion"])
    best_before = ordered["distortion"].cummin().shift(fill_value=np.inf)
    return ordered[ordered["distortion"] < best_before]


def by_trial(runs: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """Average the runs of each trial of a search over its seeds, one row per trial in order.

    Columns are trial, the searched settings, decoder_variance, pruned and the metrics of SEARCHED;
    those of a pruned trial are of its last epoch.
    """
    trials = runs.groupby("trial")
    fixed = trials[[*dict.fromkeys([*settings, "decoder_variance", "pruned"])]].first()
    return fixed.join(trials[SEARCHED].mean()).reset_index()
