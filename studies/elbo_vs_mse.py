"""What does the KL term cost in reconstruction, and what does it buy?

The same network with the ELBO at the blog's and at a calibrated weight, with the squared error
alone (a stochastic latent without KL, and a plain autoencoder), and the blog's own recipe.
"""

from functools import partial

from analysis import plots
from harness.config import RunConfig
from studies import conditions
from studies.runner import answers
from studies.runner.cli import main
from studies.runner.study import Axis, Study

STUDY = Study(
    name="elbo_vs_mse",
    question=__doc__,
    base=RunConfig(),
    axis=Axis("condition", tuple(conditions.CONDITIONS), conditions.set_condition),
    figures={
        "conditions": (
            plots.conditions,
            "Test metrics of each condition: mean, 95 % interval and single seeds. A plain "
            "autoencoder has no rate and no neg_elbo.",
        ),
        "class_errors": (
            partial(plots.class_errors, key="condition"),
            "Test mse of the images of each class, mean over seeds.",
        ),
        "kl_per_latent": (
            partial(plots.kl_per_latent, axis="condition"),
            plots.KL_CAPTION,
        ),
    },
    answer=answers.cost_and_gain,
    seeds=5,
    objective="val/mse",
    reference=conditions.CALIBRATED_ELBO,
    table=(
        *("neg_elbo", "mse", "rate", "active_units", "probe_accuracy", "frechet"),
        *("val/mse", "best/val/mse", "best/epoch"),
    ),
)

if __name__ == "__main__":
    main(STUDY)
