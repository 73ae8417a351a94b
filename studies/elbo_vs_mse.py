"""What does the KL term cost in reconstruction, and what does it buy?

The same network with the ELBO at the blog's and at a calibrated weight, with the squared error
alone (a stochastic latent without KL, and a plain autoencoder), and the blog's own recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from analysis import frames, plots
from harness.config import RunConfig, UserError
from studies.runner.answers import compare, judged
from studies.runner.cli import main
from studies.runner.study import BLOG_WEIGHT, Axis, Source, Study, with_variance

if TYPE_CHECKING:
    import pandas as pd

AXIS = "condition"

CALIBRATED_ELBO, BLOG_ELBO = "ELBO, calibrated", "ELBO, weight 1"
MSE_STOCHASTIC, AUTOENCODER = "MSE only, stochastic", "MSE only, autoencoder"
BLOG, BLOG_WITHOUT_KL = "blog's recipe", "blog's recipe, no KL"

CONDITIONS: Mapping[str, Mapping[str, Any]] = {
    CALIBRATED_ELBO: {},
    BLOG_ELBO: {"kl_weight": BLOG_WEIGHT},
    MSE_STOCHASTIC: {"kl_weight": 0.0},
    AUTOENCODER: {"kl_weight": 0.0, "latent": "deterministic"},
    BLOG: {"head": "relu", "kl_weight": BLOG_WEIGHT},
    BLOG_WITHOUT_KL: {"head": "relu", "kl_weight": 0.0},
}
"""Name -> changes to the calibrated ELBO; weights are those of mode "pixels"."""


def set_condition(config: RunConfig, name: str, data: Source) -> RunConfig:
    """Set a named condition."""
    if name not in CONDITIONS:
        raise UserError(f"condition={name!r}: choose among {', '.join(CONDITIONS)}")
    changes = {"kl_weight": data.calibrated, **CONDITIONS[name]}
    weight = with_variance(config, changes["kl_weight"] / 2, data).kl_weight
    return config.replace(**{**changes, "kl_weight": weight})


def cost_and_gain(frame: pd.DataFrame) -> str:
    """Return what the KL term costs in reconstruction and buys elsewhere, paired by seed."""
    present = set(frame[AXIS])
    difference = partial(compare, frame, AXIS)
    sentences = []
    for other in (MSE_STOCHASTIC, AUTOENCODER):
        if {CALIBRATED_ELBO, other} <= present:
            changed = f"test mse by {difference(CALIBRATED_ELBO, other, 'mse')} pixel²"
            if "probe_accuracy" in frame:
                accuracy = difference(CALIBRATED_ELBO, other, "probe_accuracy")
                changed += f" and linear-probe accuracy by {accuracy}"
            sentences.append(f"Against {other!r} the calibrated KL term changes {changed}.")
    if {CALIBRATED_ELBO, MSE_STOCHASTIC} <= present:
        gap = difference(MSE_STOCHASTIC, CALIBRATED_ELBO, "neg_elbo")
        sentences.append(f"It buys {gap} nats / image of neg_elbo over the error alone.")
    if {CALIBRATED_ELBO, BLOG_ELBO} <= present:
        mse, gap = (difference(BLOG_ELBO, CALIBRATED_ELBO, m) for m in ("mse", "neg_elbo"))
        sentences.append(
            f"At weight 1 the KL term costs {mse} pixel² of mse and {gap} nats / image of neg_elbo "
            "against the calibrated weight."
        )
    if {BLOG, BLOG_WITHOUT_KL} <= present:
        gap, blog = difference(BLOG, BLOG_WITHOUT_KL, "mse"), frame[frame[AXIS] == BLOG]
        sentences.append(
            f"In the blog's own recipe the KL term costs {gap} pixel² of mse and leaves "
            f"{blog['active_units'].mean():.1f} of {frame['latent_size'].max()} latents active"
            f"{against_linear(blog)}."
        )
    seeds = frame["seed"].nunique()
    return " ".join([*sentences, f"(Paired differences, 95 % intervals over {seeds} seeds.)"])


def against_linear(runs: pd.DataFrame) -> str:
    """Return how the loss of runs compares with the exact linear model's; "" without one."""
    if "gap_to_linear" not in runs or runs["gap_to_linear"].isna().any():
        return ""
    gap, half = runs["gap_to_linear"].mean(), frames.half_width(runs["gap_to_linear"])
    return (
        f"; its loss is {judged(gap, half)} than that of a linear model at the same weight "
        f"(gap_to_linear {gap:.1f} ± {half:.1f} %)"
    )


STUDY = Study(
    name="elbo_vs_mse",
    question=__doc__,
    base=RunConfig(),
    axis=Axis(AXIS, tuple(CONDITIONS), set_condition),
    figures={
        "conditions": (
            plots.conditions,
            "Test metrics of each condition: mean, 95 % interval and single seeds. A plain "
            "autoencoder has no rate and no neg_elbo.",
        ),
        "class_errors": (
            partial(plots.class_errors, key=AXIS),
            "Test mse of the images of each class, mean over seeds.",
        ),
        "kl_per_latent": (partial(plots.kl_per_latent, axis=AXIS), plots.KL_CAPTION),
    },
    answer=cost_and_gain,
    seeds=5,
    objective="val/mse",
    table=(
        *("neg_elbo", "mse", "rate", "active_units", "probe_accuracy", "frechet"),
        *("val/mse", "best/val/mse", "best/epoch"),
    ),
)

if __name__ == "__main__":
    main(STUDY)
