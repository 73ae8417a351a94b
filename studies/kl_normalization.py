"""Do KL normalisations disagree about the best weight, or only about its name?

The same decoder variance is reached by another weight in each mode. The modes are swept over the
same decoder variances, so that each has its own logarithmic grid of weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis import frames, plots
from harness.config import RunConfig
from studies.runner.cli import main
from studies.runner.study import TABLE, Axis, Study, with_variance

if TYPE_CHECKING:
    import pandas as pd

AXIS, GROUP = "decoder_variance", "kl_normalization"

VARIANCES = tuple(5.0 * 10 ** (i / 2 - 4) for i in range(9))
"""Decoder variances, two a decade, from 0.0005 to 5: from unbounded rate to total collapse."""

MODES = ("pixels", "batch", "latent", "sum")


def one_curve(frame: pd.DataFrame) -> str:
    """Return how far the modes agree at equal decoder variance, and what the division changes."""
    cells = frame.pivot_table(index=[AXIS, "seed"], columns=GROUP, values="neg_elbo")
    between_modes = (cells.max(axis=1) - cells.min(axis=1)).max()
    between_seeds = cells.groupby(AXIS).std().mean(axis=1).median()
    best = frames.best_value(frame, AXIS)
    at_best = frame[frame[AXIS] == best].groupby(GROUP, sort=False)
    named = ", ".join(f"{mode} {part['kl_weight'].iloc[0]:.3g}" for mode, part in at_best)
    summed = frame[frame[GROUP] == "sum"]
    per_weight = (summed[AXIS] / summed["kl_weight"]).iloc[0]
    active = frame.groupby(AXIS)["active_units"].max()
    collapsed = active[active == 0].index
    verdict = "the modes are one curve" if between_modes < between_seeds else "the modes disagree"
    seeds = f"while seeds differ by {between_seeds:.2g} (median standard deviation): {verdict}"
    seeds = "with a single seed" if between_seeds != between_seeds else seeds
    gap = f"differs by at most {between_modes:.2g} nats / image"
    gap = gap if between_modes else "is equal to the last bit,"
    first = (
        f"At equal decoder variance and seed the test neg_elbo of the {cells.shape[1]} modes "
        f"{gap} {seeds}. The best decoder variance, {best:.3g} pixel², is kl_weight = {named}."
    )
    if collapsed.empty:
        return first
    return (
        f'{first}\n\n"Without dividing this value it cannot learn properly" holds for weight 1: '
        f"undivided (sum), it means decoder variance {per_weight:,.0f}, and from "
        f"{collapsed[0]:.3g} pixel² on no latent is active. It is the size of the weight and not "
        f"the missing division: undivided with kl_weight = {best / per_weight:.3g} the same model "
        "reaches the best neg_elbo."
    )


STUDY = Study(
    name="kl_normalization",
    question=__doc__,
    base=RunConfig(),
    axis=Axis(AXIS, VARIANCES, with_variance),
    group=GROUP,
    groups=lambda base, data: {mode: {GROUP: mode} for mode in MODES},
    figures={
        "one_curve": (
            plots.one_curve,
            "Left, the metrics against the weight that the user sets: four curves. Right, the same "
            "runs against the decoder variance that the weight means: one curve; dashed, the exact "
            "linear model.",
        ),
    },
    answer=one_curve,
    table=("kl_weight", *TABLE),
)

if __name__ == "__main__":
    main(STUDY)
