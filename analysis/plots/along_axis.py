"""Figures of metrics along an axis: lines are means with intervals, dots are single runs."""

from collections.abc import Iterator
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from analysis import frames, tables
from analysis.plots.latents import KL_CAPTION, kl_per_latent
from analysis.plots.planes import rate_distortion
from analysis.plots.style import (
    COLORS,
    GREY,
    LISTED,
    Axes,
    Figure,
    canvas,
    empty_figure,
    empty_panel,
    label,
    note,
    plain_text,
)

FOUR = ("neg_elbo", "mse", "rate", "active_units")

QUALITY_CAPTION = (
    "Left: the rate, and bounds of the mutual information of image and latents; the sampled lower "
    "one cannot exceed the logarithm of the number of images. Right: Frechet distance from the "
    "test images of prior samples and of reconstructions; dotted, of as many training images."
)

HEAT_MAP_CAPTION = (
    "Mean on test data and its 95 % t interval over seeds. Framed: lowest mean on "
    "validation data, of cells with all seeds. A dash: no run has finished."
)


def usual(axis: str, metrics: str, group: str = "") -> dict[str, Any]:
    """Return the figures of a study along an axis, which has groups or not, with their captions.

    `metrics` is the caption of `metrics_along_axis`.
    """
    where = {"axis": axis, "group": group}
    both = {
        "metrics_along_axis": (partial(metrics_along_axis, **where), metrics),
        "rate_distortion": (
            partial(rate_distortion, **where),
            "The rate-distortion plane; along a thin line neg_elbo is constant.",
        ),
    }
    if group:
        return both
    return both | {
        "kl_per_latent": (partial(kl_per_latent, axis=axis), KL_CAPTION),
        "quality_along_axis": (partial(quality_along_axis, axis=axis), QUALITY_CAPTION),
    }


def metrics_along_axis(frame: frames.Frame, axis: str, group: str = "") -> Figure:
    """Plot test `neg_elbo`, `mse`, `rate` and `active_units` against the swept quantity.

    Where not all runs have a `neg_elbo`, `loss` takes its place.
    """
    figure, panels = canvas(10, 7, rows=2, columns=2, sharex=True)
    for panel, metric in zip(panels.flat, (frames.compared(frame), *FOUR[1:]), strict=True):
        if metric not in frame:
            empty_panel(panel, f"no run has a {metric}")
            continue
        _runs_and_means(panel, frame, axis, metric, group)
        _linear_model(panel, frame, axis, metric, group)
        if not group and axis in ("kl_weight", "decoder_variance"):
            _mark_weights(panel, frame, axis)
        _focus(panel, frame, axis, metric)
    for panel in panels[0]:
        panel.set_xlabel("")
    panels[1, 1].set_ylim(0, frame["latent_size"].max() * 1.05)
    _legend(figure)
    return figure


def metrics_along_latent_size(frame: frames.Frame, group: str) -> Figure:
    """Plot the four metrics against the number of latents, with the PCA floor beside the mse."""
    figure = metrics_along_axis(frame, "latent_size", group)
    sizes = sorted(frame["latent_size"].unique())
    _, mse, _, active = figure.axes
    if "pca_floor" in frame:  # absent for large images
        floor = frame.groupby("latent_size")["pca_floor"].mean()
        mse.plot(floor.index, floor, ":", color=GREY, label="PCA floor")
    active.plot(sizes, sizes, "-", color=GREY, lw=0.6)  # all; dashed is the linear model
    for panel in figure.axes:
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [str(size) for size in sizes])
    figure.legends.clear()
    _legend(figure)
    return figure


def quality_along_axis(frame: frames.Frame, axis: str) -> Figure:
    """Plot the information in the latents, and the distance of samples from test images."""
    figure, (left, right) = canvas(10, 4, columns=2)
    information = ("rate", "mutual_information", "mutual_information_lower")
    for panel, metrics in ((left, information), (right, ("frechet", "frechet_reconstructions"))):
        stored = [metric for metric in metrics if metric in frame]  # an older store lacks some
        for metric, color in zip(stored, COLORS, strict=False):
            _mean(panel, frame, axis, metric, color, ".-", metric)
        _scale(panel, frame, axis)
        panel.set_xlabel(label(axis))
        if stored:
            _focus(panel, frame, axis, stored[0])
    if "frechet_floor" in frame:
        floor = frame["frechet_floor"].mean()
        right.axhline(floor, color=GREY, ls=":", lw=1.2, label="frechet_floor")
        right.set_yscale("log")
    left.set_ylabel("nats / image")
    right.set_ylabel(label("frechet"))
    if "frechet" not in frame:
        empty_panel(right, "no Fréchet distances: they need\npictures of two classes")
    for panel in (left, right):
        if panel.get_lines():
            above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.06), "ncols": 3}
            panel.legend(frameon=False, fontsize=9, columnspacing=1, handlelength=1.5, **above)
    return figure


