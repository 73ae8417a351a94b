"""Do KL normalisations disagree about the best weight, or only about its name?

The same decoder variance is reached by another weight in each mode. The modes are swept over the
same decoder variances, so that each has its own logarithmic grid of weights.
"""

from analysis import plots
from harness.config import RunConfig
from studies import conditions
from studies.runner import answers
from studies.runner.cli import main
from studies.runner.study import TABLE, Axis, Study

VARIANCES = tuple(5.0 * 10 ** (i / 2 - 4) for i in range(9))
"""Decoder variances, two a decade, from 0.0005 to 5: from unbounded rate to total collapse."""

MODES = ("pixels", "batch", "latent", "sum")

STUDY = Study(
    name="kl_normalization",
    question=__doc__,
    base=RunConfig(),
    axis=Axis("decoder_variance", VARIANCES, conditions.set_decoder_variance),
    group="kl_normalization",
    groups=lambda base, data: {mode: {"kl_normalization": mode} for mode in MODES},
    figures={
        "one_curve": (
            plots.one_curve,
            "Left, the metrics against the weight that the user sets: four curves. Right, the same "
            "runs against the decoder variance that the weight means: one curve; dashed, the exact "
            "linear model.",
        ),
    },
    answer=answers.one_curve,
    table=("kl_weight", *TABLE),
)

if __name__ == "__main__":
    main(STUDY)
