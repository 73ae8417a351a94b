"""Figures of the ledger of reference numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from analysis.plots import COLORS, GREY, canvas, despine

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


def batch_plane(
    kl_term: np.ndarray,
    loss: np.ndarray,
    labels: Sequence[str],
    ranges: Sequence[tuple[float, float]],
    star: tuple[float, float],
) -> Figure:
    """Plot the loss of batches against their KL term, a colour a seed, and one batch as a star.

    Args:
        kl_term: shape (S, batches), pixel^2.
        loss: shape (S, batches), pixel^2.
        labels: of the seeds.
        ranges: limits of KL term and of loss that are drawn, dotted.
        star: KL term and loss of the batch to compare with.
    """
    figure, panel = canvas(8, 6)
    for x, y, label, color in zip(kl_term, loss, labels, cycle(COLORS), strict=False):
        panel.plot(x, y, ".", ms=3, alpha=0.4, color=color, label=label)
    (left, right), (low, high) = ranges
    panel.plot([left, right, right, left, left], [low, low, high, high, low], ":", color=GREY)
    panel.plot(*star, "*", ms=18, color="#000000", mec="white", label="the blog's last batch")
    panel.set_xlabel("KL term of the batch (pixel²)")
    panel.set_ylabel("loss of the batch (pixel²)")
    figure.legend(loc="outside right upper", frameon=False, markerscale=1)
    despine(figure)
    return figure
