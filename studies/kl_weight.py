"""Which KL weight is calibrated, and what does each weight cost in reconstruction?"""

from analysis import frames, plots
from analysis.comparisons import Ranking, rank
from analysis.tables import over, plain, plus_minus
from harness.config import RunConfig
from studies.runner import answers
from studies.runner.cli import main
from studies.runner.study import BLOG_WEIGHT, TABLE, Axis, Study

AXIS = "kl_weight"

WEIGHTS = (0.0, *(10 ** (i / 3 - 3) for i in range(13)))
"""0 and 13 weights, three a decade, from 0.001 to 10; weight 1 is among them."""


def best_weight(frame: frames.Frame) -> str:
    """Return which weight is best on validation data, compared with weight 1."""
    ranking, size = rank(frame, AXIS), frame["latent_size"].max()
    best = ranking.best
    metrics = ["neg_elbo", "val/neg_elbo", "decoder_variance", "calibration_ratio", "active_units"]
    means = frames.along_axis(frame, AXIS, metrics).set_index(AXIS)
    row, collapse = means.loc[best], frames.collapse_value(frame, AXIS)
    variance = plain(row["decoder_variance"])
    of_gaussian = f"Its decoder variance is {variance} pixel², its calibration ratio"
    begins = "Its calibration ratio is" if variance == "-" else of_gaussian
    lowest = f"has the lowest validation neg_elbo of {len(means)} values"
    others = f"; not distinguishable from it: {answers.listed(ranking)}" * (ranking.seeds > 1)
    if len(means) == 1:
        lowest, others = "is the only value; its validation neg_elbo", ""
    sentences = [
        f"{AXIS} = {best:.3g} {lowest}: {plus_minus(row, 'val/neg_elbo')} nats / image "
        f"(test {plus_minus(row, 'neg_elbo')}; {over(row['seeds'])}){others}.",
        f"{begins} {plain(row['calibration_ratio'])}, and {row['active_units']:.1f} of {size} "
        "latents are active.",
    ]
    if BLOG_WEIGHT in means.index and best != BLOG_WEIGHT:
        sentences.append(_cost(frame, ranking, BLOG_WEIGHT))
    if collapse is not None:
        sentences.append(f"The exact linear model has no active latent from {collapse:.3g} on.")
    return " ".join([*sentences, worst_class(frame[frame[AXIS] == best])]).strip()


def _cost(frame: frames.Frame, ranking: Ranking, weight: float) -> str:
    """Return what a weight costs against the best one: of the whole model, and of the decoder."""

    def cost(metric: str) -> str:
        return f"{frames.compare(frame, AXIS, weight, ranking.best, metric).mean:.3g}"

    judged = "is worse" if weight in ranking.worse else "is not distinguishable from it"
    refitted = answers.REFITTED
    return (
        f"Weight {weight:g} costs {cost('neg_elbo')} nats / image of test neg_elbo against it, of "
        "encoder and decoder together"
        + (f", and {cost(refitted)} of the decoder alone" if refitted in frame else "")
        + f", and {judged}." * (ranking.seeds > 1)
        + "." * (ranking.seeds == 1)
    )


def worst_class(frame: frames.Frame) -> str:
    """Return which class reconstructs worst; "" for images without labels, or of one class."""
    errors, names = frames.class_errors(frame), frames.class_names(frame)
    if len(errors) < 2:
        return ""
    worst = errors.index[0]
    return f"Class {names.get(worst, worst)} reconstructs worst (mse {errors[worst]:.4f})."


STUDY = Study(
    name="kl_weight",
    question=__doc__,
    base=RunConfig(),
    axis=Axis(AXIS, WEIGHTS),
    figures=plots.usual(
        AXIS,
        "Test metrics against the KL weight; dotted, calibration_ratio = 1. Dashed, the exact "
        "linear model; dash-dotted, the smallest weight at which it has no active latent.",
    ),
    answer=best_weight,
    table=("decoder_variance", *TABLE, "neg_log_likelihood", "frechet"),
)

if __name__ == "__main__":
    main(STUDY)
