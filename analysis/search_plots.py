"""Figures of a search: a frame of trials in, a matplotlib figure out.

The frame is that of `search_frames.by_trial`, with a column `front` for the Pareto front.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.plots import COLORS, GREY, LABELS, canvas, despine

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

OBJECTIVE = "val/neg_elbo"

UNITS = LABELS | {
    "learning_rate": "learning_rate",
    "kl_warmup_epochs": "kl_warmup_epochs (epochs)",
    "kl_normalization": "kl_normalization",
    "kl_cycles": "kl_cycles",
    "free_bits": "free_bits (nats)",
    "sigma": "sigma",
    "val/neg_elbo": "val/neg_elbo (nats / image)",
    "val/mse": "val/mse (pixel²)",
    "val/rate": "val/rate (nats / image)",
}

LOGARITHMIC = ("kl_weight", "decoder_variance", "learning_rate")

PANELS = (
    "kl_weight",
    "kl_normalization",
    "decoder_variance",
    "latent_size",
    "learning_rate",
    "kl_warmup_epochs",
    "kl_cycles",
    "free_bits",
    "sigma",
)
"""What a search may have tried, in the order of the figure's panels."""

WHOLE = ("kl_warmup_epochs", "kl_cycles")
CATEGORIES = ("kl_normalization", "sigma")

NAMES = {
    "kl_weight": "weight",
    "kl_normalization": "normalisation",
    "latent_size": "latents",
    "learning_rate": "learning rate",
    "kl_warmup_epochs": "warm-up",
}
"""Settings that stand beside a front, where they were searched."""

NAMED = 14
"""Most points of a front that are numbered."""


def history(trials: pd.DataFrame) -> Figure:
    """Plot each trial's objective in the order asked, and the best finished one so far."""
    figure, panel = canvas(9, 5)
    done = trials[~trials["pruned"]]
    cut = trials[trials["pruned"]]
    panel.plot(done["trial"], done[OBJECTIVE], "o", color=COLORS[0], ms=6, label="finished")
    panel.plot(cut["trial"], cut[OBJECTIVE], "x", color=COLORS[1], ms=6, label="pruned")
    best = done[OBJECTIVE].cummin()
    panel.step(done["trial"], best, where="post", color=GREY, label="best so far")
    _bound(panel, trials)
    panel.set_xlabel("trial")
    panel.set_ylabel(UNITS[OBJECTIVE])
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    despine(figure)
    return figure


def _bound(panel: Axes, trials: pd.DataFrame) -> None:
    """Keep hopeless trials from flattening the rest: those above are counted, not shown."""
    values = trials[OBJECTIVE]
    low, middle = values.min(), values.median()
    span = 2.5 * max(middle - low, 1e-9)
    top = low + 1.05 * span
    if values.max() <= top + 0.2 * span:
        return
    panel.set_ylim(low - 0.05 * span, top)
    above = int((values > top).sum())
    said = f"{above} above, up to {values.max():,.0f}"
    panel.annotate(said, (0.99, 0.99), xycoords="axes fraction", ha="right", va="top", color=GREY)


