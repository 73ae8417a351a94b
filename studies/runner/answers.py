"""Answers in words, from a frame of runs: what was found, with its uncertainty.

Differences are paired by seed, and one smaller than its interval is called not distinguishable.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from analysis import frames, tables
from studies import conditions

if TYPE_CHECKING:
    import pandas as pd

    from analysis.frames import Difference

DIGITS, HARD = ("digits", "mnist"), 8
"""Datasets of digits, and the digit that the blog calls hard."""

REPORTED = ["neg_elbo", "mse", "decoder_variance", "calibration_ratio", "active_units"]


def best_weight(frame: pd.DataFrame, axis: str) -> str:
    """Say which weight is best on validation data, and compare it with the blog's weight."""
    best = frames.best_value(frame, axis)
    means = frames.along_axis(frame, axis, [*REPORTED, "val/neg_elbo"]).set_index(axis)
    row, size = means.loc[best], frame["latent_size"].max()
    seeds = int(row["seeds"])
    of = "one seed" if seeds == 1 else f"mean and 95 % interval over {seeds} seeds"
    sentences = [
        f"{axis} = {best:.3g} has the lowest validation neg_elbo of {len(means)} values: "
        f"{plus_minus(row, 'val/neg_elbo')} nats / image "
        f"(test {plus_minus(row, 'neg_elbo')}; {of}).",
        calibration(row) + f"{row['active_units']:.1f} of {size} latents are active.",
        rivals(frame, axis, best),
        *linear_prediction(frame, axis, best),
    ]
    if conditions.BLOG_WEIGHT in means.index and best != conditions.BLOG_WEIGHT:
        blog = means.loc[conditions.BLOG_WEIGHT]
        gap = compare(frame, axis, conditions.BLOG_WEIGHT, best, "neg_elbo")
        sentences.append(
            f"{_weight_one(frame)} costs {gap} nats / image of test neg_elbo against it, at mse "
            f"{blog['mse']:.4f} against {row['mse']:.4f}, with {blog['active_units']:.1f} of "
            f"{size} latents active."
        )
    return " ".join([*sentences, worst_class(frame[frame[axis] == best])]).strip()


def calibration(row: pd.Series) -> str:
    """Say which decoder variance the weight means, if the decoder has one."""
    if row["calibration_ratio"] != row["calibration_ratio"]:
        return "At it "
    return (
        f"Its decoder variance is {row['decoder_variance']:.3g} pixel², its calibration ratio "
        f"{row['calibration_ratio']:.2f}, and "
    )


def _weight_one(frame: pd.DataFrame) -> str:
    """Name weight 1: the blog's in its normalisation, the exact ELBO of a likelihood."""
    of_squares = (frame["sigma"] == "fixed") & (frame["likelihood"] == "gaussian")
    pixels = frame["kl_normalization"] == "pixels"
    if of_squares.all() and pixels.all():
        return "The blog's weight 1"
    return "Weight 1, the exact ELBO," if pixels.all() and not of_squares.any() else "Weight 1"


def linear_prediction(frame: pd.DataFrame, axis: str, best: object) -> list[str]:
    """Say where the exact linear model collapses, beside what was seen; nothing in old stores."""
    knob = frames.collapse_value(frame, axis)
    if knob is None:
        return []
    active = frame.groupby(axis)["active_units"].mean()
    dead = active.index[active == 0]
    seen = (
        f"none is active from {dead.min():.3g} on" if len(dead) else "every value tried keeps some"
    )
    allowed = frame.loc[frame[axis] == best, "linear/active_units"].mean()
    return [
        f"The exact linear model loses its last latent at {axis} = {knob:.3g}, where the decoder "
        f"variance reaches the data's largest eigenvalue; here {seen}. At the best value it keeps "
        f"{allowed:.0f} latents active, the trained model {active[best]:.1f}."
    ]


def useful_latents(frame: pd.DataFrame) -> str:
    """Say, for each weight, from how many latents on more of them change nothing."""
    sentences = []
    for name, part in frame.groupby("weight", sort=False):
        best = frames.best_value(part, "latent_size")
        sizes = sorted(part["latent_size"].unique())
        enough = next(size for size in sizes if not _worse(part, size, best))
        active = part.groupby("latent_size")["active_units"].mean()
        sentences.append(
            f"With the {name} ({part['kl_weight'].iloc[0]:.3g}) validation neg_elbo is lowest at "
            f"{best} latents; the smallest size not distinguishable from that is {enough}. Of "
            f"{sizes[-1]} latents {active.iloc[-1]:.1f} are active.{_below_floor(part)}"
        )
    return "\n\n".join(sentences)


def _below_floor(frame: pd.DataFrame) -> str:
    """Say at which sizes the mse is below that of principal components, if that is known."""
    if "pca_floor" not in frame:
        return ""
    means = frame.groupby("latent_size")[["mse", "pca_floor"]].mean()
    below = [f"{size}" for size in means.index if means["mse"][size] < means["pca_floor"][size]]
    sizes = f"{', '.join(below)} latents" if below else "no size"
    return f" Its test mse is below the floor of principal components at {sizes}."


