"""Figures: a frame of runs in, a matplotlib figure out.

Lines are means over seeds with the interval of `frames.half_width`; dots are single runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lazy_loader
import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A study's page names its figures, and its --help must not wait for seaborn.
sns = lazy_loader.load("seaborn")

LABELS = {
    "neg_elbo": "neg_elbo (nats / image)",
    "distortion": "distortion (nats / image)",
    "rate": "rate (nats / image)",
    "mse": "mse (pixel²)",
    "active_units": "active_units (count)",
    "calibration_ratio": "calibration_ratio",
    "decoder_variance": "decoder_variance (pixel²)",
    "kl_weight": "kl_weight",
    "latent_size": "latent_size (count)",
    "probe_accuracy": "probe_accuracy (share)",
}
"""Axis labels: vocabulary name and unit."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The colour-blind-safe palette of Okabe and Ito (2008), without its yellow."""

GREY = "#666666"

FOUR = ("neg_elbo", "mse", "rate", "active_units")
"""Metrics of the figures along an axis."""


def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1, **shared: bool
) -> tuple[Figure, Any]:
    """Return an empty figure, size in inches, and its panel, or array of panels."""
    from matplotlib.figure import Figure

    with sns.axes_style("ticks"):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, **shared)


def metrics_along_axis(frame: pd.DataFrame, axis: str, group: str = "") -> Figure:
    """Plot test `neg_elbo`, `mse`, `rate` and `active_units` against the swept quantity."""
    figure, panels = canvas(10, 7, rows=2, columns=2, sharex=True)
    for panel, metric in zip(panels.flat, FOUR, strict=True):
        line(panel, frame, axis, metric, group)
        mark_calibration(panel, frame, axis, group)
        focus(panel, frame, axis, metric)
    for panel in panels[0]:
        panel.set_xlabel("")
    panels[1, 1].set_ylim(0, frame["latent_size"].max() * 1.05)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    sns.despine(figure)
    return figure


def line(panel: Axes, frame: pd.DataFrame, axis: str, metric: str, group: str = "") -> None:
    """Draw a metric along an axis, a line a group: mean, interval over seeds, runs as dots."""
    from analysis import frames

    parts = frame.groupby(group, sort=False) if group else [("", frame)]
    for (name, part), color in zip(parts, COLORS, strict=False):
        means = frames.along_axis(part, axis, [metric])
        x, y, half = means[axis], means[metric], means[f"{metric}±"].fillna(0)
        panel.fill_between(x, y - half, y + half, color=color, alpha=0.15, lw=0)
        panel.plot(x, y, color=color, label=name or f"mean of {means['seeds'].max()} seeds, 95 %")
        panel.plot(part[axis], part[metric], ".", color=color, ms=4, alpha=0.7)
    panel.set_xlabel(LABELS.get(axis, axis))
    panel.set_ylabel(LABELS.get(metric, metric))
    scale_axis(panel, frame[axis])


def scale_axis(panel: Axes, values: pd.Series) -> None:
    """Use a logarithmic axis for positive values of more than a decade, with room for 0."""
    positive = values[values > 0]
    if positive.empty or positive.max() / positive.min() <= 10:
        return
    if (values == 0).any():
        panel.set_xscale("symlog", linthresh=positive.min(), linscale=0.4)
        panel.set_xlim(left=-positive.min() * 0.2)
        decades = 10.0 ** np.arange(np.floor(np.log10(positive.min())), np.log10(positive.max()))
        panel.set_xticks([0, *decades, positive.max()])
        panel.minorticks_off()
    else:
        panel.set_xscale("log")


def focus(panel: Axes, frame: pd.DataFrame, axis: str, metric: str) -> None:
    """Keep weight 0, whose rate nothing bounds, from flattening the rest; say where it lies."""
    rest, zero = frame.loc[frame[axis] != 0, metric], frame.loc[frame[axis] == 0, metric]
    if axis != "kl_weight" or zero.empty or rest.empty:
        return
    span = rest.max() - rest.min()
    if zero.mean() > rest.max() + span:
        panel.set_ylim(rest.min() - 0.1 * span, rest.max() + 0.4 * span)
        note = f"kl_weight = 0: {zero.mean():.3g}, above"
        panel.annotate(note, (0.2, 0.97), xycoords="axes fraction", va="top", color=GREY)


