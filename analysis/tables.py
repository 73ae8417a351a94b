"""Tables and values as text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# Decimals of metrics, others have 2; and columns without an interval, since equal for every seed.
DIGITS = {"mse": 4, "mae": 4, "loss": 4, "active_units": 1, "calibration_ratio": 3, "epoch": 1}
SETTINGS = (
    *("kl_weight", "beta", "own_beta", "decoder_variance", "pca_floor"),
    "linear/latents_above_variance",
)


def cells(means: pd.DataFrame) -> pd.DataFrame:
    """Format a frame of `frames.along_axis`: "mean ± half width" where there is an interval."""
    out = {}
    for name in means.columns:
        half = means.get(f"{name}±")
        if name.endswith("±") or name == "seeds":
            continue
        if half is None or name in SETTINGS:
            out[name] = [plain(v) for v in means[name]]
        else:
            places = decimals(name)
            out[name] = [pair(m, h, places) for m, h in zip(means[name], half, strict=True)]
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


def pair(mean: float, half: float, digits: int) -> str:
    """Format a mean and its half width, which is left out where it is NaN."""
    if math.isnan(mean):
        return "-"
    text = f"{mean:.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def plus_minus(row: pd.Series, metric: str) -> str:
    """Write a mean of `frames.along_axis` with its half width, or alone where there is none."""
    return pair(row[metric], row[f"{metric}±"], decimals(metric))


def over(seeds: float) -> str:
    """Return what stands behind "±"."""
    return "one seed" if seeds == 1 else f"95 % intervals over {seeds:.0f} seeds"


def markdown(formatted: pd.DataFrame) -> str:
    """Write formatted cells as a Markdown table."""
    header = "| " + " | ".join(formatted.columns) + " |"
    rule = "|" + " --: |" * len(formatted.columns)
    rows = ["| " + " | ".join(row) + " |" for row in formatted.itertuples(index=False)]
    return "\n".join([header, rule, *rows])