def one_curve(frame: pd.DataFrame) -> str:
    """Say how far the modes agree at equal decoder variance, and what the blog's division does."""
    cells = frame.pivot_table(
        index=["decoder_variance", "seed"], columns="kl_normalization", values="neg_elbo"
    )
    between_modes = (cells.max(axis=1) - cells.min(axis=1)).max()
    between_seeds = cells.groupby("decoder_variance").std().mean(axis=1).median()
    best = frames.best_value(frame, "decoder_variance")
    at_best = frame[frame["decoder_variance"] == best].groupby("kl_normalization", sort=False)
    named = ", ".join(f"{mode} {part['kl_weight'].iloc[0]:.3g}" for mode, part in at_best)
    summed = frame[frame["kl_normalization"] == "sum"]
    per_weight = (summed["decoder_variance"] / summed["kl_weight"]).iloc[0]
    collapsed = frame.groupby("decoder_variance")["active_units"].max()
    collapsed = collapsed[collapsed == 0].index
    verdict = "the modes are one curve" if between_modes < between_seeds else "the modes disagree"
    luck = f"while seeds differ by {between_seeds:.2g} (median standard deviation): {verdict}"
    luck = "with a single seed" if between_seeds != between_seeds else luck
    gap = f"differs by at most {between_modes:.2g} nats / image"
    gap = gap if between_modes else "is equal to the last bit,"
    first = (
        f"At equal decoder variance and seed the test neg_elbo of the {cells.shape[1]} modes "
        f"{gap} {luck}. The best decoder variance, {best:.3g} pixel², is kl_weight = {named}."
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


def cost_and_gain(frame: pd.DataFrame) -> str:
    """Say what the KL term costs in reconstruction and buys elsewhere, paired by seed."""
    there = set(frame["condition"])
    elbo, error_only = conditions.CALIBRATED_ELBO, conditions.MSE_STOCHASTIC
    difference = partial(compare, frame, "condition")
    sentences = []
    for other in (error_only, conditions.AUTOENCODER):
        if {elbo, other} <= there:
            changed = f"test mse by {difference(elbo, other, 'mse')} pixel²"
            if "probe_accuracy" in frame:
                accuracy = difference(elbo, other, "probe_accuracy")
                changed += f" and linear-probe accuracy by {accuracy}"
            sentences.append(f"Against {other!r} the calibrated KL term changes {changed}.")
    if {elbo, error_only} <= there:
        gap = difference(error_only, elbo, "neg_elbo")
        sentences.append(f"It buys {gap} nats / image of neg_elbo over the error alone.")
    if {elbo, conditions.BLOG_ELBO} <= there:
        mse, gap = (difference(conditions.BLOG_ELBO, elbo, m) for m in ("mse", "neg_elbo"))
        sentences.append(
            f"At weight 1 the KL term costs {mse} pixel² of mse and {gap} nats / image of neg_elbo "
            "against the calibrated weight."
        )
    if {conditions.BLOG, conditions.BLOG_WITHOUT_KL} <= there:
        gap = difference(conditions.BLOG, conditions.BLOG_WITHOUT_KL, "mse")
        own = frame[frame["condition"] == conditions.BLOG]
        sentences.append(
            f"In the blog's own recipe the KL term costs {gap} pixel² of mse and leaves "
            f"{own['active_units'].mean():.1f} of {frame['latent_size'].max()} latents active"
            f"{against_linear(own)}."
        )
    seeds = frame["seed"].nunique()
    return " ".join([*sentences, f"(Paired differences, 95 % intervals over {seeds} seeds.)"])


def against_linear(runs: pd.DataFrame) -> str:
    """Say whether runs have a lower loss than the exact linear model; "" if there is none."""
    if "gap_to_linear" not in runs or runs["gap_to_linear"].isna().any():
        return ""
    gap, half = runs["gap_to_linear"].mean(), frames.half_width(runs["gap_to_linear"])
    return (
        f"; its loss is {judged(gap, half)} than that of a linear model at the same weight "
        f"(gap_to_linear {gap:.1f} ± {half:.1f} %)"
    )


def judged(gap: float, half_width: float) -> str:
    """Return how a mean gap_to_linear compares with 0: "better", "no better" or "worse"."""
    if gap + half_width < 0:
        return "worse"
    return "better" if gap - half_width > 0 else "no better"


def worst_class(frame: pd.DataFrame) -> str:
    """Say which class reconstructs worst; of digits, where the blog's 8 stands.

    Nothing of images without labels, or of one class.
    """
    errors, names = frames.class_errors(frame), frames.class_names(frame)
    if len(errors) < 2:
        return ""
    worst = errors.index[0]
    said = f"Class {names.get(worst, worst)} reconstructs worst (mse {errors[worst]:.4f})"
    if names or not frame["dataset"].isin(DIGITS).all():
        return f"{said}."
    if worst == HARD:
        return f"{said}, of which the blog says that it underperforms."
    place = list(errors.index).index(HARD) + 1
    return (
        f"{said}; {HARD}, of which the blog says that it underperforms, is number {place} of "
        f"{len(errors)} (mse {errors[HARD]:.4f})."
    )


def compare(frame: pd.DataFrame, axis: str, first: Any, second: Any, metric: str) -> Difference:  # noqa: ANN401
    """Return the paired difference of a metric between two values of an axis."""
    return frames.paired_difference(
        frame[frame[axis] == first], frame[frame[axis] == second], metric
    )


def rivals(frame: pd.DataFrame, axis: str, best: object) -> str:
    """Name the values whose paired validation difference from the best has 0 in its interval."""
    others = [value for value in sorted(frame[axis].unique()) if value != best]
    equal = [f"{value:.3g}" for value in others if not _worse(frame, value, best, axis)]
    if not equal:
        return "Every other value is distinguishably worse on validation data."
    return f"Not distinguishable from it on validation data: {', '.join(equal)}."


def _worse(frame: pd.DataFrame, value: object, best: object, axis: str = "latent_size") -> bool:
    if value == best:
        return False
    return compare(frame, axis, value, best, "val/neg_elbo").distinguishable


def plus_minus(row: pd.Series, metric: str) -> str:
    """Write a mean with its half width, or alone where there is none."""
    return tables.pair(row[metric], row[f"{metric}±"], 2)
