"""What does the KL term cost in reconstruction, and what does it buy?

The same network with the ELBO at weight 1 and at a calibrated weight, with the squared error alone
(a stochastic latent without KL, and a plain autoencoder), and with a head of ReLUs.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from analysis import frames, plots
from analysis.tables import over, plain
from harness.config import RunConfig, UserError
from harness.errors import listed
from studies.runner.cli import main
from studies.runner.study import BLOG_WEIGHT, Axis, Source, Study, with_variance

AXIS = "condition"

CALIBRATED_ELBO, BLOG_ELBO = "ELBO, calibrated", "ELBO, weight 1"
MSE_STOCHASTIC, AUTOENCODER = "MSE only, stochastic", "MSE only, autoencoder"
BLOG, BLOG_WITHOUT_KL = "ReLU head, weight 1", "ReLU head, no KL"  # the blog's recipe

CONDITIONS: Mapping[str, Mapping[str, Any]] = {
    CALIBRATED_ELBO: {},
    BLOG_ELBO: {"kl_weight": BLOG_WEIGHT},
    MSE_STOCHASTIC: {"kl_weight": 0.0},
    AUTOENCODER: {"kl_weight": 0.0, "latent": "deterministic"},
    BLOG: {"head": "relu", "kl_weight": BLOG_WEIGHT},
    BLOG_WITHOUT_KL: {"head": "relu", "kl_weight": 0.0},
}
"""Name -> changes to the calibrated ELBO; weights are those of mode "pixels"."""

PAIRS = (
    *((CALIBRATED_ELBO, other) for other in (MSE_STOCHASTIC, AUTOENCODER, BLOG_ELBO)),
    (BLOG, BLOG_WITHOUT_KL),
)
"""Conditions that the answer compares, by METRICS."""

METRICS = ("mse", "neg_elbo", "probe_accuracy", "active_units")


def set_condition(config: RunConfig, name: str, data: Source) -> RunConfig:
    """Set a named condition."""
    if name not in CONDITIONS:
        raise UserError(f"condition={name!r}: choose among {listed(CONDITIONS)}")
    changes = {"kl_weight": data.calibrated, **CONDITIONS[name]}
    weight = with_variance(config, changes["kl_weight"] / 2, data).kl_weight
    return config.replace(**{**changes, "kl_weight": weight})


def cost_and_gain(frame: frames.Frame) -> str:
    """Return what the KL term costs in reconstruction and buys elsewhere, paired by seed."""
    sentences = [
        f"Costs and gains of the KL term, paired, {over(frame['seed'].nunique())} (test mse in "
        "pixel², neg_elbo in nats / image, of encoder and decoder together); each comparison was "
        "planned, and is judged by itself."
    ]
    for first, second in PAIRS:
        gaps = {m: frames.compare(frame, AXIS, first, second, m) for m in METRICS if m in frame}
        found = [f"{name} {gap}" for name, gap in gaps.items() if gap.seeds]
        if found:
            sentences.append(f"{first!r} less {second!r}: {', '.join(found)}.")
    return "\n\n".join([" ".join(sentences), *hidden_classes(frame)])


def hidden_classes(frame: frames.Frame) -> list[str]:
    """Return, of each condition without active latents in which a probe finds classes, why."""
    known = frames.having(frame, "rate", "active_units", "probe_accuracy")
    chance = 1 / max(1, len(frames.class_errors(frame)))
    return [
        f"{name!r} has a probe accuracy of {part['probe_accuracy'].mean():.2f} beside 0 active "
        "latents: its posterior means depend on the class, but vary too little to count as active, "
        "and the probe standardises them. The decoder is given a draw of z instead, which carries "
        f"at most the rate, {plain(part['rate'].mean(), 2)} nats / image."
        for name, part in known.groupby(AXIS, sort=False)
        if part["active_units"].max() == 0 and part["probe_accuracy"].min() > 2 * chance
    ]


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
    ranking="val/neg_elbo",
    reference=CALIBRATED_ELBO,
    table=(
        *("neg_elbo", "mse", "rate", "active_units", "probe_accuracy", "frechet"),
        *("val/mse", "best/val/mse", "best/epoch"),
    ),
)

if __name__ == "__main__":
    main(STUDY)