def parameters(trials: pd.DataFrame) -> Figure:
    """Plot the objective against each setting; later trials are darker, pruned ones crosses."""
    settings = [name for name in PANELS if name in trials and trials[name].notna().any()]
    rows = -(-len(settings) // 3)
    figure, panels = canvas(13, 3.75 * rows, rows=rows, columns=3, sharey=True)
    for panel, setting in zip(panels.flat, settings, strict=False):
        dots = _against(panel, trials, setting)
        panel.set_xlabel(UNITS[setting])
    for panel in panels.flat[len(settings) :]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel(UNITS[OBJECTIVE])
    _bound(panels[0, -1], trials)
    figure.colorbar(dots, ax=panels, label="trial", shrink=0.7)
    panels[0, 0].plot([], [], "o", color=GREY, label="finished")
    panels[0, 0].plot([], [], "x", color=GREY, label="pruned")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    despine(figure)
    return figure


def _against(panel: Axes, trials: pd.DataFrame, setting: str) -> ScalarMappable:
    x = trials[setting]
    if setting in CATEGORIES:
        modes = sorted(x.unique())
        # Side by side within a mode, in the order asked.
        places = x.map(modes.index) + 0.5 * (trials["trial"] / max(1, trials["trial"].max()) - 0.5)
        panel.set_xticks(range(len(modes)), modes)
        x = places
    elif setting in LOGARITHMIC:
        panel.set_xscale("log")
    elif setting in WHOLE:
        panel.locator_params(axis="x", integer=True)
    elif setting == "latent_size":
        panel.set_xscale("log", base=2)
        sizes = [2**i for i in range(11) if x.min() <= 2**i <= x.max()]
        panel.set_xticks(sizes, [str(size) for size in sizes])
    look = {"cmap": "cividis_r", "vmin": 0, "vmax": max(1, trials["trial"].max())}
    for pruned, mark in ((True, "x"), (False, "o")):
        rows = trials["pruned"] == pruned
        dots = panel.scatter(
            x[rows], trials.loc[rows, OBJECTIVE], c=trials.loc[rows, "trial"], marker=mark, **look
        )
    return dots


def importances(shares: pd.DataFrame) -> Figure:
    """Plot each setting's share, a bar an objective; most important on top."""
    order = list(shares.groupby("setting")["share"].max().sort_values().index)
    objectives = list(shares["objective"].unique())
    figure, panel = canvas(7, 0.6 * len(order) + 1.2)
    height = 0.8 / max(1, len(objectives))
    for i, objective in enumerate(objectives):
        part = shares[shares["objective"] == objective].set_index("setting").loc[order]
        places = np.arange(len(order)) - (i - (len(objectives) - 1) / 2) * height
        bars = panel.barh(places, part["share"], height, color=COLORS[i], label=objective)
        panel.bar_label(bars, fmt="%.2f", padding=3)
    panel.set_yticks(range(len(order)), order)
    panel.set_xlabel("importance (share of the variation of ranks)")
    panel.set_xlim(0, shares["share"].max() * 1.12 if len(shares) else 1)
    if len(objectives) > 1:
        panel.legend(frameon=False, loc="lower right")
    despine(figure)
    return figure


def front(trials: pd.DataFrame) -> Figure:
    """Plot trials on (rate, mse) with the Pareto front, whose configurations stand beside it."""
    figure, panel = canvas(12, 6)
    best = trials[trials["front"]].sort_values("val/rate")
    rest = trials[~trials["front"]]
    panel.plot(rest["val/rate"], rest["val/mse"], "o", color=GREY, ms=5, alpha=0.5, label="trial")
    look = {"color": COLORS[0], "ms": 7, "label": "Pareto front", "drawstyle": "steps-post"}
    panel.plot(best["val/rate"], best["val/mse"], "o-", **look)
    lowest = best.loc[best[OBJECTIVE].idxmin()]
    label = f"lowest {OBJECTIVE} of it, {lowest[OBJECTIVE]:.2f}"
    mark = {"color": COLORS[1], "ms": 15, "mfc": "none", "mew": 1.5, "label": label}
    panel.plot(lowest["val/rate"], lowest["val/mse"], "o", **mark)
    panel.set_xscale("symlog", linthresh=1)
    panel.set_xlim(left=-0.05)
    panel.set_yscale("log")
    panel.set_xlabel(UNITS["val/rate"])
    panel.set_ylabel(UNITS["val/mse"])
    named = {column: name for column, name in NAMES.items() if column in trials}
    lines = ["", f"trial: {', '.join(named.values())}"]
    for _, trial in _spread(best, lowest).iterrows():
        place = (trial["val/rate"], trial["val/mse"])
        offset = {"xytext": (7, 7), "textcoords": "offset points"}
        panel.annotate(f"{trial['trial']}", place, **offset)
        lines.append(f"{trial['trial']}: {', '.join(_said(trial[column]) for column in named)}")
    for text in lines:
        panel.plot([], [], " ", label=text or " ")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    despine(figure)
    return figure


def _said(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _spread(best: pd.DataFrame, lowest: pd.Series) -> pd.DataFrame:
    """Choose points of a front to be numbered: the lowest neg_elbo, and others well apart."""
    x = np.log1p(best["val/rate"].to_numpy(float))
    y = np.log(best["val/mse"].to_numpy(float))
    spans = max(np.ptp(x), 1e-9), max(np.ptp(y), 1e-9)
    places = np.stack([x / spans[0], y / spans[1]], axis=1)
    first = int(np.flatnonzero(best["trial"] == lowest["trial"])[0])
    kept: list[int] = []
    for i in [first, *range(len(best))]:
        far = all(np.linalg.norm(places[i] - places[j]) > 1 / NAMED for j in kept)
        if far and len(kept) < NAMED:
            kept.append(i)
    return best.iloc[sorted(kept)]
