"""Figures of distortion against rate."""

from itertools import cycle
from typing import Any

import numpy as np

from analysis import frames
from analysis.plots.style import (
    COLORS,
    GREY,
    Axes,
    Figure,
    canvas,
    empty_figure,
    label,
    legend,
    note,
    shades,
)
from analysis.tables import plain

MARKS = "osD^vP*X"  # one more than colours, so that groups with the same colour have other marks


def rate_distortion(frame: frames.Frame, axis: str, group: str = "") -> Figure:
    """Plot test distortion against rate, one dot a run, with lines of equal `neg_elbo`.

    Means are joined along the axis, a colour a group; without groups colours follow the axis.
    """
    frame = frames.having(frame, "rate", "distortion")
    if frame.empty:
        return empty_figure("no run has a rate and a distortion")
    figure, panel = canvas(8, 6)
    shown = _bounded(frame, axis)
    _iso_lines(panel, shown)
    keys = [group, axis] if group else [axis]
    means = frames.along_axis(frame, keys, ["rate", "distortion"])
    if group:
        _labels(panel, means, axis)
    names = means[keys[0]].unique()
    few = group and len(names) <= len(COLORS)
    colors = dict(zip(names, COLORS, strict=False)) if few else shades(names)
    for name, part in means.groupby(group or np.ndim, sort=False):
        panel.plot(part["rate"], part["distortion"], lw=1, color=colors[name] if group else GREY)
        for _, point in part.iterrows():
            color = colors[point[keys[0]]]
            runs = frame[np.logical_and.reduce([frame[key] == point[key] for key in keys])]
            panel.plot(runs["rate"], runs["distortion"], ".", color=color, ms=6, zorder=3)
            place = (point["rate"], point["distortion"])
            panel.plot(*place, "o", color=color, ms=9, mec="white", zorder=4)
            if not group and point[axis] not in set(shown[axis]):
                note(panel, f"{axis} = {plain(point[axis])} is beyond, at rate {place[0]:.3g}")
    panel.set(xlabel=label("rate"), ylabel=label("distortion"))
    title = f"{group}; numbers are {axis}" if group else label(axis)
    legend(figure, colors, title, "-" if group else "o")
    return figure


def frontier(frame: frames.Frame, group: str) -> Figure:
    """Plot every run of several studies on one rate-distortion plane, coloured by a column."""
    figure, panel = canvas(9, 6)
    _iso_lines(panel, frame)
    for (name, part), color, mark in zip(
        frame.groupby(group, sort=False), cycle(COLORS), cycle(MARKS), strict=False
    ):
        panel.plot(part["rate"], part["distortion"], mark, color=color, ms=5, alpha=0.6, label=name)
    panel.set(xlabel=label("rate"), ylabel=label("distortion"))
    figure.legend(title=group, loc="outside right upper", frameon=False)
    return figure


def _labels(panel: Axes, means: frames.Frame, axis: str) -> None:
    """Write values of the axis beside their points, those of points that lie together once."""
    from matplotlib.patheffects import withStroke

    together = 0.03 * np.array([np.ptp(panel.get_xlim()), np.ptp(panel.get_ylim())])
    look: dict[str, Any] = {"textcoords": "offset points", "zorder": 5}
    named: dict[tuple[float, float], list[Any]] = {}  # first place -> value and place
    for _, (value, *place) in means[[axis, "rate", "distortion"]].iterrows():
        near = (at for at in named if np.allclose(at, place, rtol=0, atol=together))
        named.setdefault(next(near, tuple(place)), []).append((value, place))
    for points in named.values():
        values = [*map(plain, sorted({value for value, _ in points}))]
        text = ", ".join(values) if len(values) < 4 else f"{values[0]} … {values[-1]}"
        written = panel.annotate(text, points[-1][1], xytext=(6, 5), **look)
        written.set_path_effects([withStroke(linewidth=3, foreground="white")])  # over lines


def _bounded(frame: frames.Frame, axis: str) -> frames.Frame:
    """Leave out weight 0 if its rate, which nothing bounds, is more than twice all others'."""
    if axis != "kl_weight" or frame[axis].nunique() < 2:
        return frame
    rest = frame[frame[axis] != 0]
    return rest if frame["rate"].max() > 2 * rest["rate"].max() else frame


def _iso_lines(panel: Axes, frame: frames.Frame) -> None:
    """Draw lines of equal `neg_elbo` = distortion + rate behind the points."""
    rates = max(frame["rate"].max(), 1e-9) * np.array([-0.03, 1.05])
    low, high = frame["distortion"].min(), frame["distortion"].max()
    margin = 0.06 * (high - low) + 1e-9
    panel.set(xlim=tuple(rates), ylim=(low - margin, high + margin))
    step = 2 * 10.0 ** np.floor(np.log10(max(high - low, rates[1], 1.0)))
    for total in np.arange(np.floor(low / step) * step, high + rates[1] + step, step):
        panel.plot(rates, total - rates, color=GREY, lw=0.5, alpha=0.4, zorder=1)
    panel.plot([], [], color=GREY, lw=0.5, label=f"equal neg_elbo,\nevery {step:g} nats")
