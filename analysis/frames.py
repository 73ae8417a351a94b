"""From MLflow to tidy data frames, and from frames to means, intervals and paired differences.

A frame of runs has one row per configuration and seed; its columns are the settings, the derived
`beta` and `decoder_variance`, and the last value of every metric. Seeds are the repetitions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lazy_loader
import numpy as np

from harness.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from harness.tracking.runs import Run
else:
    pd = lazy_loader.load("pandas")  # which --help does not wait for


def load_runs(experiment: str, study: str, tracking_uri: str | None = None) -> pd.DataFrame:
    """Load the finished runs of a study, one row each, numbers as numbers.

    Args:
        experiment: MLflow experiment, "STUDY-DATASET".
        study: name of the study, as tagged.
        tracking_uri: MLflow tracking URI; None means the default store.

    Returns:
        Columns run_id, name, every parameter and every metric, those of the test split under
        their plain names; empty if nothing has finished.
    """
    from harness.tracking import connect  # loads MLflow

    runs = connect(tracking_uri).runs(experiment, study=study, role="run")
    return tidy([run for run in runs if run.status == "FINISHED"])


def load_study(
    study: str, dataset: str = "digits", tracking_uri: str | None = None
) -> pd.DataFrame:
    """Load the finished runs of a study under its own name, as `load_runs` does.

    Raises:
        UserError: there are none; the message says which command makes them.
    """
    name = f"{study}-{dataset}"
    return some(load_runs(name, name, tracking_uri), study, dataset)


def some(frame: pd.DataFrame, study: str, dataset: str) -> pd.DataFrame:
    """Return the frame unless it is empty."""
    if frame.empty:
        raise UserError(
            f"no finished runs of {study}-{dataset} here; make them with: "
            f"python -m studies.{study} --dataset {dataset}"
        )
    return frame


def tidy(runs: Sequence[Run]) -> pd.DataFrame:
    """Return runs as a frame, with parameters cast from text."""
    rows = [{"run_id": run.run_id, "name": run.name, **run.params, **run.metrics} for run in runs]
    frame = pd.DataFrame(rows).rename(columns=lambda c: c.removeprefix("test/"))
    return _with_own_variances(frame.apply(_numbers)) if rows else frame


def _with_own_variances(frame: pd.DataFrame) -> pd.DataFrame:
    """Fill in the decoder variance of runs whose KL weight does not set it: ratio * mse.

    A Bernoulli decoder has neither variance nor ratio: NaN, in columns that are always there.
    """
    nothing = pd.Series(np.nan, frame.index)
    own = frame.get("val/calibration_ratio", nothing) * frame.get("val/mse", nothing)
    return frame.assign(
        decoder_variance=frame.get("decoder_variance", nothing).fillna(own),
        calibration_ratio=frame.get("calibration_ratio", nothing),
    )


def _numbers(column: pd.Series) -> pd.Series:
    try:
        return pd.to_numeric(column)
    except (ValueError, TypeError):
        return column


def half_width(values: pd.Series | np.ndarray) -> float:
    """Half width of the 95 % Student t interval of a mean: t_{n-1} s / sqrt(n); NaN for n = 1.

    Examples:
        >>> round(half_width(np.array([1.0, 2.0, 3.0])), 3)
        2.484
    """
    from scipy import stats  # takes a second to load

    n = len(values)
    if n < 2:
        return float("nan")
    quantile = stats.t.ppf(0.975, n - 1)
    return float(quantile * np.std(values, ddof=1) / np.sqrt(n))


def along_axis(frame: pd.DataFrame, keys: str | list[str], metrics: list[str]) -> pd.DataFrame:
    """Average over seeds at each value of an axis, or of an axis within groups.

    Returns:
        One row per point, numbers in order and names as they come; for each metric its mean under
        its own name and the half width of its interval under "NAME±"; `seeds` counts the runs.
    """
    keys = [keys] if isinstance(keys, str) else keys
    numeric = [key for key in keys if pd.api.types.is_numeric_dtype(frame[key])]
    ordered = frame.sort_values(numeric, kind="stable") if numeric else frame
    for key in reversed([key for key in keys if key not in numeric]):
        rank = {name: i for i, name in enumerate(frame[key].unique())}
        ordered = ordered.sort_values(key, key=lambda c, r=rank: c.map(r), kind="stable")
    grouped = ordered.groupby(keys, sort=False)
    columns = {"seeds": grouped.size()}
    for metric in metrics:
        columns[metric] = grouped[metric].mean()
        columns[f"{metric}±"] = grouped[metric].apply(half_width)
    return pd.DataFrame(columns).reset_index()


@dataclass(frozen=True)
class Difference:
    """A paired difference of means with its interval; `half_width` NaN with a single seed."""

    mean: float
    half_width: float
    seeds: int

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.half_width

    def __str__(self) -> str:
        half = "" if np.isnan(self.half_width) else f" ± {self.half_width:.3g}"
        verdict = "" if self.distinguishable else " (not distinguishable)"
        return f"{self.mean:.3g}{half}{verdict}"


def paired_difference(first: pd.DataFrame, second: pd.DataFrame, metric: str) -> Difference:
    """Compare two sets of runs seed by seed: the metric of the first minus that of the second.

    The streams give equal seeds equal batches and noise, which the pairing takes out.

    Examples:
        >>> first = pd.DataFrame({"seed": [0, 1, 2], "neg_elbo": [10.0, 20.0, 30.0]})
        >>> second = pd.DataFrame({"seed": [0, 1, 2], "neg_elbo": [8.9, 19.0, 29.1]})
        >>> print(paired_difference(first, second, "neg_elbo"))
        1 ± 0.248
    """
    gap = (first.set_index("seed")[metric] - second.set_index("seed")[metric]).dropna()
    return Difference(float(gap.mean()), half_width(gap), len(gap))


def differences(
    frame: pd.DataFrame, keys: list[str], reference: pd.DataFrame, metrics: list[str]
) -> pd.DataFrame:
    """Compare every point with reference runs, paired by seed, in words.

    Returns:
        One row per point, in the frame's order; columns keys and metrics, cells "difference ± half
        width", with "(not distinguishable)" where the interval holds 0, "-" without a value.
    """
    rows = []
    for point, part in frame.groupby(keys, sort=False):
        gaps = {m: paired_difference(part, reference, m) for m in metrics}
        said = {m: str(gap) if gap.seeds else "-" for m, gap in gaps.items()}
        if set(part.index) <= set(reference.index):
            said = dict.fromkeys(metrics, "reference")
        rows.append(dict(zip(keys, point, strict=True)) | said)
    return pd.DataFrame(rows)


def best_value(frame: pd.DataFrame, axis: str, metric: str = "val/neg_elbo") -> object:
    """Return the axis value with the lowest mean of a metric; chosen on validation data."""
    return frame.groupby(axis)[metric].mean().idxmin()


def collapse_value(frame: pd.DataFrame, axis: str) -> float | None:
    """Return the value of a weight axis from which on the exact linear model has collapsed.

    There the decoder variance, proportional to the weight, is the data's largest eigenvalue.

    Returns:
        None for another axis than a weight's, for weights that set no decoder variance, and for
        stores that lack the eigenvalue.
    """
    if "sigma" in frame and (frame["sigma"] != "fixed").any():
        return None
    if axis not in ("kl_weight", "decoder_variance") or "linear/collapse_variance" not in frame:
        return None
    known = frame[frame["decoder_variance"] > 0].dropna(subset=["linear/collapse_variance"])
    units = known[axis] / known["decoder_variance"]
    return float((units * known["linear/collapse_variance"]).mean()) if len(known) else None


def ordered_kl(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the test KL of each run's latents, largest first.

    Returns:
        One row per run, columns 1, 2, ... L with L the largest latent size of the frame; NaN where
        a run has no such latent.
    """
    columns = [c for c in frame.columns if c.startswith("kl/")]
    falling = -np.sort(-frame[columns].to_numpy(float), axis=1)  # NaN stays last
    ranked = pd.DataFrame(falling, frame.index, range(1, len(columns) + 1))
    return ranked.dropna(axis=1, how="all")


def class_names(frame: pd.DataFrame) -> dict[int, str]:
    """Return the names of the classes, number -> name; {} where classes are numbers."""
    if "class_names" not in frame or not isinstance(frame["class_names"].iloc[0], str):
        return {}
    return dict(enumerate(json.loads(frame["class_names"].iloc[0])))


def class_errors(frame: pd.DataFrame) -> pd.Series:
    """Return the mean test `mse` of each class over the frame's runs, worst class first.

    Empty for images without labels.
    """
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
