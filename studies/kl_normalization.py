"""Do KL normalisations disagree about the best weight, or only about its name?

The same decoder variance is reached by another weight in each mode. The modes are swept over the
same decoder variances, so that each has its own logarithmic grid of weights.
"""

from analysis import frames, plots
from analysis.tables import plain
from harness.config import RunConfig
from studies.runner.cli import main
from studies.runner.study import TABLE, Axis, Study, with_variance

AXIS, GROUP = "decoder_variance", "kl_normalization"

VARIANCES = tuple(5.0 * 10 ** (i / 2 - 4) for i in range(9))
"""Decoder variances, two a decade, from 0.0005 to 5: from unbounded rate to total collapse."""

MODES = ("pixels", "batch", "latent", "sum")


def one_curve(frame: frames.Frame) -> str:
    """Return how far the modes agree at equal decoder variance, and what the division changes."""
    cells = frame.pivot_table(index=[AXIS, "seed"], columns=GROUP, values="neg_elbo")
    modes = (cells.max(axis=1) - cells.min(axis=1)).max()
    seeds = cells.groupby(AXIS).std().mean(axis=1).median()  # NaN for a single seed
    verdict = "one curve" if modes < seeds else "not one curve" if modes >= seeds else "not judged"
    best = frames.best_value(frame, AXIS)
    weights = frame[frame[AXIS] == best].groupby(GROUP, sort=False)["kl_weight"].first()
    named = ", ".join(f"{mode} {weight:.3g}" for mode, weight in weights.items())
    active = frame.loc[frame["active_units"] > 0, AXIS].max()
    until = f"latents are active up to {active:.3g} only" if active > 0 else "no latent is active"
    which = "only" if frame[AXIS].nunique() == 1 else "best"
    return (
        f"At equal decoder variance and seed the test neg_elbo of the {cells.shape[1]} modes "
        f"differs by at most {modes:.2g} nats / image, that of seeds by {plain(seeds, 2)} (median "
        f"standard deviation): the modes are {verdict}. The {which} decoder variance, {best:.3g} "
        f'pixel², is kl_weight = {named}. "Without dividing this value it cannot learn properly" '
        "holds of weight 1: undivided (sum), it means decoder variance "
        f"{best / weights['sum']:,.0f}, and {until}."
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
