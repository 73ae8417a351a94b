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
    "latent_size": "latent_size",
}
"""Axis labels: vocabulary name and unit."""

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
"""From the colour-blind-safe palette of Okabe and Ito (2008)."""


def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1, **shared: bool
) -> tuple[Figure, Any]:
    """Return an empty figure, size in inches, and its panel, or array of panels."""
    from matplotlib.figure import Figure

    with sns.axes_style("ticks"):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, **shared)


def metrics_along_axis(frame: pd.DataFrame, axis: str) -> Figure:
    """Plot test `neg_elbo`, `mse`, `rate` and `active_units` against the swept setting."""
    figure, panels = canvas(10, 7, rows=2, columns=2, sharex=True)
    for panel, metric in zip(panels.flat, ("neg_elbo", "mse", "rate", "active_units"), strict=True):
        line(panel, frame, axis, metric)
        mark_calibration(panel, frame, axis)
        focus(panel, frame, axis, metric)
    for panel in panels[0]:
        panel.set_xlabel("")
    panels[1, 1].set_ylim(0, frame["latent_size"].max() * 1.05)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    sns.despine(figure)
    return figure


def line(panel: Axes, frame: pd.DataFrame, axis: str, metric: str) -> None:
    """Draw a metric along an axis: mean, interval over seeds, single runs as dots."""
    from analysis import frames

    means = frames.along_axis(frame, axis, [metric])
    x, y, half = means[axis], means[metric], means[f"{metric}±"].fillna(0)
    seeds = f"{int(means['seeds'].max())} seeds"
    panel.fill_between(x, y - half, y + half, color=BLUE, alpha=0.2, lw=0, label="95 % interval")
    panel.plot(x, y, color=BLUE, label=f"mean of {seeds}")
    panel.plot(frame[axis], frame[metric], ".", color=BLUE, ms=4, alpha=0.7)
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


def mark_calibration(panel: Axes, frame: pd.DataFrame, axis: str) -> None:
    """Mark where the mean `calibration_ratio` crosses 1: the weight agrees with the noise left."""
    ratio = frame[frame[axis] > 0].groupby(axis)["calibration_ratio"].mean()
    ratio = ratio[ratio > 0]
    if len(ratio) < 2 or not ratio.min() < 1 < ratio.max():
        return
    crossing = np.exp(np.interp(0, np.log(ratio), np.log(ratio.index.to_numpy(float))))
    panel.axvline(crossing, color=GREY, ls=":", lw=1.2, label="calibration_ratio = 1")


def rate_distortion(frame: pd.DataFrame, axis: str) -> Figure:
    """Plot test distortion against rate, one point a run, with lines of equal `neg_elbo`."""
    figure, panel = canvas(8, 6)
    means = frame.groupby(axis)[["rate", "distortion"]].mean()
    shown = _bounded(frame, axis)
    iso_lines(panel, shown)
    panel.plot(means["rate"], means["distortion"], color=GREY, lw=1, zorder=2)
    colors = sns.color_palette("viridis", len(means))
    for color, value in zip(colors, means.index, strict=True):
        runs, point = frame[frame[axis] == value], means.loc[value]
        panel.plot(runs["rate"], runs["distortion"], ".", color=color, ms=6, zorder=3)
        off = f", rate {point['rate']:.3g}" if value not in set(shown[axis]) else ""
        label = f"{value:.3g}{off}"
        panel.plot(*point, "o", color=color, ms=9, mec="white", zorder=4, label=label)
    panel.set_xlabel(LABELS["rate"])
    panel.set_ylabel(LABELS["distortion"])
    figure.legend(title=LABELS.get(axis, axis), loc="outside right upper", frameon=False)
    sns.despine(figure)
    return figure


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
