"""At equal decoder variance every KL normalisation has the same loss: do their trainings differ?

A normalisation is another name of the weight, by construction. Dividing the whole loss alike (sums
in place of means) multiplies it by a factor, which changes no optimum, and which Adam divides out
but for its epsilon. Here each mode trains with the epsilon that such a factor amounts to: what can
differ is the path of the optimiser alone. (Plain SGD takes the factor as a learning rate.)
"""

from collections.abc import Mapping
from typing import Any

from analysis import frames, plots
from analysis.tables import plain
from harness.config import RunConfig
from studies.runner.cli import main
from studies.runner.study import TABLE, Axis, Source, Study, with_variance

AXIS, GROUP = "decoder_variance", "kl_normalization"

VARIANCES = tuple(5.0 * 10 ** (i / 2 - 4) for i in range(9))
"""Decoder variances, two a decade, from 0.0005 to 5: from unbounded rate to total collapse."""

MODES = ("pixels", "batch", "latent", "sum")

OF_THE_BLOG = ("mnist", "digits")  # its data, and their small stand-in


def modes(base: RunConfig, data: Source) -> Mapping[str, Mapping[str, Any]]:
    """Return the modes as groups, with Adam's epsilon divided by the factor of the whole loss."""
    from harness.objective import beta  # loads torch

    groups: dict[str, dict[str, Any]] = {mode: {GROUP: mode} for mode in MODES}
    for changes in groups.values() if base.optimizer in ("adam", "adamw") else ():
        factor = beta(base.replace(kl_weight=1.0, **changes), data.pixels)  # D B / c
        changes["adam_eps"] = base.adam_eps / factor
    return groups


def paths(frame: frames.Frame) -> str:
    """Return the names of the best weight, how far the modes part, and what the division does."""
    cells = frame.pivot_table(index=[AXIS, "seed"], columns=GROUP, values="neg_elbo")
    apart = cells.max(axis=1) - cells.min(axis=1)
    seeds = cells.groupby(AXIS).std().mean(axis=1).median()  # NaN for a single seed
    best = frames.best_value(frame, AXIS)
    weights = frame[frame[AXIS] == best].groupby(GROUP, sort=False)["kl_weight"].first()
    named = ", ".join(f"{mode} {weight:.3g}" for mode, weight in weights.items())
    which = "only" if frame[AXIS].nunique() == 1 else "best"
    measured = (
        f"the test neg_elbo of the {cells.shape[1]} modes differs by {plain(apart.median(), 2)} "
        f"nats / image (median) and at most {plain(apart.max(), 2)}"
    )
    if not apart.any():
        measured = f"the {cells.shape[1]} modes have the same test neg_elbo to the last bit"
    sentences = [
        "At equal decoder variance all normalisations have the same loss, by construction: the "
        f"{which} decoder variance, {best:.3g} pixel², is kl_weight = {named}. What could differ "
        f"is the path of the optimiser: at equal decoder variance and seed {measured}; the "
        f"standard deviation over seeds is {plain(seeds, 2)} (median).",
    ]
    if "sum" in weights and {*frame.get("dataset", ())} <= {*OF_THE_BLOG}:
        active = frame.loc[frame["active_units"] > 0, AXIS].max()
        until = f"are active up to {active:.3g} only" if active > 0 else "are not active at all"
        sentences.append(
            '"Without dividing this value it cannot learn properly" holds of weight 1: undivided '
            f"(sum), it means decoder variance {best / weights['sum']:,.0f}, and latents {until}."
        )
    return " ".join(sentences)


STUDY = Study(
    name="kl_normalization",
    question=__doc__,
    base=RunConfig(),
    axis=Axis(AXIS, VARIANCES, with_variance),
    group=GROUP,
    groups=modes,
    figures={
        "one_curve": (
            plots.one_curve,
            "Left, the metrics against the weight that the user sets: four curves. Right, the same "
            "runs against the decoder variance that the weight means: one curve, by construction; "
            "dashed, the exact linear model.",
        ),
    },
    curves={
        "paths": (
            plots.paths_apart,
            "Largest difference of val/neg_elbo between the modes at equal decoder variance and "
            "seed, by epoch, mean over seeds; dashed, the standard deviation over seeds within a "
            "mode, median over decoder variances. Differences of 0 are not drawn.",
        ),
    },
    answer=paths,
    table=("kl_weight", *TABLE),
)

if __name__ == "__main__":
    main(STUDY)
