"""How many latents does a VAE use, and what do more of them buy?

At the optimum a latent that costs more nats than it saves in distortion collapses onto the prior,
and more latents change nothing. Whether training gets there, and at which size, is measured here.
"""

from functools import partial

from analysis import plots
from harness.config import RunConfig
from studies import conditions
from studies.runner import answers
from studies.runner.cli import main
from studies.runner.study import TABLE, Axis, Study

STUDY = Study(
    name="latent_size",
    question=__doc__,
    base=RunConfig(),
    axis=Axis("latent_size", (1, 2, 4, 8, 10, 16, 32, 64)),
    group="weight",
    groups=conditions.weights,
    figures={
        "metrics_along_axis": (
            partial(plots.metrics_along_latent_size, group="weight"),
            "Test metrics against the number of latents; dashed, the exact linear model at the "
            "same weight; dotted, the mse of a principal component projection onto as many "
            "dimensions.",
        ),
        "rate_distortion": (
            partial(plots.rate_distortion, axis="latent_size", group="weight"),
            "The rate-distortion plane; along a thin line neg_elbo is constant.",
        ),
        "kl_per_latent": (
            partial(plots.kl_per_latent, axis="latent_size", group="weight"),
            plots.KL_CAPTION,
        ),
    },
    answer=answers.useful_latents,
    extras=conditions.pca_floor,
    table=("kl_weight", *TABLE, "pca_floor"),
)

if __name__ == "__main__":
    main(STUDY)
