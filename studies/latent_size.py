"""How many latents does a VAE use, and what do more of them buy?

At the optimum a latent that costs more nats than it saves in distortion collapses onto the prior,
and more latents change nothing. Whether training gets there, and at which size, is measured here.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from analysis import frames, plots
from analysis.comparisons import rank
from harness.config import RunConfig, UserError
from studies.runner.cli import main
from studies.runner.study import (
    BLOG_WEIGHT,
    TABLE,
    Axis,
    Source,
    Study,
    calibrated,
    sets_variance,
    with_variance,
)

AXIS = "latent_size"


def weights(base: RunConfig, data: Source) -> Mapping[str, Mapping[str, Any]]:
    """Return as groups a weight of variance 0.5 and a calibrated one, or the exact ELBO's alone.

    The former is the blog's weight, and is named so on data like the blog's.
    """
    if base.kl_normalization == "latent":
        raise UserError(
            "kl_normalization='latent' divides by the number of latents, so that one weight means "
            "another decoder variance at each; choose among pixels, batch, sum"
        )
    weight = calibrated(base, data).kl_weight
    if not sets_variance(base):
        return {"exact ELBO's weight": {"kl_weight": weight}}
    blog = with_variance(base, BLOG_WEIGHT / 2, data).kl_weight
    name = "blog's weight" if data.name in ("digits", "mnist") else f"weight {blog:.3g}"
    return {name: {"kl_weight": blog}, "calibrated weight": {"kl_weight": weight}}


def useful_latents(frame: frames.Frame) -> str:
    """Return, for each weight, the number of latents from which on more of them change nothing."""
    sentences = []
    for name, part in frame.groupby("weight", sort=False):
        ranking, largest = rank(part, AXIS), part[AXIS].max()
        active = part.loc[part[AXIS] == largest, "active_units"].mean()
        sentence = f"With the {name} ({part['kl_weight'].iloc[0]:.3g}) {active:.1f} of {largest} "
        sentence += "latents are active"
        if ranking.values > 1:
            sentence += f"; validation neg_elbo is lowest at {ranking.best}"
        if ranking.values > 1 < ranking.seeds:
            enough = min([ranking.best, *ranking.not_distinguishable])
            sentence += f", and the smallest size not distinguishable from that is {enough}"
        sentences.append(f"{sentence}.")
    return "\n\n".join(sentences)


STUDY = Study(
    name="latent_size",
    question=__doc__,
    base=RunConfig(),
    axis=Axis(AXIS, (1, 2, 4, 8, 10, 16, 32, 64)),
    group="weight",
    groups=weights,
    figures={
        **plots.usual(AXIS, "", "weight"),
        "metrics_along_axis": (
            partial(plots.metrics_along_latent_size, group="weight"),
            "Test metrics against the number of latents; dashed, the exact linear model at the "
            "same weight; dotted, the mse of as many principal components.",
        ),
        "kl_per_latent": (
            partial(plots.kl_per_latent, axis=AXIS, group="weight"),
            plots.KL_CAPTION,
        ),
    },
    answer=useful_latents,
    table=("kl_weight", *TABLE, "pca_floor"),
)

if __name__ == "__main__":
    main(STUDY)
