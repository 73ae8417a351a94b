"""Which KL weight is calibrated, and what does each weight cost in reconstruction?"""

from analysis import frames, plots
from analysis.comparisons import rank
from analysis.tables import plain
from harness.config import RunConfig
from studies.runner import answers
from studies.runner.cli import main
from studies.runner.study import BLOG_WEIGHT, TABLE, Axis, Study
from studies.runner.terminal import counted

AXIS = "kl_weight"

WEIGHTS = (0.0, *(10 ** (i / 3 - 3) for i in range(13)))
"""0 and 13 weights, three a decade, from 0.001 to 10; weight 1 is among them."""


def best_weight(frame: frames.Frame) -> str:
    """Return how the best weight on validation data is calibrated, and what weight 1 costs."""
    ranking = rank(frame, AXIS)
    best, runs = ranking.best, frame[frame[AXIS] == ranking.best]
    row = runs[["decoder_variance", "calibration_ratio", "active_units", "latent_size"]].mean()
    sentences = [
        f"{AXIS} = {best:.3g}: decoder variance {plain(row['decoder_variance'])} pixel², "
        f"calibration ratio {plain(row['calibration_ratio'])}, "
        f"{row['active_units']:.1f} of {counted(int(row['latent_size']), 'latent')} active."
    ]
    if BLOG_WEIGHT in [*ranking.not_distinguishable, *ranking.worse]:

        def cost(metric: str) -> str:
            return f"{frames.compare(frame, AXIS, BLOG_WEIGHT, best, metric).mean:.3g}"

        text = f"Weight {BLOG_WEIGHT:g} costs {cost('neg_elbo')} nats / image of test neg_elbo "
        text += "against it, of encoder and decoder together"
        if answers.REFITTED in frame:
            text += f", and {cost(answers.REFITTED)} of the decoder alone"
        judged = "worse" if BLOG_WEIGHT in ranking.worse else "not distinguishable from it"
        sentences.append(f"{text}, and is {judged}." if ranking.seeds > 1 else f"{text}.")
    if (collapse := frames.collapse_value(frame, AXIS)) is not None:
        sentences.append(f"The exact linear model has no active latent from {collapse:.3g} on.")
    return " ".join([*sentences, worst_class(runs)]).strip()


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
