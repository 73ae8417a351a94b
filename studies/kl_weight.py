"""Which KL weight is calibrated, and what does each weight cost in reconstruction?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from analysis import frames, plots
from harness.config import RunConfig
from studies.runner.answers import calibration, compare, is_worse, plus_minus, worst_class
from studies.runner.cli import main
from studies.runner.study import BLOG_WEIGHT, TABLE, Axis, Study

if TYPE_CHECKING:
    import pandas as pd

AXIS = "kl_weight"

WEIGHTS = (0.0, *(10 ** (i / 3 - 3) for i in range(13)))
"""0 and 13 weights, three a decade, from 0.001 to 10; the blog's weight 1 is among them."""

REPORTED = (
    *("neg_elbo", "val/neg_elbo", "mse"),
    *("decoder_variance", "calibration_ratio", "active_units"),
)


def best_weight(frame: pd.DataFrame) -> str:
    """Return which weight is best on validation data, compared with the blog's weight."""
    best = frames.best_value(frame, AXIS)
    means = frames.along_axis(frame, AXIS, [*REPORTED]).set_index(AXIS)
    row, size = means.loc[best], frame["latent_size"].max()
    seeds = int(row["seeds"])
    of = "one seed" if seeds == 1 else f"mean and 95 % interval over {seeds} seeds"
    equal = [f"{w:.3g}" for w in means.index if w != best and not is_worse(frame, AXIS, w, best)]
    sentences = [
        f"{AXIS} = {best:.3g} has the lowest validation neg_elbo of {len(means)} values: "
        f"{plus_minus(row, 'val/neg_elbo')} nats / image "
        f"(test {plus_minus(row, 'neg_elbo')}; {of}).",
        calibration(row) + f"{row['active_units']:.1f} of {size} latents are active.",
        f"Not distinguishable from it on validation data: {', '.join(equal)}."
        if equal
        else "Every other value is distinguishably worse on validation data.",
        *_linear_prediction(frame, best),
    ]
    if BLOG_WEIGHT in means.index and best != BLOG_WEIGHT:
        blog = means.loc[BLOG_WEIGHT]
        gap = compare(frame, AXIS, BLOG_WEIGHT, best, "neg_elbo")
        sentences.append(
            f"Weight 1 costs {gap} nats / image of test neg_elbo against it, at mse "
            f"{blog['mse']:.4f} against {row['mse']:.4f}, with {blog['active_units']:.1f} of "
            f"{size} latents active."
        )
    return " ".join([*sentences, worst_class(frame[frame[AXIS] == best])]).strip()


def _linear_prediction(frame: pd.DataFrame, best: object) -> list[str]:
    """Return where the exact linear model collapses, and the trained one; [] for old stores."""
    collapse = frames.collapse_value(frame, AXIS)
    if collapse is None:
        return []
    active = frame.groupby(AXIS)["active_units"].mean()
    dead = active.index[active == 0]
    trained = (
        f"none is active from {dead.min():.3g} on" if len(dead) else "every value tried keeps some"
    )
    allowed = frame.loc[frame[AXIS] == best, "linear/active_units"].mean()
    return [
        f"The exact linear model loses its last latent at {AXIS} = {collapse:.3g}, where the "
        f"decoder variance reaches the data's largest eigenvalue; here {trained}. At the best "
        f"value it keeps {allowed:.0f} latents active, the trained model {active[best]:.1f}."
    ]


STUDY = Study(
    name="kl_weight",
    question=__doc__,
    base=RunConfig(),
    axis=Axis(AXIS, WEIGHTS),
    figures={
        "metrics_along_axis": (
            partial(plots.metrics_along_axis, axis=AXIS),
            "Test metrics against the KL weight; dotted, calibration_ratio = 1. Dashed, the exact "
            "linear model; dash-dotted, the weight from which on it has no active latent.",
        ),
        "rate_distortion": (
            partial(plots.rate_distortion, axis=AXIS),
            "The rate-distortion plane; along a thin line neg_elbo is constant.",
        ),
        "kl_per_latent": (partial(plots.kl_per_latent, axis=AXIS), plots.KL_CAPTION),
        "quality_along_axis": (
            partial(plots.quality_along_axis, axis=AXIS),
            plots.QUALITY_CAPTION,
        ),
    },
    answer=best_weight,
    table=("decoder_variance", *TABLE, "neg_log_likelihood", "frechet"),
)

if __name__ == "__main__":
    main(STUDY)
