"""Figures of single latents and of the latent space."""

from typing import Any

import numpy as np

from analysis import frames
from analysis.plots.style import COLORS, Axes, Figure, canvas, empty_figure, plain_text
from analysis.tables import plain

KL_CAPTION = (
    "Test KL of each latent, the largest of each run first: mean over seeds with 95 % interval, "
    "of many latents its ends. As many bars are dark as latents are active, that is, have a "
    "posterior mean whose variance is over 0.01. A row has one scale; a value at which all latents "
    "have collapsed has no panel."
)

PANELS = 5  # values of an axis that have a panel of bars, at most
COLLAPSED = 0.01  # rate below which a value has no panel, nats / image
PRIOR = 3.0  # standard deviations of the prior that a panel of the latent space shows, at least


def kl_per_latent(frame: frames.Frame, axis: str, group: str = "") -> Figure:
    """Plot the test KL of each latent as bars, largest first, for some values of an axis."""
    frame = frames.having(frame, "rate")
    if frame.empty:
        return empty_figure("no run has a rate")
    parts = list(frame.groupby(group, sort=False)) if group else [("", frame)]
    shown = [(name, part, shown_values(part, axis)) for name, part in parts]
    columns = max(len(values) for *_, values in shown)
    size = (2.5 * columns + 0.5, 2.8 * len(shown) + 0.2)
    figure, panels = canvas(*size, len(shown), columns, squeeze=False, sharey="row")
    for row, (name, part, values) in zip(panels, shown, strict=True):
        best = frames.best_value(part, axis)
        for panel, value in zip(row, values, strict=False):
            runs = part[part[axis] == value]
            _bars(panel, runs)
            title = plain(value) if axis == "condition" else f"{axis} = {plain(value)}"
            active, rate = runs["active_units"].mean(), runs["rate"].mean()
            note = f"{active:.1f} active, rate {rate:.3g}"
            panel.set_title(f"{title}{' (best)' if value == best else ''}\n{note}", fontsize=9)
        for panel in row[len(values) :]:
            panel.set_axis_off()
        row[0].set_ylabel(f"{name}\nkl (nats)".lstrip())
    for panel in panels[-1]:
        panel.set_xlabel("latent, by its kl")
    return figure


def shown_values(frame: frames.Frame, axis: str) -> list[Any]:
    """Choose up to five values of an axis, in its order.

    They are the best by validation `neg_elbo`, weight 1 if swept, and others far from these.
    Collapsed values, and weight 0, whose KL nothing bounds, are left out unless there are no
    others.
    """
    unbounded = (axis == "kl_weight") & (frame[axis] == 0)
    rate = frame.groupby(axis, sort=False)["rate"].transform("mean")
    informative = frame[(rate > COLLAPSED) & ~unbounded]
    frame = frame if informative.empty else informative
    values = list(frame[axis].drop_duplicates())
    values = sorted(values) if frames.is_numeric(frame[axis]) else values
    named = [frames.best_value(frame, axis)] + [1.0] * (axis == "kl_weight")
    chosen = {values.index(value) for value in named if value in values}
    while len(chosen) < min(PANELS, len(values)):
        left = set(range(len(values))) - chosen
        chosen.add(max(left, key=lambda place: min(abs(place - other) for other in chosen)))
    return [values[place] for place in sorted(chosen)]


def _bars(panel: Axes, runs: frames.Frame) -> None:
    ranked = frames.ordered_kl(runs)
    means, halves = ranked.mean(), ranked.apply(frames.half_width).fillna(0)
    active = round(runs["active_units"].mean())
    colors = [COLORS[0] if rank <= active else "#BBBBBB" for rank in means.index]
    panel.bar(means.index, means, color=colors, width=0.8)
    bars = np.stack([np.minimum(halves, means).clip(0), halves])  # a KL divergence is not negative
    if len(means) <= 16:
        panel.errorbar(means.index, means, yerr=bars, fmt="none", color="black", elinewidth=1)
    else:  # lines of many latents would be one black area
        for end in (means - bars[0], means + bars[1]):
            panel.step(means.index, end, where="mid", color="black", lw=0.7)
    top = max(float((means + halves).max()) * 1.05, 1e-3)
    panel.set_ylim(0, max(top, panel.get_ylim()[1]))
    panel.set_xlim(0.3, len(means) + 0.7)
    if len(means) <= 10:
        panel.set_xticks(means.index)


def latent_scatter(places: frames.Frame) -> Figure:
    """Plot where images lie in latent space, a panel a model, coloured by class.

    Panels show 3 standard deviations of the prior each way, so that a collapsed model is a point,
    or more where images lie farther out, which the title has. The frame has the columns model, x, y
    and class.
    """
    import seaborn as sns

    models = list(places["model"].unique())
    columns = min(4, len(models))
    rows = -(-len(models) // columns)
    classes = sorted(places["class"].unique())
    beside = -(-len(classes) // (11 * rows))  # columns of the legend
    width = 3.2 * columns + beside * (0.6 + 0.1 * max(len(str(name)) for name in classes))
    figure, panels = canvas(width, 3.1 * rows, rows=rows, columns=columns, squeeze=False)
    # Seaborn's palette "colorblind" has ten colours.
    palette = sns.color_palette("colorblind" if len(classes) <= 10 else "husl", len(classes))
    for panel, model in zip(panels.flat, models, strict=False):
        part = places[places["model"] == model]
        for name, color in zip(classes, palette, strict=True):
            images = part[part["class"] == name]
            text = plain_text(str(name))
            panel.plot(images["x"], images["y"], ".", ms=3, color=color, label=text)
        centre = part[["x", "y"]].agg(["min", "max"]).mean()
        far = 1.05 * float((part[["x", "y"]] - centre).abs().to_numpy().max())
        scale = f"\nup to ±{far:.3g}" if far > PRIOR else ""
        panel.set_title(f"{plain_text(model)}{scale}", fontsize=9)
        (left, right), (low, high) = ((c - max(far, PRIOR), c + max(far, PRIOR)) for c in centre)
        panel.set(xticks=[], yticks=[], xlim=(left, right), ylim=(low, high), aspect="equal")
    for panel in panels.flat[len(models) :]:
        panel.set_axis_off()
    if len(classes) > 1:
        handles, labels = panels[0, 0].get_legend_handles_labels()
        look = {"markerscale": 4, "frameon": False, "ncols": beside}
        figure.legend(handles, labels, loc="outside right upper", **look)
    return figure
