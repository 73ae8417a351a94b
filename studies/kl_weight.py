"""Which KL weight is calibrated, and what does each weight cost in reconstruction?"""

from functools import partial

from analysis import plots
from harness.config import RunConfig
from studies.runner import answers
from studies.runner.cli import main
from studies.runner.study import TABLE, Axis, Study

WEIGHTS = (0.0, *(10 ** (i / 3 - 3) for i in range(13)))
"""0 and 13 weights, three a decade, from 0.001 to 10; the blog's weight 1 is among them."""

STUDY = Study(
    name="kl_weight",
    question=__doc__,
    base=RunConfig(),
    axis=Axis("kl_weight", WEIGHTS),
    figures={
        "metrics_along_axis": (
            partial(plots.metrics_along_axis, axis="kl_weight"),
            "Test metrics against the KL weight; dotted, calibration_ratio = 1. Dashed, the exact "
            "linear model; dash-dotted, the weight from which on it has no active latent.",
        ),
        "rate_distortion": (
            partial(plots.rate_distortion, axis="kl_weight"),
            "The rate-distortion plane; along a thin line neg_elbo is constant.",
        ),
        "kl_per_latent": (
            partial(plots.kl_per_latent, axis="kl_weight"),
            plots.KL_CAPTION,
        ),
        "quality_along_axis": (
            partial(plots.quality_along_axis, axis="kl_weight"),
            plots.QUALITY_CAPTION,
        ),
    },
    answer=partial(answers.best_weight, axis="kl_weight"),
    table=("decoder_variance", *TABLE, "neg_log_likelihood", "frechet"),
)

if __name__ == "__main__":
    main(STUDY)
