"""Figures: a frame of runs in, a matplotlib figure out.

Lines are means over seeds with the interval of `frames.half_width`; dots are single runs.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    "knn_accuracy": "knn_accuracy (share)",
    "frechet": "frechet (variance of a feature)",
    "neg_log_likelihood": "neg_log_likelihood (nats / image)",
    "gap_to_linear": "gap_to_linear (%)",
}
"""Axis labels: vocabulary name and unit."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The colour-blind-safe palette of Okabe and Ito (2008), without its yellow."""

GREY = "#666666"

FOUR = ("neg_elbo", "mse", "rate", "active_units")
"""Metrics of the figures along an axis."""


def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1, **shared: Any
) -> tuple[Figure, Any]:
    """Return an empty figure, size in inches, and its panel, or array of panels."""
    import seaborn as sns  # not above: a study's page names its figures, and --help is not to wait
    from matplotlib.figure import Figure

    with sns.axes_style("ticks"):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, **shared)


def despine(figure: Figure, *, left: bool = False) -> None:
    """Remove the lines above and to the right of every panel, and those to the left if asked."""
    import seaborn as sns

    sns.despine(figure, left=left)


def plain_text(text: str) -> str:
    """Return a text that matplotlib shows as it is: "$" would begin a formula."""
    return text.replace("$", r"\$")


def say_nothing(panel: Axes, reason: str) -> None:
    """Leave a panel empty, and say why."""
    panel.set_axis_off()
    panel.text(0.5, 0.5, reason, ha="center", va="center", color=GREY, transform=panel.transAxes)


def metrics_along_axis(frame: pd.DataFrame, axis: str, group: str = "") -> Figure:
    """Plot test `neg_elbo`, `mse`, `rate` and `active_units` against the swept quantity."""
    figure, panels = canvas(10, 7, rows=2, columns=2, sharex=True)
    for panel, metric in zip(panels.flat, FOUR, strict=True):
        line(panel, frame, axis, metric, group)
        linear_line(panel, frame, axis, metric, group)
        mark_calibration(panel, frame, axis, group)
        mark_collapse(panel, frame, axis, group)
        focus(panel, frame, axis, metric)
    for panel in panels[0]:
        panel.set_xlabel("")
    panels[1, 1].set_ylim(0, frame["latent_size"].max() * 1.05)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    despine(figure)
    return figure


def line(panel: Axes, frame: pd.DataFrame, axis: str, metric: str, group: str = "") -> None:
    """Draw a metric along an axis, a line a group: mean, interval over seeds, runs as dots."""
    from analysis import frames

    parts = frame.groupby(group, sort=False) if group else [("", frame)]
    for (name, part), color in zip(parts, cycle(COLORS), strict=False):
        means = frames.along_axis(part, axis, [metric])
        x, y, half = means[axis], means[metric], means[f"{metric}±"].fillna(0)
        panel.fill_between(x, y - half, y + half, color=color, alpha=0.15, lw=0)
        seeds = means["seeds"].max()
        mean = "one seed" if seeds == 1 else f"mean of {seeds} seeds, 95 %"
        panel.plot(x, y, color=color, label=name or mean)
        panel.plot(part[axis], part[metric], ".", color=color, ms=4, alpha=0.7)
    panel.set_xlabel(LABELS.get(axis, axis))
    panel.set_ylabel(LABELS.get(metric, metric))
    scale_axis(panel, frame[axis])


def linear_line(panel: Axes, frame: pd.DataFrame, axis: str, metric: str, group: str = "") -> None:
    """Draw the exact linear model's metric, dashed, a line a group; stores without it have none."""
    column = f"linear/{metric}"
    if column not in frame or frame[column].isna().all():
        return
    parts = frame.groupby(group, sort=False) if group else [("", frame)]
    for (_, part), color in zip(parts, cycle(COLORS if group else (GREY,)), strict=False):
        means = part.groupby(axis, sort=_is_numeric(part[axis]))[column].mean()
        panel.plot(means.index, means, color=color, ls="--", lw=1.2, alpha=0.9)
    panel.plot([], [], color=GREY, ls="--", lw=1.2, label="linear (exact)")


def mark_collapse(panel: Axes, frame: pd.DataFrame, axis: str, group: str = "") -> None:
    """Mark the weight from which on the exact linear model has no active latent."""
    from analysis import frames

    knob = None if group else frames.collapse_value(frame, axis)
    if knob is not None and knob < frame[axis].max():
        panel.axvline(knob, color=GREY, ls="-.", lw=1.2, label="linear model collapses")


