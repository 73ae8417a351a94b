"""Which KL weight is calibrated, and what does each weight cost in reconstruction?"""

from analysis import frames, plots
from analysis.tables import over, plain, plus_minus
from harness.config import RunConfig
from studies.runner.cli import main
from studies.runner.study import BLOG_WEIGHT, TABLE, Axis, Study

AXIS = "kl_weight"

WEIGHTS = (0.0, *(10 ** (i / 3 - 3) for i in range(13)))
"""0 and 13 weights, three a decade, from 0.001 to 10; the blog's weight 1 is among them."""


def best_weight(frame: frames.Frame) -> str:
    """Return which weight is best on validation data, compared with the blog's weight."""
    best, size = frames.best_value(frame, AXIS), frame["latent_size"].max()
    metrics = ["neg_elbo", "val/neg_elbo", "decoder_variance", "calibration_ratio", "active_units"]
    means = frames.along_axis(frame, AXIS, metrics).set_index(AXIS)
    row, collapse = means.loc[best], frames.collapse_value(frame, AXIS)
    equal = [
        f"{w:.3g}" for w in means.index if w != best and not frames.is_worse(frame, AXIS, w, best)
    ]
    variance = plain(row["decoder_variance"])
    of_gaussian = f"Its decoder variance is {variance} pixel², its calibration ratio"
    begins = "Its calibration ratio is" if variance == "-" else of_gaussian
    lowest = f"has the lowest validation neg_elbo of {len(means)} values"
    others = f"; not distinguishable from it: {', '.join(equal) or 'none'}"
    if len(means) == 1:
        lowest, others = "is the only value; its validation neg_elbo", ""
    sentences = [
        f"{AXIS} = {best:.3g} {lowest}: {plus_minus(row, 'val/neg_elbo')} nats / image "
        f"(test {plus_minus(row, 'neg_elbo')}; {over(row['seeds'])}){others}.",
        f"{begins} {plain(row['calibration_ratio'])}, and {row['active_units']:.1f} of {size} "
        "latents are active.",
    ]
    if BLOG_WEIGHT in means.index and best != BLOG_WEIGHT:
        cost = frames.compare(frame, AXIS, BLOG_WEIGHT, best, "neg_elbo")
        sentences.append(f"Weight 1 costs {cost} nats / image of test neg_elbo against it.")
    if collapse is not None:
        sentences.append(f"The exact linear model has no active latent from {collapse:.3g} on.")
    return " ".join([*sentences, worst_class(frame[frame[AXIS] == best])]).strip()


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