def one_curve(frame: frames.Frame) -> Figure:
    """Plot metrics of four KL normalisations: against the weight, and the decoder variance."""
    figure, panels = canvas(10, 13, rows=4, columns=2, sharex="col", sharey="row")
    axes = ("kl_weight", "decoder_variance")
    for row, metric in zip(panels, FOUR, strict=True):
        for panel, axis in zip(row, axes, strict=True):
            _overlaid(panel, frame, axis, metric)
            panel.set_xscale("log")
        _linear_model(row[1], frame, "decoder_variance", metric)
        row[0].set_ylabel(label(metric))
    panels[0, 0].set_title("against the weight the user sets")
    panels[0, 1].set_title("against what the weight means")
    for panel, axis in zip(panels[-1], axes, strict=True):
        panel.set_xlabel(label(axis))
    handles, labels = panels[0, 1].get_legend_handles_labels()
    title = "kl_normalization, mean over seeds"
    figure.legend(handles, labels, loc="outside upper center", ncols=5, title=title, frameon=False)
    return figure


def conditions(frame: frames.Frame) -> Figure:
    """Plot metrics of named conditions, one a row: mean, interval over seeds, single runs."""
    shown = ("mse", "neg_elbo", "rate", "active_units", "probe_accuracy", "frechet")
    metrics = [metric for metric in shown if metric in frame]
    names = list(frame["condition"].unique())
    columns = -(-len(metrics) // 2)
    figure, panels = canvas(11, 6.5, rows=2, columns=columns, sharey=True, squeeze=False)
    means = frames.along_axis(frame, "condition", metrics)
    for panel, metric in zip(panels.flat, metrics, strict=False):
        bars = frames.bars(means, metric)
        panel.errorbar(means[metric], means.index, xerr=bars, fmt="o", color=COLORS[0], capsize=3)
        dots = frame["condition"].map(names.index) + 0.22
        panel.plot(frame[metric], dots, ".", color=COLORS[1], ms=4)
        panel.set_xlabel(label(metric))
    for panel in panels.flat[len(metrics) :]:
        panel.set_visible(False)
    panels[0, 0].set_yticks(range(len(names)), names)
    panels[0, 0].invert_yaxis()
    return figure


def conventions(frame: frames.Frame, axis: str, likelihood: str) -> Figure:
    """Plot metrics of codebases of one likelihood, a numbered mark each, against their weight.

    The weight is the decoder variance or the scale that it means, or else beta; vertical lines are
    95 % intervals over seeds. Dotted: every value whose name begins with "calibrated".
    """
    x = {"gaussian": "decoder_variance", "laplace": "laplace_scale"}.get(likelihood, "beta")
    part = frame[frame["likelihood"] == likelihood]
    if part.empty:
        return empty_figure("no convention of this error")
    if x == "laplace_scale":  # a learned one is near its best value
        fitted = part["calibration_ratio"] * part["mae"]
        part = part.assign(**{x: part.get(x, fitted).fillna(fitted)})
    shown = ("val/neg_elbo", *FOUR[1:])
    metrics = [metric for metric in shown if metric in part and part[metric].notna().any()]
    means = frames.along_axis(part, axis, [x, *metrics]).sort_values(x, ignore_index=True)
    rows = len(metrics) // 4 + 1
    columns = -(-len(metrics) // rows)
    figure, panels = canvas(13, 3.5 * rows, rows=rows, columns=columns, squeeze=False)
    for panel, metric in zip(panels.flat, metrics, strict=True):
        bars = frames.bars(means, metric)
        for (place, row), color in zip(means.iterrows(), cycle(COLORS), strict=False):
            at, bar = (row[x], row[metric]), bars[:, [place]]
            name = f"{place + 1}  {plain_text(str(row[axis]))}"
            panel.errorbar(*at, yerr=bar, fmt="o", color=color, ms=5, capsize=2, label=name)
            if np.isfinite(at).all():
                look = {"xytext": (4, 3 + 9 * (place % 3)), "textcoords": "offset points"}
                panel.annotate(str(place + 1), at, color=color, fontsize=8, **look)
        linear = f"linear/{metric.removeprefix('val/')}"
        fixed = part[part["sigma"] == "fixed"].sort_values(x)
        _linear_model(panel, fixed, x, metric.removeprefix("val/"))
        for value in means.loc[means[axis].str.startswith("calibrated"), x]:
            panel.axvline(value, color=GREY, ls=":", lw=1.2, label="calibrated weight")
        values = part[[metric, linear]].to_numpy() if linear in part else part[metric]
        low, high = np.nanmin(values), np.nanmax(values)
        span = max(high - low, 1e-9)
        panel.set_ylim(low - 0.08 * span, high + 0.2 * span)
        panel.set(xlabel=label(x), ylabel=label(metric), xscale="log")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def class_errors(frame: frames.Frame, key: str) -> Figure:
    """Plot the test mse of each class as a heat map, a row for each value of a column."""
    import seaborn as sns

    columns = [c for c in frame.columns if c.startswith("mse_class/")]
    table = frame.groupby(key, sort=False)[columns].mean()
    names = frames.class_names(frame)
    numbers = [int(c.removeprefix("mse_class/")) for c in columns]
    table.columns = [plain_text(names.get(number, str(number))) for number in numbers]
    figure, panel = canvas(10, 0.5 * len(table) + 1.6)
    if not columns:
        empty_panel(panel, "images without labels")
        return figure
    bar = {"label": label("mse")}
    sns.heatmap(table, ax=panel, cmap="cividis_r", annot=True, fmt=".3f", cbar_kws=bar)
    panel.set(xlabel="class", ylabel="")
    panel.tick_params(axis="y", rotation=0)
    return figure


def heat_map(frame: frames.Frame, rows: str, columns: str) -> Figure:
    """Plot the test metric of two axes' combinations: mean and interval over seeds in each cell.

    The metric is `neg_elbo`, or `loss` where not all runs have it. The cell with the lowest mean on
    validation data is framed; one without a finished run has a dash.
    """
    import seaborn as sns

    metric, keys = frames.compared(frame), [rows, columns]
    means = frames.along_axis(frame, keys, [metric])
    means["text"] = tables.cells(means)[metric].str.replace(r" (?=± |\()", "\n", regex=True)
    down, across = (frames.along_axis(frame, key, [])[key].tolist() for key in keys)
    cells = means.pivot(index=rows, columns=columns)
    values, texts = (cells[name].reindex(down, columns=across) for name in (metric, "text"))
    low, middle, high = means[metric].quantile([0, 0.5, 1])
    top = min(high, low + 3 * (middle - low))  # a cell far off would flatten all others
    figure, panel = canvas(0.9 * len(across) + 2.5, max(2.5, 0.55 * len(down) + 1.2))
    ticks = {"xticklabels": [*map(tables.plain, across)]}
    ticks["yticklabels"] = [*map(tables.plain, down)]
    bar = {"label": label(metric), "extend": "max" if top < high else "neither"}
    look = {"cmap": "cividis_r", "vmin": low, "vmax": top, "linewidths": 0.5, "cbar_kws": bar}
    sns.heatmap(values, ax=panel, annot=texts, fmt="", annot_kws={"fontsize": 9}, **ticks, **look)
    for i, j in np.argwhere(values.isna().to_numpy()):
        panel.text(j + 0.5, i + 0.5, "–", ha="center", va="center", color=GREY)
    best = frames.best_value(frames.complete(frame, keys), keys)
    i, j = down.index(best[0]), across.index(best[1])
    border = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) + (j, i)
    panel.plot(*border.T, color=COLORS[1], lw=3, clip_on=False, zorder=3)
    panel.set(xlabel=label(columns), ylabel=label(rows))
    panel.tick_params(axis="y", rotation=0)
    return figure


def _mean(
    panel: Axes, frame: frames.Frame, axis: str, metric: str, color: str, style: str, name: str
) -> None:
    means = frames.along_axis(frame, axis, [metric])
    x, y, (low, high) = means[axis], means[metric], frames.interval(means, metric)
    panel.fill_between(x, low.fillna(y), high.fillna(y), color=color, alpha=0.15, lw=0)
    panel.plot(x, y, style, color=color, label=name)


def _legend(figure: Figure) -> None:
    named = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in figure.axes]
    handles = {text: handle for pairs in named for handle, text in pairs}
    figure.legend(
        [*handles.values()], [*handles], loc="outside upper center", ncols=5, frameon=False
    )


