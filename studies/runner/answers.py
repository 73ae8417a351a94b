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
    return tables.pair(row[metric], row[f"{metric}±"], tables.decimals(metric))


def over(seeds: float) -> str:
    """Return what stands behind "±"."""
    return "one seed" if seeds == 1 else f"95 % intervals over {seeds:.0f} seeds"


def worst_class(frame: pd.DataFrame) -> str:
    """Return which class reconstructs worst; "" for images without labels, or of one class."""
    errors, names = frames.class_errors(frame), frames.class_names(frame)
    if len(errors) < 2:
        return ""
    worst = errors.index[0]
    return f"Class {names.get(worst, worst)} reconstructs worst (mse {errors[worst]:.4f})."
