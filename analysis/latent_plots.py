"""Figures of what latents say and what is drawn from them: a frame of runs in, a figure out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.plots import COLORS, GREY, LABELS, canvas, despine, focus, say_nothing, scale_axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 5
"""Values of an axis that have a panel of bars, at most."""

KL_CAPTION = (
    "Test KL of each latent, the largest of each run first: mean over seeds with 95 % interval. "
    "As many bars are dark as latents are active, that is, have a posterior mean whose variance is "
    "over 0.01; others tell nothing of the image, whatever their KL. Each panel has its own scale; "
    "a value whose rate is below 0.01 nats, where all latents have collapsed, has none."
)

QUALITY_CAPTION = (
    "Left: the rate, and bounds of what the latents tell of an image; the sampled lower one cannot "
    "exceed the logarithm of the number of images. Right: Frechet distance from the test images of "
    "prior samples and of reconstructions; dotted, of as many training images."
)

COLLAPSED = 0.01
"""A rate below which there is nothing to see, nats / image."""

FEW = 20
"""Bars that have an error bar each; the intervals of more are a band."""

NAMED_WEIGHT = 1.0
"""The blog's weight, which has a panel if it was swept."""


def kl_per_latent(frame: pd.DataFrame, axis: str, group: str = "") -> Figure:
    """Plot the test KL of each latent as bars, largest first, for some values of an axis.

    Bars are means over seeds of each run's largest KL, second largest and so on, with their
    intervals; as many are dark as latents are active on average.
    """
    frame = frame.dropna(subset=["rate"])
    parts = list(frame.groupby(group, sort=False)) if group else [("", frame)]
    shown = [(name, part, shown_values(part, axis)) for name, part in parts]
    columns = max(len(values) for *_, values in shown)
    size = (2.5 * columns + 0.5, 2.8 * len(shown) + 0.2)
    figure, panels = canvas(*size, rows=len(shown), columns=columns, squeeze=False)
    for row, (name, part, values) in zip(panels, shown, strict=True):
        best = _best(part, axis)
        for panel, value in zip(row, values, strict=False):
            runs = part[part[axis] == value]
            _bars(panel, runs)
            title = f"{axis} = {value:.3g}" if isinstance(value, int | float) else str(value)
            active, rate = runs["active_units"].mean(), runs["rate"].mean()
            note = f"{active:.1f} active, rate {rate:.3g}"
            panel.set_title(f"{title}{' (best)' if value == best else ''}\n{note}", fontsize=9)
        for panel in row[len(values) :]:
            panel.set_axis_off()
        row[0].set_ylabel("\n".join(filter(None, [str(name), "kl (nats)"])))
    for panel in panels[-1]:
        panel.set_xlabel("latent, by its kl")
    despine(figure)
    return figure


def shown_values(frame: pd.DataFrame, axis: str) -> list[Any]:
    """Choose up to five values of an axis, in its order.

    They are the best by validation `neg_elbo`, weight 1 if swept, and others as far from these as
    can be. Left out, unless there is nothing else, are values with a rate of nothing, and weight 0,
    whose KL nothing bounds.
    """
    unbounded = (axis == "kl_weight") & (frame[axis] == 0)
    rate = frame.groupby(axis, sort=False)["rate"].transform("mean")
    telling = frame[(rate > COLLAPSED) & ~unbounded]
    frame = frame if telling.empty else telling
    ordered = frame[axis].drop_duplicates()
    values = sorted(ordered) if ordered.dtype.kind in "if" else list(ordered)
    named = [_best(frame, axis)] + [NAMED_WEIGHT] * (axis == "kl_weight")
    chosen = {values.index(value) for value in named if value in values}
    while len(chosen) < min(PANELS, len(values)):
        left = set(range(len(values))) - chosen
        chosen.add(max(left, key=lambda place: min(abs(place - other) for other in chosen)))
    return [values[place] for place in sorted(chosen)]


def _best(frame: pd.DataFrame, axis: str) -> object:
    from analysis import frames

    return frames.best_value(frame, axis)


def _bars(panel: Axes, runs: pd.DataFrame) -> None:
    from analysis import frames

    ranked = frames.ordered_kl(runs)
    means, halves = ranked.mean(), ranked.apply(frames.half_width).fillna(0)
    active = round(runs["active_units"].mean())
    colors = [COLORS[0] if rank <= active else "#BBBBBB" for rank in means.index]
    panel.bar(means.index, means, color=colors, width=0.8)
    if len(means) <= FEW:
        panel.errorbar(means.index, means, yerr=halves, fmt="none", color="black", elinewidth=1)
    else:
        low, high = means - halves, means + halves
        panel.fill_between(means.index, low, high, step="mid", color="black", alpha=0.25, lw=0)
    panel.set_ylim(0, max(float((means + halves).max()) * 1.05, 1e-3))
    panel.set_xlim(0.3, len(means) + 0.7)
    if len(means) <= 10:
        panel.set_xticks(means.index)


def quality_along_axis(frame: pd.DataFrame, axis: str) -> Figure:
    """Plot what the latents say, and how near samples are to test images, against an axis.

    Left the rate and both bounds of the information in it, right Frechet distances of prior samples
    and of reconstructions, and of as many training images.
    """
    figure, (left, right) = canvas(10, 4, columns=2)
    information = ("rate", "mutual_information", "mutual_information_lower")
    _lines(left, frame, axis, information, COLORS)
    _lines(right, frame, axis, ("frechet", "frechet_reconstructions"), COLORS)
    if "frechet_floor" in frame:
        floor = frame["frechet_floor"].mean()
        right.axhline(floor, color=GREY, ls=":", lw=1.2, label="frechet_floor")
        right.set_yscale("log")
    left.set_ylabel("nats / image")
    right.set_ylabel(LABELS["frechet"])
    if "frechet" not in frame:
        say_nothing(right, "fewer than two classes: no features\nto compare images by")
    for panel in (left, right):
        panel.set_xlabel(LABELS.get(axis, axis))
        if panel.get_lines():
            panel.legend(frameon=False)
    despine(figure)
    return figure


def _lines(
    panel: Axes, frame: pd.DataFrame, axis: str, metrics: Sequence[str], colors: Sequence[str]
) -> None:
    from analysis import frames

    there = [metric for metric in metrics if metric in frame]  # an older store lacks some
    means = frames.along_axis(frame, axis, there)
    for metric, color in zip(there, colors, strict=False):
        x, y, half = means[axis], means[metric], means[f"{metric}±"].fillna(0)
        panel.fill_between(x, y - half, y + half, color=color, alpha=0.15, lw=0)
        panel.plot(x, y, ".-", color=color, label=metric)
    scale_axis(panel, frame[axis])
    if there:
        focus(panel, frame, axis, there[0])
