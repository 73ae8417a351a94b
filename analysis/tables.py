"""Tables and values as text."""

from __future__ import annotations

import html
import math
import re
from typing import TYPE_CHECKING

from analysis import frames
from harness.errors import printable

if TYPE_CHECKING:
    import pandas as pd

# Decimals of metrics, others have 2; and columns without an interval, since equal for every seed.
DIGITS = {"mse": 4, "mae": 4, "loss": 4, "active_units": 1, "calibration_ratio": 3, "epoch": 1}
SETTINGS = (
    *("kl_weight", "beta", "own_beta", "decoder_variance", "pca_floor"),
    "linear/latents_above_variance",
)


def cells(means: pd.DataFrame) -> pd.DataFrame:
    """Format a frame of `frames.along_axis`, means with their intervals as `plus_minus` does."""
    out = {}
    for name in means.columns:
        if name.endswith("±") or name == "seeds":
            continue
        if f"{name}±" not in means or name in SETTINGS:
            out[name] = [plain(v) for v in means[name]]
        else:
            ends = zip(*frames.interval(means, name), strict=True)
            parts = zip(means[name], means[f"{name}±"], ends, strict=True)
            out[name] = [pair(*part, decimals(name)) for part in parts]
    return means[[*out]].assign(**out)


def decimals(metric: str) -> int:
    """Return the decimals of a metric, whatever its prefix."""
    return DIGITS.get(metric.rpartition("/")[2], 2)


def plain(value: object, digits: int = 3) -> str:
    """Format a setting: a fraction in so many digits, whole numbers in all theirs, "-" for NaN."""
    if isinstance(value, list | tuple):
        return ", ".join(plain(item, digits) for item in value)
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    return f"{value:g}" if value.is_integer() else f"{value:.{digits}g}"


def pair(mean: float, half: float, ends: tuple[float, float], digits: int) -> str:
    """Format a mean with its interval: "mean ± half", or "mean (low to high)" where it is cut off.

    A mean alone has no interval: its half width is NaN.
    """
    if math.isnan(mean):
        return "-"
    text = f"{mean:.{digits}f}"
    if math.isnan(half):
        return text
    whole = f"{text} ± {half:.{digits}f}"
    low, high = ends
    cut = low > mean - half or high < mean + half
    return f"{text} ({low:.{digits}f} to {high:.{digits}f})" if cut else whole


def plus_minus(row: pd.Series, metric: str) -> str:
    """Write a mean of `frames.along_axis` with its interval, or alone where there is none."""
    (low,), (high,) = frames.interval(row.to_frame().T, metric)
    return pair(row[metric], row[f"{metric}±"], (low, high), decimals(metric))


def over(seeds: float) -> str:
    """Return what stands behind an interval; two seeds are marked, since theirs says little."""
    if seeds == 1:
        return "one seed"
    return f"95 % intervals over {seeds:.0f} seeds{' only' if seeds == 2 else ''}"


def markdown(formatted: pd.DataFrame) -> str:
    """Write formatted cells as a Markdown table."""
    rule = ["--:"] * len(formatted.columns)
    rows = [map(unmarked, row) for row in (formatted.columns, *formatted.itertuples(index=False))]
    return "\n".join(
        f"| {' | '.join(row)} |".replace("\n", " ") for row in (rows[0], rule, *rows[1:])
    )


def unmarked(text: str) -> str:
    """Return a text that Markdown shows unchanged, without links, HTML and cells."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(printable(text), quote=False))
