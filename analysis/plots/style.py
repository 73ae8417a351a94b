"""Labels, colours and empty figures that all figures share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.tables import plain
from harness.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:
    Axes = Figure = Any  # for annotations: --help does not wait for matplotlib

UNITS = {
    **dict.fromkeys(("neg_elbo", "neg_log_likelihood", "distortion", "rate"), "nats / image"),
    **dict.fromkeys(("neg_elbo_se", "neg_elbo_refitted", "amortization_gap"), "nats / image"),
    **dict.fromkeys(("neg_log_likelihood_se", "neg_log_likelihood_slack"), "nats / image"),
    **dict.fromkeys(("mse", "decoder_variance"), "pixel²"),
    **dict.fromkeys(("mae", "laplace_scale"), "pixel"),
    **dict.fromkeys(("active_units", "latent_size", "effective_samples"), "count"),
    **dict.fromkeys(("probe_accuracy", "knn_accuracy"), "share"),
    "frechet": "variance of a feature",
    "free_bits": "nats",
    "gap_to_linear": "%",
    "kl_warmup_epochs": "epochs",
}

# What is said of images, and of the rows and standardised columns of a table.
OF_TABLES = {
    **{"pixel²": "std²", "nats / image": "nats / row", "image and": "row and"},
    **{f"{part} images": f"{part} rows" for part in ("test", "training", "of", "the")},
    "images without": "rows without",
}

# The colour-blind-safe palette of Okabe and Ito (2008), without its yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#666666"
LISTED = 9  # values in a legend; more have a colour bar


def label(name: str) -> str:
    """Return the label of a setting or metric: its name, and its unit if it has one."""
    unit = UNITS.get(name.rpartition("/")[2])
    return f"{name} ({unit})" if unit else name


def of_a_table(text: str) -> str:
    """Return a text about images as one about the rows and columns of a table."""
    for phrase, other in OF_TABLES.items():
        text = text.replace(phrase, other)
    return text


def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1, **shared: Any
) -> tuple[Figure, Any]:
    """Return an empty figure, size in inches, and its panel, or array of panels."""
    import seaborn as sns  # not at the top: --help would wait for it
    from matplotlib.figure import Figure

    open_above = {"axes.spines.top": False, "axes.spines.right": False}
    with sns.axes_style("ticks", open_above):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, **shared)


def plain_text(value: Any) -> Any:  # noqa: ANN401 - a cell of a frame
    """Return a text that matplotlib shows unchanged, or any other value: "$" begins a formula."""
    return re.sub(r"(?<!\\)\$", r"\$", printable(value)) if isinstance(value, str) else value


def shades(values: Iterable[Any]) -> dict[Any, Any]:
    """Return a colour for each value, from dark to light in their order."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    values = [*values]  # not to the end of viridis, which is too light for a line
    places = np.linspace(0, 0.92, len(values))
    return dict(zip(values, map(to_hex, colormaps["viridis"](places)), strict=True))


def legend(figure: Figure, colors: Mapping[Any, Any], title: str, mark: str) -> None:
    """Show the colours of values, beside what is labelled: more than nine in a colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    if len(colors) <= LISTED:
        for value, color in colors.items():
            figure.axes[0].plot([], [], mark, color=color, label=plain_text(plain(value)))
        figure.legend(title=title, loc="outside right upper", frameon=False)
        return
    norm = BoundaryNorm(np.arange(len(colors) + 1) - 0.5, len(colors))
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap([*colors.values()])), ax=figure.axes)
    some = range(0, len(colors), -(-len(colors) // LISTED))
    bar.set_ticks(some, labels=[plain_text(plain([*colors][i])) for i in some])
    bar.ax.minorticks_off()
    bar.set_label(title)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)


def top_of(values: Any) -> float:  # noqa: ANN401 - numbers
    """Return the highest value to show: at most 2.5 times as far from the lowest as the median."""
    low, middle, high = np.nanquantile(values, [0, 0.5, 1])
    top = low + 2.5 * (middle - low)
    return float(top if low < top < high - 0.2 * (top - low) else high)


def note(panel: Axes, text: str) -> None:
    """Write a text above the right end of a panel, where no line crosses it."""
    look: dict[str, Any] = {"ha": "right", "va": "bottom", "color": GREY}
    panel.text(1, 1.01, text, transform=panel.transAxes, **look)


def empty_figure(reason: str) -> Figure:
    """Return a figure of a reason alone."""
    figure, panel = canvas(8, 1)
    empty_panel(panel, reason)
    return figure


def empty_panel(panel: Axes, reason: str) -> None:
    """Show a reason in place of a panel's axes."""
    panel.set_axis_off()
    panel.text(0.5, 0.5, reason, ha="center", va="center", color=GREY, transform=panel.transAxes)
