"""Answers in words, from a frame of runs: what was found, with its uncertainty."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from analysis.frames import Difference

BLOG_WEIGHT = 1.0
"""The KL weight of the blog post that the project grew from."""


def best_weight(frame: pd.DataFrame, axis: str) -> str:
    """Say which weight is best on validation data, and compare it with the blog's weight."""
    from analysis import frames

    best = frames.best_value(frame, axis)
    means = frames.along_axis(frame, axis, [*REPORTED, "val/neg_elbo"]).set_index(axis)
    row = means.loc[best]
    size = frame["latent_size"].max()
    sentences = [
        f"{axis} = {best:.3g} has the lowest validation neg_elbo of {len(means)} values: "
        f"{plus_minus(row, 'val/neg_elbo')} nats / image "
        f"(test {plus_minus(row, 'neg_elbo')}; mean and 95 % interval over "
        f"{row['seeds']:.0f} seeds).",
        f"Its decoder variance is {row['decoder_variance']:.3g} pixel², its calibration ratio "
        f"{row['calibration_ratio']:.2f}, and {row['active_units']:.1f} of {size} latents are "
        "active.",
        _rivals(frame, axis, best, list(means.index)),
    ]
    if BLOG_WEIGHT in means.index and best != BLOG_WEIGHT:
        blog = means.loc[BLOG_WEIGHT]
        gap = frames.paired_difference(frame, axis, BLOG_WEIGHT, best, "neg_elbo")
        sentences.append(
            f"The blog's weight 1 costs {_difference(gap)} nats / image of test neg_elbo against "
            f"it, at mse {blog['mse']:.4f} against {row['mse']:.4f}, with "
            f"{blog['active_units']:.1f} of {size} latents active."
        )
    sentences.append(worst_class(frame[frame[axis] == best]))
    return " ".join(sentences)


REPORTED = [
    "neg_elbo",
    "mse",
    "rate",
    "decoder_variance",
    "calibration_ratio",
    "active_units",
]
"""Metrics that tables and sentences report."""


def worst_class(frame: pd.DataFrame, suspect: int = 8) -> str:
    """Say which class reconstructs worst, and where the blog's suspect, digit 8, stands."""
    from analysis import frames

    errors = frames.class_errors(frame)
    worst = errors.index[0]
    if worst == suspect:
        return f"Class {suspect} reconstructs worst (mse {errors[worst]:.4f}), as the blog says."
    place = list(errors.index).index(suspect) + 1
    return (
        f"Class {worst} reconstructs worst (mse {errors[worst]:.4f}), not the blog's {suspect}, "
        f"which is number {place} of {len(errors)} (mse {errors[suspect]:.4f})."
    )


def plus_minus(row: pd.Series, metric: str, digits: int = 2) -> str:
    """Write a mean with its half width, or alone where there is none."""
    half = row[f"{metric}±"]
    mean = f"{row[metric]:.{digits}f}"
    return mean if half != half else f"{mean} ± {half:.{digits}f}"


def _rivals(frame: pd.DataFrame, axis: str, best: object, values: list) -> str:
    """Name the values whose paired validation difference from the best has 0 in its interval."""
    from analysis import frames

    others = [v for v in values if v != best]
    gaps = {v: frames.paired_difference(frame, axis, v, best, "val/neg_elbo") for v in others}
    equal = [f"{v:.3g}" for v, gap in gaps.items() if not gap.distinguishable]
    if not equal:
        return "Every other value is distinguishably worse on validation data."
    return f"Not distinguishable from it on validation data: {', '.join(equal)}."


def _difference(gap: Difference) -> str:
    half = "" if gap.half_width != gap.half_width else f" ± {gap.half_width:.2f}"
    verdict = "" if gap.distinguishable else " (not distinguishable)"
    return f"{gap.mean:.2f}{half}{verdict}"
