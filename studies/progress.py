"""How far training is: a bar in a terminal, a line every 10 % in a log, a message to a parent."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from harness.engine import EpochRecord

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


@contextmanager
def bar(out: rich.console.Console, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show how much of a total is done; yields (how much more, what is happening) -> None."""
    shown = Progress(
        TextColumn("{task.percentage:3.0f} %"),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[now]}"),
        TimeRemainingColumn(),
        console=out,
        disable=not out.is_terminal or total == 0,
    )
    with shown:
        task = shown.add_task("training", total=total, now="starting")

        def advance(steps: int, now: str) -> None:
            before = shown.tasks[0].percentage
            shown.update(task, advance=steps, now=now)
            after = shown.tasks[0].percentage
            if not out.is_terminal and after // 10 > before // 10:
                out.print(f"{after:3.0f} %  {now}")

        yield advance


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
    best = min(record.val["neg_elbo"])
    return (
        f"epoch {record.epoch}/{epochs} of {len(record.model.configs)} runs, "
        f"{record.images_per_second:,.0f} images/s, best neg_elbo {best:.2f}"
    )
