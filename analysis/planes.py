"""Figures of two metrics, or of two latent coordinates, against each other."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from analysis.plots import COLORS, GREY, LABELS, canvas, despine, plain_text, said

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DISTINCT = 10
"""Colours of seaborn's palette "colorblind"; more classes than these would share some."""

MARKS = "osD^vP*X"
"""One more than colours, so that groups with the same colour have other marks."""


def latent_scatter(places: pd.DataFrame) -> Figure:
    """Plot where images lie in latent space, a panel a model, coloured by class.

    Args:
        places: columns model, x, y, class; one row per image and model.
    """
    import seaborn as sns

    models = list(places["model"].unique())
    columns = min(4, len(models))
    rows = -(-len(models) // columns)
    figure, panels = canvas(3.2 * columns, 3.1 * rows, rows=rows, columns=columns, squeeze=False)
    classes = places["class"].nunique()
    palette = sns.color_palette("colorblind" if classes <= DISTINCT else "husl", classes)
    for panel, model in zip(panels.flat, models, strict=False):
        part = places[places["model"] == model]
        for digit, color in zip(sorted(places["class"].unique()), palette, strict=True):
            here = part[part["class"] == digit]
            name = plain_text(str(digit))
            panel.plot(here["x"], here["y"], ".", ms=3, color=color, label=name)
        panel.set_title(model, fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
    for panel in panels.flat[len(models) :]:
        panel.set_axis_off()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    if classes > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=10, markerscale=4)
    return figure


def rate_distortion(frame: pd.DataFrame, axis: str, group: str = "") -> Figure:
    """Plot test distortion against rate, one dot a run, with lines of equal `neg_elbo`.

    Args:
        frame: one row per run; runs without a rate are left out.
        axis: column along which means are joined.
        group: column of the lines; without it colours follow the axis.
    """
    import seaborn as sns

    figure, panel = canvas(8, 6)
    frame = frame.dropna(subset=["rate"])
    shown = _bounded(frame, axis)
    iso_lines(panel, shown)
    keys = [group, axis] if group else [axis]
    means = frame.groupby(keys, sort=False)[["rate", "distortion"]].mean().reset_index()
    lines = means.groupby(group, sort=False) if group else [("", means)]
    colors = cycle(COLORS if group else sns.color_palette("viridis", len(means)))
    for name, part in lines:
        line_color = next(colors) if group else GREY
        part = part.sort_values(axis)
        panel.plot(part["rate"], part["distortion"], color=line_color, lw=1, label=name or None)
        for _, point in part.iterrows():
            color = line_color if group else next(colors)
            runs = frame[np.logical_and.reduce([frame[key] == point[key] for key in keys])]
            panel.plot(runs["rate"], runs["distortion"], ".", color=color, ms=6, zorder=3)
            label = None if group else _point_label(point, axis, shown)
            place = (point["rate"], point["distortion"])
            panel.plot(*place, "o", color=color, ms=9, mec="white", zorder=4, label=label)
            if group:
                panel.annotate(said(point[axis]), place, xytext=(5, 4), textcoords="offset points")
    panel.set_xlabel(LABELS["rate"])
    panel.set_ylabel(LABELS["distortion"])
    title = f"{group}; numbers are {axis}" if group else LABELS.get(axis, axis)
    figure.legend(title=title, loc="outside right upper", frameon=False)
    despine(figure)
    return figure


def frontier(frame: pd.DataFrame, group: str) -> Figure:
    """Plot every run of several studies on one rate-distortion plane, coloured by a column."""
    figure, panel = canvas(9, 6)
    iso_lines(panel, frame)
    for (name, part), color, mark in zip(
        frame.groupby(group, sort=False), cycle(COLORS), cycle(MARKS), strict=False
    ):
        panel.plot(part["rate"], part["distortion"], mark, color=color, ms=5, alpha=0.6, label=name)
    panel.set_xlabel(LABELS["rate"])
    panel.set_ylabel(LABELS["distortion"])
    figure.legend(title=group, loc="outside right upper", frameon=False)
    despine(figure)
    return figure


def _point_label(point: pd.Series, axis: str, shown: pd.DataFrame) -> str:
    off = "" if point[axis] in set(shown[axis]) else f", rate {point['rate']:.3g}"
    return f"{said(point[axis])}{off}"


def _bounded(frame: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Leave out weight 0 if its rate, which nothing bounds, is more than twice all others'."""
    if axis != "kl_weight" or frame[axis].nunique() < 2:
        return frame
    rest = frame[frame[axis] != 0]
    return rest if frame["rate"].max() > 2 * rest["rate"].max() else frame


def iso_lines(panel: Axes, frame: pd.DataFrame) -> None:
    """Draw lines of equal `neg_elbo` = distortion + rate behind a rate-distortion plane."""
    rates = np.array([0.0, frame["rate"].max() * 1.05])
    low, high = frame["distortion"].min(), frame["distortion"].max()
    margin = 0.06 * (high - low) + 1e-9
    panel.set(xlim=tuple(rates), ylim=(low - margin, high + margin))
    step = 2 * 10.0 ** np.floor(np.log10(max(high - low, rates[1], 1.0)))
    for total in np.arange(np.floor(low / step) * step, high + rates[1] + step, step):
        panel.plot(rates, total - rates, color=GREY, lw=0.5, alpha=0.4, zorder=1)
    panel.plot([], [], color=GREY, lw=0.5, label=f"equal neg_elbo,\nevery {step:g} nats")