def _parts(frame: frames.Frame, group: str) -> Iterator[tuple[str, frames.Frame, str]]:
    """Yield name, runs and colour of each group; without groups, of all runs."""
    parts = frame.groupby(group, sort=False) if group else [("", frame)]
    for (name, part), color in zip(parts, cycle(COLORS), strict=False):
        number = group and frames.is_numeric(part[group])
        yield f"{group} = {tables.plain(name)}" if number else name, part, color


def _runs_and_means(panel: Axes, frame: frames.Frame, axis: str, metric: str, group: str) -> None:
    for name, part, color in _parts(frame, group):
        seeds = part.groupby(axis).size().max()
        mean = f"mean of {seeds} seeds{' only' if seeds == 2 else ''}, 95 %"
        mean = "one seed" if seeds == 1 else mean
        _mean(panel, part, axis, metric, color, "-", name or mean)
        panel.plot(part[axis], part[metric], ".", color=color, ms=4, alpha=0.7)
    panel.set(xlabel=label(axis), ylabel=label(metric))
    _scale(panel, frame, axis)


def _linear_model(
    panel: Axes, frame: frames.Frame, axis: str, metric: str, group: str = ""
) -> None:
    """Draw the metric of the exact linear model, which some stores lack, as a dashed line."""
    column = f"linear/{metric}"
    if column not in frame or frame[column].isna().all():
        return
    for _, part, color in _parts(frame, group):
        means = part.groupby(axis, sort=frames.is_numeric(part[axis]))[column].mean()
        panel.plot(means.index, means, color=color if group else GREY, ls="--", lw=1.2, alpha=0.9)
    panel.plot([], [], color=GREY, ls="--", lw=1.2, label="linear (exact)")


