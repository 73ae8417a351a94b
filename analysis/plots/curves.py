"""Learning curves, of the rows of `Store.histories` as a frame: run_id, epoch and value."""

from collections.abc import Sequence
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
    note,
    plain_text,
)
from analysis.tables import plain

BEST, NAMES = COLORS[1], (COLORS[0], *COLORS[2:])
FAINT, LIGHTEST = "#bbbbbb", 0.92  # the end of viridis, which is too light for a line
LISTED = 9  # values in a legend: more numbers have a colour bar, of more names the best are listed

CURVES_CAPTION = (
    "The validation objective by epoch: a thin line a run, with a dot where it ended before "
    "others; a thick line the mean over the seeds of a value. Orange: the value with the lowest "
    "mean at the end; dashed, the exact linear model at that value, on test data."
)


def learning_curves(
    histories: frames.Frame, frame: frames.Frame, axis: str, group: str = "", metric: str = ""
) -> Figure:
    """Plot a validation metric by epoch, coloured along an axis, with a panel for each group.

    Args:
        histories: columns run_id, epoch and value; runs that `frame` lacks are left out.
        frame: runs, one row each.
        axis: column that is swept.
        group: column of the groups, "" without.
        metric: by default `val/neg_elbo`, or `val/loss` where runs lack it.
    """
    metric = metric or f"val/{frames.compared(frame)}"
    curves = by_epoch(histories, frame)
    frame = frame[frame["run_id"].isin(curves.columns)].set_index("run_id")
    if frame.empty:
        return empty_figure(f"no run has a {metric} by epoch")
    ends, numeric = curves.ffill().iloc[-1], frames.is_numeric(frame[axis])
    order = [*ends.groupby(frame[axis]).mean().sort_values().index]  # the best first
    order = sorted(order) if numeric else order
    colors, parts = _colors(order, numeric=numeric), [*frame.groupby(group or np.ndim, sort=False)]
    columns = len(parts) if len(parts) < 4 else 2 + (len(parts) > 4)
    rows = -(-len(parts) // columns)
    width, height = (4 * columns + 1, 3.4 * rows) if group else (9, 5)
    grid: dict[str, Any] = {"rows": rows, "columns": columns, "squeeze": False}
    figure, panels = canvas(width, height, sharex=True, sharey=True, **grid)
    low, top = _limits(curves)
    exact = frame.get(f"linear/{metric.removeprefix('val/')}", np.nan * ends)
    bests = []
    for panel, (name, part) in zip(panels.flat, parts, strict=False):
        bests.append(ends[part.index].groupby(part[axis]).mean().idxmin())
        for value, runs in part.groupby(axis, sort=False):
            _runs_and_mean(panel, curves[runs.index], BEST if value == bests[-1] else colors[value])
        linear = exact[part.index][part[axis] == bests[-1]].mean()
        if linear <= top:
            panel.axhline(linear, color=GREY, ls="--", lw=1.2)
            low = min(low, linear)
        if above := _above(curves[part.index], ends[part.index], linear, top):
            note(panel, "\n".join(above))
        if group:
            named = f"{group} = {plain(name)}" if frames.is_numeric(frame[group]) else name
            panel.set_title(plain_text(f"{named}: best {plain(bests[-1])}"), fontsize="medium")
    for place, panel in enumerate(panels.flat):
        panel.set_visible(place < len(parts))
        panel.tick_params(labelbottom=place >= len(parts) - columns)
    figure.supxlabel("epoch", fontsize="medium")
    figure.supylabel(label(metric), fontsize="medium")
    panels[0, 0].locator_params(axis="x", integer=True)
    panels[0, 0].set_xlim(0.5, max(2, curves.index[-1]) + 0.5)
    margin = 0.05 * (top - low or abs(top) or 1)
    panels[0, 0].set_ylim(low - margin, top + margin)
    names = {"best of the group": (BEST, "-")}
    if len({*bests}) == 1:
        names = {f"best: {plain(bests[0])}": (BEST, "-")}
        colors = {value: color for value, color in colors.items() if value != bests[0]}
    if any(line.get_linestyle() == "--" for panel in panels.flat for line in panel.get_lines()):
        names["linear (exact)"] = (GREY, "--")
    if bar := numeric and len(order) > LISTED:
        _bar(figure, panels, order, label(axis))
    else:
        names |= {plain(value): (color, "-") for value, color in colors.items() if color != FAINT}
        faint = [*colors.values()].count(FAINT)
        names |= {f"{faint} others": (FAINT, "-")} if faint else {}
    for name, (color, style) in names.items():
        panels[0, 0].plot([], [], style, color=color, lw=1.8, label=plain_text(name))
    look = {"loc": "outside upper center", "ncols": 2} if bar else {"loc": "outside right upper"}
    figure.legend(frameon=False, title="" if bar else label(axis), **look)
    return figure


def paths_apart(histories: frames.Frame, frame: frames.Frame) -> Figure:
    """Plot how far KL normalisations are apart at equal decoder variance, epoch by epoch."""
    axis, curves = "decoder_variance", by_epoch(histories, frame)
    frame = frame[frame["run_id"].isin(curves.columns)].set_index("run_id")
    spread = {
        other: curves.T.groupby([frame[axis], frame[key]]).std()
        for other, key in (("modes", "seed"), ("seeds", "kl_normalization"))
    }
    apart = spread["modes"].groupby(axis).mean().T
    if not (apart > 0).any(axis=None):
        return empty_figure("at equal decoder variance and seed the modes are equal at every epoch")
    figure, panel = canvas(9, 5)
    for value, color in _colors([*apart], numeric=True).items():
        positive = apart[value].where(apart[value] > 0)
        panel.plot(apart.index, positive, color=color, label=f"modes, {plain(value)}")
    panel.plot(apart.index, spread["seeds"].median(), color=GREY, ls="--", label="seeds")
    panel.set(xlabel="epoch", ylabel="standard deviation (nats / image)", yscale="log")
    panel.locator_params(axis="x", integer=True)
    figure.legend(loc="outside right upper", frameon=False, title=label(axis))
    return figure


def by_epoch(histories: frames.Frame, frame: frames.Frame) -> frames.Frame:
    """Return the finite values of the runs of a frame: a row an epoch, a column a run."""
    curves = histories.pivot(index="epoch", columns="run_id", values="value")
    curves = curves[curves.columns.intersection(frame["run_id"])]
    curves = curves.where(np.isfinite(curves)).dropna(axis="columns", how="all")
    if "keep" in frame:  # the last value of kept weights is that of an epoch before
        kept = curves.columns.intersection(frame.loc[frame["keep"] == "best", "run_id"])
        curves[kept] = curves[kept].where(curves[kept].bfill().shift(-1).notna())
    return curves.dropna(how="all")


def _limits(curves: frames.Frame) -> tuple[float, float]:
    """Return limits that neither the first epochs nor bad values flatten."""
    low, high = float(curves.min().min()), float(curves.max().max())
    late = curves[curves.index > 0.1 * curves.index.max()]
    top = low + 4 * (float(np.nanmedian(late)) - low)
    return low, top if low < top < high - 0.3 * (top - low) else high


def _above(curves: frames.Frame, ends: Any, linear: float, top: float) -> list[str]:  # noqa: ANN401
    """Return in words what is above the limits."""
    outside, high, found = ends[ends > top], curves.max().max(), []
    if len(outside):
        found.append(f"{len(outside)} of {len(ends)} runs end above, up to {outside.max():,.3g}")
    elif high > top:
        found.append(f"first epochs above, up to {high:,.3g}")
    return [*found, f"linear (exact): {linear:,.3g}, above"] if linear > top else found


def _runs_and_mean(panel: Axes, curves: frames.Frame, color: Any) -> None:  # noqa: ANN401 - of any form
    look = {"color": color, "zorder": 3 if color == BEST else 1 if color == FAINT else 2}
    panel.plot(curves.index, curves, lw=0.7, alpha=0.6, **look)
    mean = curves.mean(axis=1, skipna=False)  # it would jump where a run ends before the others
    panel.plot(curves.index, mean, lw=1.8, **look)
    for run in curves:
        last = curves[run].last_valid_index()
        if last < curves.index[-1] or len(curves) == 1:
            panel.plot(last, curves.loc[last, run], ".", ms=5, **look)


def _colors(values: Sequence[Any], *, numeric: bool) -> dict[Any, Any]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if not numeric and len(values) <= len(NAMES):
        return dict(zip(values, NAMES, strict=False))
    some = values if numeric else values[: LISTED + 1]
    shades = map(to_hex, colormaps["viridis"](np.linspace(0, LIGHTEST, len(some))))
    return dict.fromkeys(values, FAINT) | dict(zip(some, shades, strict=True))


def _bar(figure: Figure, panels: Any, values: Sequence[Any], text: str) -> None:  # noqa: ANN401
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    last = len(values) - 1
    bar = figure.colorbar(ScalarMappable(Normalize(0, last / LIGHTEST), "viridis"), ax=panels)
    some = range(0, len(values), -(-len(values) // 8))
    bar.set_ticks(some, labels=[plain(values[i]) for i in some])
    bar.ax.set_ylim(0, last)
    bar.set_label(text)
