"""What a study shows in the terminal: the plan, live progress, the table and the answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from analysis import tables

if TYPE_CHECKING:
    from harness.engine import EpochRecord
    from studies.options import Plan
    from studies.summary import Outcome


COLUMNS = ("decoder_variance", "val/neg_elbo", "mse", "rate", "calibration_ratio", "active_units")
"""Columns of the table beside the axis; with them it fits 80 characters."""


def _terminal() -> rich.console.Console:
    width = None if sys.stdout.isatty() else 100
    return rich.console.Console(highlight=False, width=width)


@dataclass(frozen=True)
class Console:
    """A terminal, or a log file without one: then a line every 10 % instead of a bar."""

    out: rich.console.Console = field(default_factory=_terminal)

    def plan(self, plan: Plan, pixels: int) -> None:
        """Say what will be trained."""
        runs, axis = plan.runs, plan.study.axis.field
        values = ", ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in plan.configs)
        seeds = len(runs) // len(plan.configs)
        self.out.print(f"[bold]{plan.study.question.strip().splitlines()[0]}[/bold]")
        self.out.print(
            f"{len(plan.configs)} values of {axis} ({values}) x {seeds} seeds = {len(runs)} runs "
            f"of {runs[0].epochs} epochs on {plan.dataset} ({pixels} pixels), study {plan.name!r}"
        )

    @contextmanager
    def progress(self, plan: Plan, left: int) -> Iterator[Callable[[EpochRecord], None]]:
        """Show training as it goes; yields what is to be called after every epoch."""
        values, epochs = len(plan.configs), plan.runs[0].epochs
        if left == 0:
            self.out.print("Every run is finished already; nothing is trained again.")
        elif left < values:
            self.out.print(f"{values - left} values are finished; {left} are left.")
        bar = Progress(
            TextColumn("{task.percentage:3.0f} %"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[now]}"),
            TimeRemainingColumn(),
            console=self.out,
            disable=not self.out.is_terminal or left == 0,
        )
        total = left * (len(plan.runs) // values) * epochs
        with bar:
            task = bar.add_task("training", total=total, now="starting")

            def on_epoch(record: EpochRecord) -> None:
                now = _progress_line(record, epochs)
                before = bar.tasks[0].percentage
                bar.update(task, advance=len(record.model.configs), now=now)
                after = bar.tasks[0].percentage
                if not self.out.is_terminal and after // 10 > before // 10:
                    self.out.print(f"{after:3.0f} %  {now}")

            yield on_epoch

    def outcome(self, plan: Plan, outcome: Outcome, tracking_uri: str | None) -> None:
        """Show the table, the answer, and where to look further."""
        formatted = tables.cells(outcome.table)
        table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        shown = formatted[[plan.study.axis.field, *COLUMNS]]
        for name in shown.columns:
            table.add_column(name.replace("_", "_\n", 1), justify="right", no_wrap=True)
        for row in shown.itertuples(index=False):
            *means, ratio, active = row
            short = [cell.split(" ")[0] for cell in (ratio, active)]
            table.add_row(*(cell.replace(" ± ", "±") for cell in means), *short)
        self.out.print(table)
        self.out.print(outcome.answer, soft_wrap=not self.out.is_terminal)
        self.out.print(f"\nFigures and tables: {outcome.folder}", soft_wrap=True)
        where = "" if tracking_uri is None else f" --backend-store-uri {tracking_uri}"
        link = f"/#/experiments/{outcome.experiment_id}?workflowType=machine_learning"
        self.out.print(
            f"Every run: .venv/bin/mlflow ui -w 1{where}, then http://127.0.0.1:5000{link}",
            soft_wrap=True,
        )


def _progress_line(record: EpochRecord, epochs: int) -> str:
    best = min(record.val["neg_elbo"])
    return (
        f"epoch {record.epoch}/{epochs} of {len(record.model.configs)} runs, "
        f"{record.images_per_second:,.0f} images/s, best neg_elbo {best:.2f}"
    )
