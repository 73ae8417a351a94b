"""Learning curves, of the rows of `Store.histories` as a frame: run_id, epoch and value."""

import numpy as np

from analysis import frames
from analysis.plots.style import (
    COLORS,
    GREY,
    Figure,
    canvas,
    empty_figure,
    label,
    legend,
    note,
    plain_text,
    shades,
    top_of,
)
from analysis.tables import plain

CURVES_CAPTION = (
    "The validation objective by epoch: a thin line a run, with a dot at its end; a thick line the "
    "mean over the seeds of a value. Orange: the value with the lowest mean at the end; dashed, "
    "the exact linear model at that value, on test data."
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
    known = histories[histories["run_id"].isin(frame["run_id"])].astype({"value": float})
    known = known[np.isfinite(known["value"])]
    if known.empty:
        return empty_figure(f"no run has a {metric} by epoch")
    curves = known.pivot(index="epoch", columns="run_id", values="value")
    frame = frame[frame["run_id"].isin(curves.columns)].set_index("run_id")
    linear = frame.get(f"linear/{metric.removeprefix('val/')}", np.nan)
    frame = frame.assign(end=curves.ffill().iloc[-1], linear=linear)
    if "sigma" in frame:  # of a fitted variance it has another one
        frame["linear"] = frame["linear"].where(frame["sigma"] == "fixed")
    parts = [*frame.groupby(group or np.ndim, sort=False)]
    bests = [part.groupby(axis)["end"].mean().idxmin() for _, part in parts]
    at_best = zip(bests, parts, strict=True)
    exact = [part.loc[part[axis] == best, "linear"].mean() for best, (_, part) in at_best]
    values = frame[axis].drop_duplicates()
    colors = shades(values.sort_values() if frames.is_numeric(values) else values)
    rows = -(-len(parts) // 3)
    columns = -(-len(parts) // rows)
    width, height = (4 * columns + 1, 3.4 * rows) if group else (9, 5)
    figure, panels = canvas(width, height, rows, columns, sharey=True, squeeze=False)
    low, top = curves.min().min(), top_of(curves[curves.index > 0.1 * curves.index[-1]].stack())
    for panel, best, linear, (name, part) in zip(panels.flat, bests, exact, parts, strict=False):
        for value, runs in part.groupby(axis, sort=False):
            look = {"color": COLORS[1] if value == best else colors[value]}
            look["zorder"] = 2 + (value == best)
            for run in runs.index:
                thin = {"lw": 0.7, "ms": 5, "markevery": [-1], "alpha": 0.6, **look}
                panel.plot(curves[run].dropna(), ".-", **thin)
            # Over epochs that all have: it would jump where a run ends before the others.
            panel.plot(curves[runs.index].mean(axis=1, skipna=False), lw=1.8, **look)
        if np.isfinite(linear):
            panel.axhline(linear, color=GREY, ls="--", lw=1.2)
            low, top = min(low, linear), max(top, linear)
        if outside := (part["end"] > top).sum():
            note(panel, f"{outside} of {len(part)} runs end above, up to {part['end'].max():,.3g}")
        if group:
            named = f"{group} = {plain(name)}" if frames.is_numeric(part[group]) else name
            pad = 20 if panel.texts else 6  # above a note
            panel.set_title(plain_text(f"{named}: best {plain(best)}"), fontsize="medium", pad=pad)
        panel.set_xlim(0.5, max(2, curves.index[-1]) + 0.5)
        panel.locator_params(axis="x", integer=True)
    for panel in panels.flat[len(parts) :]:
        panel.set_visible(False)
    margin = 0.05 * (top - low or abs(top) or 1)
    panels[0, 0].set_ylim(low - margin, top + margin)
    figure.supxlabel("epoch", fontsize="medium")
    figure.supylabel(label(metric), fontsize="medium")
    named = plain_text("best of the group" if group else f"best: {plain(bests[0])}")
    panels[0, 0].plot([], [], color=COLORS[1], lw=1.8, label=named)
    if np.isfinite(exact).any():
        panels[0, 0].plot([], [], "--", color=GREY, lw=1.2, label="linear (exact)")
    shown = {value: color for value, color in colors.items() if group or value != bests[0]}
    legend(figure, shown, label(axis), "-")
    return figure
