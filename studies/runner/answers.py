"""Sentences that the answers of several studies share, from a frame of runs.

Differences are paired by seed; one smaller than its interval is called not distinguishable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis import frames, tables

if TYPE_CHECKING:
    import pandas as pd

    from analysis.frames import Difference


def compare(frame: pd.DataFrame, axis: str, first: Any, second: Any, metric: str) -> Difference:  # noqa: ANN401
    """Return the paired difference of a metric between two values of an axis."""
    return frames.paired_difference(
        frame[frame[axis] == first], frame[frame[axis] == second], metric
    )


def is_worse(frame: pd.DataFrame, axis: str, value: object, best: object) -> bool:
    """Return whether a value's validation neg_elbo is distinguishable from that of the best."""
    return value != best and compare(frame, axis, value, best, "val/neg_elbo").distinguishable


def plus_minus(row: pd.Series, metric: str) -> str:
    """Write a mean with its half width, or alone where there is none."""
    return tables.pair(row[metric], row[f"{metric}±"], 2)


def calibration(row: pd.Series) -> str:
    """Return the beginning of a sentence with the decoder variance, if the decoder has one."""
    if row["calibration_ratio"] != row["calibration_ratio"]:
        return "At it "
    return (
        f"Its decoder variance is {row['decoder_variance']:.3g} pixel², its calibration ratio "
        f"{row['calibration_ratio']:.2f}, and "
    )


def judged(gap: float, half_width: float) -> str:
    """Return how a mean gap_to_linear compares with 0: "better", "no better" or "worse"."""
    if gap + half_width < 0:
        return "worse"
    return "better" if gap - half_width > 0 else "no better"


def worst_class(frame: pd.DataFrame) -> str:
    """Return which class reconstructs worst; "" for images without labels, or of one class."""
    errors, names = frames.class_errors(frame), frames.class_names(frame)
    if len(errors) < 2:
        return ""
    worst = errors.index[0]
    return f"Class {names.get(worst, worst)} reconstructs worst (mse {errors[worst]:.4f})."