def mark_calibration(panel: Axes, frame: pd.DataFrame, axis: str, group: str = "") -> None:
    """Mark where the mean `calibration_ratio` crosses 1: the weight agrees with the noise left."""
    if group:
        return
    ratio = frame[frame[axis] > 0].groupby(axis)["calibration_ratio"].mean()
    ratio = ratio[ratio > 0]
    if len(ratio) < 2 or not ratio.min() < 1 < ratio.max():
        return
    crossing = np.exp(np.interp(0, np.log(ratio), np.log(ratio.index.to_numpy(float))))
    panel.axvline(crossing, color=GREY, ls=":", lw=1.2, label="calibration_ratio = 1")


def metrics_along_latent_size(frame: pd.DataFrame, group: str) -> Figure:
    """Plot the four metrics against the number of latents, with the PCA floor beside the mse."""
    figure = metrics_along_axis(frame, "latent_size", group)
    sizes = sorted(frame["latent_size"].unique())
    floor = frame.groupby("latent_size")["pca_floor"].mean()
    _, mse, _, active = figure.axes
    mse.plot(floor.index, floor, "--", color=GREY, label="PCA floor")
    active.plot(sizes, sizes, "--", color=GREY, lw=1)
    active.annotate("all", (sizes[-1], sizes[-1]), color=GREY, ha="right", va="top")
    for panel in figure.axes:
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [str(size) for size in sizes])
    mse.legend(handles=[mse.get_lines()[-1]], frameon=False)
    return figure


def one_curve(frame: pd.DataFrame) -> Figure:
    """Plot metrics of four KL normalisations: against the weight, and the decoder variance."""
    figure, panels = canvas(10, 13, rows=4, columns=2, sharex="col", sharey="row")
    for row, metric in zip(panels, FOUR, strict=True):
        for panel, axis in zip(row, ("kl_weight", "decoder_variance"), strict=True):
            _overlaid(panel, frame, axis, metric)
            panel.set_xscale("log")
        row[0].set_ylabel(LABELS[metric])
    panels[0, 0].set_title("against the weight the user sets")
    panels[0, 1].set_title("against what the weight means")
    for panel, axis in zip(panels[-1], ("kl_weight", "decoder_variance"), strict=True):
        panel.set_xlabel(LABELS[axis])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    title = "kl_normalization, mean over seeds"
    figure.legend(handles, labels, loc="outside upper center", ncols=4, title=title, frameon=False)
    sns.despine(figure)
    return figure


def _overlaid(panel: Axes, frame: pd.DataFrame, axis: str, metric: str) -> None:
    """Draw a line a mode, each thinner and with another mark, so that equal lines all show."""
    looks = zip(COLORS, (9, 6, 3.5, 1.5), "osD^", (11, 8, 5.5, 3.5), strict=False)
    for (mode, part), (color, width, mark, size) in zip(
        frame.groupby("kl_normalization", sort=False), looks, strict=False
    ):
        means = part.groupby(axis)[metric].mean()
        panel.plot(means.index, means, color=color, lw=width, alpha=0.5, zorder=2)
        panel.plot(means.index, means, mark, color=color, ms=size, label=mode, zorder=3)


