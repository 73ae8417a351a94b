"""How far training is, for a bar (`live`) or, from a worker, for its parent."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.training.engine import EpochRecord

MARK = "\x1e"
"""Begins a line in which a worker of `--workers` tells its parent how far it is."""


class Steps:
    """Turns records into epochs of runs that are done.

    Args:
        epochs: of every run.
        advance: (epochs of runs that are done, what is happening) -> None.
    """

    def __init__(self, epochs: int, advance: Callable[[int, str], None]) -> None:
        self.advance, self._epochs, self._others = advance, epochs, 0

    def __call__(self, record: EpochRecord) -> None:
        """Note an epoch of a stack; what a dropped run does not train counts as done."""
        saved = len(record.dropped) * (self._epochs - record.epoch)
        self.advance(len(record.rows) + saved, _line(record, self._epochs))

    def elsewhere(self, runs: int) -> None:
        """Note how many runs other processes have finished so far."""
        if runs > self._others:
            self.advance((runs - self._others) * self._epochs, "other workers go on")
            self._others = runs


def report(steps: int, now: str) -> None:
    """Tell the parent of a worker how much more is done.

    Raises:
        SystemExit: the parent is gone.
    """
    try:
        print(f"{MARK}{json.dumps([steps, now])}", flush=True)
    except BrokenPipeError:
        sys.exit(1)


def _line(record: EpochRecord, epochs: int) -> str:
    runs = len(record.rows)
    return (
        f"epoch {record.epoch}/{epochs} of {runs} run{'s'[: runs > 1]}, "
        f"{record.images_per_second:,.0f} images/s, best {_best(record)}"
    )


def _best(record: EpochRecord) -> str:
    """Name the lowest neg_elbo; of plain autoencoders, which have none, the lowest mse."""
    for name, digits in (("neg_elbo", 2), ("mse", 4)):
        found = [float(value) for value in record.val.get(name, ()) if math.isfinite(value)]
        if found:
            return f"{name} {min(found):.{digits}f}"
    return "of none: all diverge"