def scale_axis(panel: Axes, values: pd.Series) -> None:
    """Use a logarithmic axis for positive values of more than a decade, with room for 0.

    Names, such as those of models, have their places already.
    """
    if not _is_numeric(values):
        return
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


def _is_numeric(values: pd.Series) -> bool:
    return values.dtype.kind in "iuf"


def said(value: object) -> str:
    """Return a value of an axis as figures say it: three digits, whole numbers all of theirs."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:g}" if value.is_integer() else f"{value:.3g}"


def focus(panel: Axes, frame: pd.DataFrame, axis: str, metric: str) -> None:
    """Keep weight 0, whose rate nothing bounds, from flattening the rest; say where it lies."""
    if axis != "kl_weight":
        return
    rest, zero = frame.loc[frame[axis] != 0, metric], frame.loc[frame[axis] == 0, metric]
    if zero.empty or rest.empty:
        return
    span = rest.max() - rest.min()
    if zero.mean() > rest.max() + span:
        panel.set_ylim(rest.min() - 0.1 * span, rest.max() + 0.4 * span)
        panel.annotate(
            f"kl_weight = 0: {zero.mean():.3g}, above",
            (0.2, 0.97),
            xycoords="axes fraction",
            va="top",
            color=GREY,
            bbox={"fc": "white", "ec": "none", "pad": 1},  # over lines
        )


def mark_calibration(panel: Axes, frame: pd.DataFrame, axis: str, group: str = "") -> None:
    """Mark where the mean `calibration_ratio` crosses 1: the weight agrees with the noise left.

    Along other axes than a weight's the ratio need not rise, and its crossing means nothing.
    """
    if group or axis not in ("kl_weight", "decoder_variance"):
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
    _, mse, _, active = figure.axes
    if "pca_floor" in frame:  # not of large images
        floor = frame.groupby("latent_size")["pca_floor"].mean()
        mse.plot(floor.index, floor, ":", color=GREY, label="PCA floor")
    active.plot(sizes, sizes, "-", color=GREY, lw=0.6)  # dashed is the linear model
    active.annotate(
        "all",
        (sizes[-1], sizes[-1]),
        xytext=(-10, -2),
        textcoords="offset points",
        color=GREY,
        ha="right",
    )
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
        linear_line(row[1], frame, "decoder_variance", metric)
        row[0].set_ylabel(LABELS[metric])
    panels[0, 0].set_title("against the weight the user sets")
    panels[0, 1].set_title("against what the weight means")
    for panel, axis in zip(panels[-1], ("kl_weight", "decoder_variance"), strict=True):
        panel.set_xlabel(LABELS[axis])
    handles, labels = panels[0, 1].get_legend_handles_labels()
    title = "kl_normalization, mean over seeds"
    figure.legend(handles, labels, loc="outside upper center", ncols=5, title=title, frameon=False)
    despine(figure)
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

    shown = ("mse", "neg_elbo", "rate", "active_units", "probe_accuracy", "frechet")
    metrics = [metric for metric in shown if metric in frame]
    names = list(frame["condition"].unique())
    figure, panels = canvas(3 * len(metrics), 4, columns=len(metrics), sharey=True)
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
    despine(figure, left=True)
    return figure


def class_errors(frame: pd.DataFrame, key: str) -> Figure:
    """Plot the test mse of each class as a heat map, a row for each value of a column."""
    import seaborn as sns

    from analysis import frames

    columns = [c for c in frame.columns if c.startswith("mse_class/")]
    table = frame.groupby(key, sort=False)[columns].mean()
    names = frames.class_names(frame)
    numbers = [int(c.removeprefix("mse_class/")) for c in columns]
    table.columns = [plain_text(names.get(number, str(number))) for number in numbers]
    figure, panel = canvas(10, 0.5 * len(table) + 1.6)
    if not columns:
        say_nothing(panel, "images without labels")
        return figure
    label = {"label": LABELS["mse"]}
    sns.heatmap(table, ax=panel, cmap="cividis_r", annot=True, fmt=".3f", cbar_kws=label)
    panel.set_xlabel("class")
    panel.set_ylabel("")
    panel.tick_params(axis="y", rotation=0)
    return figure
