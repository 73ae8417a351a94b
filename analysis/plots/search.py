"""Figures of a search, of the frame of `frames.by_trial`; `front` marks the Pareto front."""

from analysis.frames import Frame, is_numeric
from analysis.plots.style import COLORS, GREY, Axes, Figure, canvas, label, note, top_of

OBJECTIVE = "val/neg_elbo"

# Settings that a search may vary, in the order of the figure's panels.
PANELS = (
    *("decoder_variance", "kl_weight", "latent_size", "learning_rate"),
    *("kl_warmup_epochs", "kl_cycles", "free_bits", "sigma"),
)

LOGARITHMIC = ("decoder_variance", "kl_weight", "learning_rate")
NUMBERED = 14  # points of a front, at most


def search_history(trials: Frame) -> Figure:
    """Plot each trial's objective in their order, and the best finished one so far."""
    figure, panel = canvas(9, 5)
    done, pruned = trials[~trials["pruned"]], trials[trials["pruned"]]
    panel.plot(done["trial"], done[OBJECTIVE], "o", color=COLORS[0], ms=6, label="finished")
    panel.plot(pruned["trial"], pruned[OBJECTIVE], "x", color=COLORS[1], ms=6, label="pruned")
    best = done[OBJECTIVE].cummin()
    panel.step(done["trial"], best, where="post", color=GREY, label="best so far")
    _bound(panel, trials)
    panel.set(xlabel="trial", ylabel=label(OBJECTIVE))
    panel.locator_params(axis="x", integer=True)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def _bound(panel: Axes, trials: Frame) -> None:
    """Set limits that bad trials do not flatten; those above are counted."""
    values = trials[OBJECTIVE]
    low, top = values.min(), top_of(values)
    if values.max() > top:
        panel.set_ylim(low - 0.05 * (top - low), top)
        note(panel, f"{(values > top).sum()} above, up to {values.max():,.0f}")


def search_parameters(trials: Frame) -> Figure:
    """Plot the objective against each setting; later trials are darker, pruned ones crosses."""
    settings = [name for name in PANELS if name in trials and trials[name].notna().any()]
    rows = -(-len(settings) // 3)
    figure, panels = canvas(13, 3.75 * rows, rows=rows, columns=3, sharey=True)
    for panel, setting in zip(panels.flat, settings, strict=False):
        _against(panel, trials, setting)
        panel.set_xlabel(label(setting))
    for panel in panels.flat[len(settings) :]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel(label(OBJECTIVE))
    _bound(panels[0, -1], trials)
    bar = figure.colorbar(panels[0, 0].collections[-1], ax=panels, label="trial", shrink=0.7)
    bar.ax.locator_params(axis="y", integer=True)
    panels[0, 0].plot([], [], "o", color=GREY, label="finished")
    panels[0, 0].plot([], [], "x", color=GREY, label="pruned")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _against(panel: Axes, trials: Frame, setting: str) -> None:
    x, number, last = trials[setting], trials["trial"], max(1, trials["trial"].max())
    if not is_numeric(x):
        modes = sorted(x.unique())
        panel.set_xticks(range(len(modes)), modes)
        x = x.map(modes.index) + 0.5 * (number / last - 0.5)  # side by side, in order
    elif setting == "latent_size":
        panel.set_xscale("log", base=2)
    elif setting in LOGARITHMIC:
        panel.set_xscale("log")
    elif x.dtype.kind in "iu":
        panel.locator_params(axis="x", integer=True)
    for pruned, mark in ((True, "x"), (False, "o")):
        rows = trials["pruned"] == pruned
        look = {"marker": mark, "cmap": "cividis_r", "vmin": 0, "vmax": last}
        panel.scatter(x[rows], trials.loc[rows, OBJECTIVE], c=number[rows], **look)


def search_importances(shares: Frame) -> Figure:
    """Plot shares by setting (rows) and objective (columns); most important on top."""
    table = shares.loc[shares.max(axis=1).sort_values().index]
    figure, panel = canvas(7, 0.6 * len(table) + 1.2)
    table.plot.barh(ax=panel, color=COLORS, width=0.8, ylabel="")
    for bars in panel.containers:
        panel.bar_label(bars, fmt="%.2f", padding=3)
    panel.set_xlabel("importance (share of the variation of ranks)")
    panel.legend(frameon=False, loc="lower right")
    return figure


def search_front(trials: Frame, knee: int) -> Figure:
    """Plot trials on (rate, distortion) with the Pareto front, along which trials are numbered.

    The knee is the trial with the lowest rate + distortion, which is neg_elbo: the tangent there
    has slope -1, as both are nats.
    """
    figure, panel = canvas(9, 6)
    x, y, top = "val/rate", "val/distortion", top_of(trials[OBJECTIVE])
    shown = trials[trials[OBJECTIVE] <= top]  # bad ones would flatten the rest
    best, rest = shown[shown["front"]].sort_values(x), shown[~shown["front"]]
    panel.plot(rest[x], rest[y], "o", color=GREY, ms=5, alpha=0.5, label="trial")
    look = {"color": COLORS[0], "ms": 7, "label": "Pareto front", "drawstyle": "steps-post"}
    panel.plot(best[x], best[y], "o-", **look)
    found = trials[trials["trial"] == knee].iloc[0]
    text = f"knee, trial {knee}: {OBJECTIVE} {found[OBJECTIVE]:.2f}"
    panel.plot(found[x], found[y], "o", color=COLORS[1], ms=15, mfc="none", mew=1.5, label=text)
    panel.axline((found[x], found[y]), slope=-1, color=GREY, lw=0.7, zorder=0)
    panel.set(xlabel=label(x), ylabel=label(y))
    if outside := len(trials) - len(shown):
        note(panel, f"{outside} with {OBJECTIVE} above {top:,.0f}")
    for _, trial in best[:: -(-len(best) // NUMBERED)].iterrows():
        place = (trial[x], trial[y])
        panel.annotate(f"{trial['trial']}", place, xytext=(7, 7), textcoords="offset points")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