def _mark_weights(panel: Axes, frame: frames.Frame, axis: str) -> None:
    """Mark where the mean `calibration_ratio` crosses 1, and where the linear model collapses."""
    ratio = frame[frame[axis] > 0].groupby(axis)["calibration_ratio"].mean()
    ratio = ratio[ratio > 0]
    if ratio.min() < 1 < ratio.max():  # not of an empty one
        crossing = np.exp(np.interp(0, np.log(ratio), np.log(ratio.index.to_numpy(float))))
        panel.axvline(crossing, color=GREY, ls=":", lw=1.2, label="calibration_ratio = 1")
    weight = frames.collapse_value(frame, axis)
    if weight is not None and weight < frame[axis].max():
        panel.axvline(weight, color=GREY, ls="-.", lw=1.2, label="linear model collapses")


def _scale(panel: Axes, frame: frames.Frame, axis: str) -> None:
    """Use a logarithmic axis for positive numbers of more than a decade, with room for 0."""
    values = frame[axis]
    positive = values[values > 0] if frames.is_numeric(values) else values[:0]
    if positive.empty or positive.max() / positive.min() <= 10:
        return
    panel.set_xscale("log")
    if (values == 0).any():
        panel.set_xscale("symlog", linthresh=positive.min(), linscale=0.4)
        panel.set_xlim(left=-positive.min() * 0.2)
    if len(marks := values.unique()) <= LISTED:
        panel.set_xticks(marks, [*map(tables.plain, marks)])
        panel.minorticks_off()


def _focus(panel: Axes, frame: frames.Frame, axis: str, metric: str) -> None:
    """Leave weight 0, whose rate nothing bounds, outside limits if it would flatten the rest."""
    rest, zero = frame.loc[frame[axis] != 0, metric], frame.loc[frame[axis] == 0, metric]
    if axis != "kl_weight" or zero.empty or rest.empty:
        return
    span = rest.max() - rest.min()
    if span and zero.mean() > rest.max() + span:
        panel.set_ylim(rest.min() - 0.1 * span, rest.max() + 0.4 * span)
        note(panel, f"kl_weight = 0: {zero.mean():.3g}, above")


def _overlaid(panel: Axes, frame: frames.Frame, axis: str, metric: str) -> None:
    """Draw a line a mode, each thinner and with another mark, so that equal lines all show."""
    looks = zip(COLORS, (9, 6, 3.5, 1.5), "osD^", (11, 8, 5.5, 3.5), strict=False)
    for (mode, part), (color, width, mark, size) in zip(
        frame.groupby("kl_normalization", sort=False), looks, strict=False
    ):
        means = part.groupby(axis)[metric].mean()
        panel.plot(means.index, means, color=color, lw=width, alpha=0.5, zorder=2)
        panel.plot(means.index, means, mark, color=color, ms=size, label=mode, zorder=3)
