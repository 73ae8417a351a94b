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


def named_alike(frame: frames.Frame) -> frames.Frame:
    """Return the runs of the first mode: the others are further names of the same weights."""
    return frame[frame[GROUP] == frame[GROUP].iloc[0]]


def paths(frame: frames.Frame) -> str:
    """Return the names of the best weight, and how far the optimiser's paths part."""
    cells = frame.pivot_table(index=[AXIS, "seed"], columns=GROUP, values="neg_elbo")
    apart, largest = cells.std(axis=1).median(), (cells.max(axis=1) - cells.min(axis=1)).max()
    seeds = cells.groupby(AXIS).std().mean(axis=1).median()  # NaN for a single seed
    best = frames.best_value(named_alike(frame), AXIS)
    weights = frame[frame[AXIS] == best].groupby(GROUP, sort=False)["kl_weight"].first()
    named = ", ".join(f"{mode} {weight:.3g}" for mode, weight in weights.items())
    text = (
        "At equal decoder variance all normalisations have the same loss, by construction: the "
        f"best one here, {best:.3g} pixel², is kl_weight = {named}. What could differ is the path "
        f"of the optimiser: at equal decoder variance and seed the {len(weights)} modes end with a "
        f"standard deviation of {plain(apart, 2)} nats / image of test neg_elbo (median; at most "
        f"{plain(largest, 2)} apart); that over seeds is {plain(seeds, 2)} (median)."
    )
    if "sum" not in weights or not {*frame.get("dataset", ())} <= {*OF_THE_BLOG}:
        return text
    active = frame.loc[frame["active_units"] > 0, AXIS].max()
    until = f"are active up to {active:.3g} only" if active > 0 else "are not active at all"
    return (
        f'{text} "Without dividing this value it cannot learn properly" holds of weight 1: '
        f"undivided (sum), it means decoder variance {best / weights['sum']:,.0f}, and latents "
        f"{until}."
    )


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
            "runs against the decoder variance that the weight means: one curve, but for the "
            "optimiser's path; dashed, the exact linear model.",
        ),
    },
    answer=paths,
    compared=named_alike,
    table=("kl_weight", *TABLE),
)

if __name__ == "__main__":
    main(STUDY)
