"""Tables and values as text."""

from __future__ import annotations

import html
import math
import re
from typing import TYPE_CHECKING

from analysis import frames
from harness.errors import listed, printable

if TYPE_CHECKING:
    import pandas as pd

# Decimals of metrics, others have 2; and columns without an interval, since equal for every seed.
DIGITS = {"mse": 4, "mae": 4, "loss": 4, "active_units": 1, "calibration_ratio": 3, "epoch": 1}
SETTINGS = (
    *("kl_weight", "beta", "own_beta", "decoder_variance", "pca_floor"),
    "linear/latents_above_variance",
)


def cells(means: pd.DataFrame) -> pd.DataFrame:
    """Format a frame of `frames.along_axis`, means with their intervals."""
    names = [name for name in means if not name.endswith("±") and name != "seeds"]
    alone = {name for name in names if f"{name}±" not in means or name in SETTINGS}
    texts = {n: [*map(plain, means[n])] if n in alone else _with_intervals(means, n) for n in names}
    return means[names].assign(**texts)


def decimals(metric: str) -> int:
    """Return the decimals of a metric, whatever its prefix."""
    return DIGITS.get(metric.rpartition("/")[2], 2)


def plain(value: object, digits: int = 3) -> str:
    """Format a setting: a fraction in so many digits, whole numbers in all theirs, "-" for NaN."""
    if isinstance(value, list | tuple):
        return listed(plain(item, digits) for item in value)
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    return f"{value:g}" if value.is_integer() else f"{value:.{digits}g}"


def _with_intervals(means: pd.DataFrame, metric: str) -> list[str]:
    texts, columns = [], (means[metric], means[f"{metric}±"], *frames.interval(means, metric))
    for mean, half, low, high in zip(*columns, strict=True):
        text, whole, *ends = (f"{value:.{decimals(metric)}f}" for value in (mean, half, low, high))
        if not math.isnan(half):
            cut = low > mean - half or high < mean + half
            text += f" ({ends[0]} to {ends[1]})" if cut else f" ± {whole}"
        texts.append("-" if math.isnan(mean) else text)
    return texts


def plus_minus(row: pd.Series, metric: str) -> str:
    """Write a mean of `frames.along_axis` with its interval, as "mean ± half".

    It is "mean (low to high)" where the interval is cut off, and the mean alone without one.
    """
    return _with_intervals(row.to_frame().T, metric)[0]


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