def conditions(frame: pd.DataFrame) -> Figure:
    """Plot metrics of named conditions, one a row: mean, interval over seeds, single runs."""
    from analysis import frames

    metrics = ("mse", "neg_elbo", "rate", "active_units", "probe_accuracy")
    names = list(frame["condition"].unique())
    figure, panels = canvas(15, 4, columns=len(metrics), sharey=True)
    for panel, metric in zip(panels, metrics, strict=True):
        means = frames.along_axis(frame, "condition", [metric])
        rows = means["condition"].map(names.index)
        half = means[f"{metric}±"].fillna(0)
        panel.errorbar(means[metric], rows, xerr=half, fmt="o", color=COLORS[0], capsize=3)
        dots = frame["condition"].map(names.index) + 0.22
        panel.plot(frame[metric], dots, ".", color=COLORS[1], ms=4)
        panel.set_xlabel(LABELS[metric])
        panel.grid(axis="y", lw=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    sns.despine(figure, left=True)
    return figure


def class_errors(frame: pd.DataFrame, key: str) -> Figure:
    """Plot the test mse of each class as a heat map, a row for each value of a column."""
    columns = [c for c in frame.columns if c.startswith("mse_class/")]
    table = frame.groupby(key, sort=False)[columns].mean()
    table.columns = [c.removeprefix("mse_class/") for c in columns]
    figure, panel = canvas(10, 0.5 * len(table) + 1.6)
    label = {"label": LABELS["mse"]}
    sns.heatmap(table, ax=panel, cmap="cividis_r", annot=True, fmt=".3f", cbar_kws=label)
    panel.set_xlabel("class")
    panel.set_ylabel("")
    panel.tick_params(axis="y", rotation=0)
    return figure


def latent_scatter(places: pd.DataFrame) -> Figure:
    """Plot where images lie in latent space, a panel a model, coloured by class.

    Args:
        places: columns model, x, y, class; one row per image and model.
    """
    models = list(places["model"].unique())
    columns = min(4, len(models))
    rows = -(-len(models) // columns)
    figure, panels = canvas(3.2 * columns, 3.1 * rows, rows=rows, columns=columns, squeeze=False)
    palette = sns.color_palette("colorblind", places["class"].nunique())
    for panel, model in zip(panels.flat, models, strict=False):
        part = places[places["model"] == model]
        for digit, color in zip(sorted(places["class"].unique()), palette, strict=True):
            here = part[part["class"] == digit]
            panel.plot(here["x"], here["y"], ".", ms=3, color=color, label=str(digit))
        panel.set_title(model, fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
    for panel in panels.flat[len(models) :]:
        panel.set_axis_off()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=10, markerscale=4)
    return figure


def rate_distortion(frame: pd.DataFrame, axis: str, group: str = "") -> Figure:
    """Plot test distortion against rate, one dot a run, with lines of equal `neg_elbo`.

    Args:
        frame: one row per run; runs without a rate are left out.
        axis: column along which means are joined.
        group: column of the lines; without it colours follow the axis.
    """
    figure, panel = canvas(8, 6)
    frame = frame.dropna(subset=["rate"])
    shown = _bounded(frame, axis)
    iso_lines(panel, shown)
    keys = [group, axis] if group else [axis]
    means = frame.groupby(keys, sort=False)[["rate", "distortion"]].mean().reset_index()
    lines = means.groupby(group, sort=False) if group else [("", means)]
    colors = iter(sns.color_palette("viridis", len(means)) if not group else COLORS)
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
                panel.annotate(f"{point[axis]:g}", place, xytext=(5, 4), textcoords="offset points")
    panel.set_xlabel(LABELS["rate"])
    panel.set_ylabel(LABELS["distortion"])
    title = f"{group}; numbers are {axis}" if group else LABELS.get(axis, axis)
    figure.legend(title=title, loc="outside right upper", frameon=False)
    sns.despine(figure)
    return figure


def frontier(frame: pd.DataFrame, group: str) -> Figure:
    """Plot every run of several studies on one rate-distortion plane, coloured by a column."""
    figure, panel = canvas(9, 6)
    iso_lines(panel, frame)
    for (name, part), color, mark in zip(
        frame.groupby(group, sort=False), COLORS, "osD^vP*", strict=False
    ):
        panel.plot(part["rate"], part["distortion"], mark, color=color, ms=5, alpha=0.6, label=name)
    panel.set_xlabel(LABELS["rate"])
    panel.set_ylabel(LABELS["distortion"])
    figure.legend(title=group, loc="outside right upper", frameon=False)
    sns.despine(figure)
    return figure


def _point_label(point: pd.Series, axis: str, shown: pd.DataFrame) -> str:
    off = "" if point[axis] in set(shown[axis]) else f", rate {point['rate']:.3g}"
    return f"{point[axis]:.3g}{off}"


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
