"""What a study shows in the terminal: the plan, live progress, the table and the answer."""

from __future__ import annotations

import itertools
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import rich.console
from rich.markup import escape
from rich.table import Table

from harness import places, view
from studies import live, worker
from studies.progress import Steps, report

if TYPE_CHECKING:
    import pandas as pd

    from harness.config import RunConfig
    from harness.data.dataset import Dataset
    from studies.claims import Row
    from studies.options import Common
    from studies.plan import Plan
    from studies.search_options import SearchPlan
    from studies.summary import Outcome


log = logging.getLogger(__name__)

HIDDEN = (
    *("neg_elbo", "val/mse", "val/rate", "val/active_units"),
    *("best/val/neg_elbo", "best/val/mse"),
)
"""Columns left to the report, so that the table fits 100 characters."""

NEXT = (
    "Next: a closer look with other --values and more --seeds (and a --study-name), one run again "
    "with python -m studies.replay RUN_ID, or another study: python -m studies.all --dry-run."
)
"""What can be done once a study has answered."""

SPARE = ("best/epoch", "pca_floor", "calibration_ratio")
"""Columns left to it one by one where the table is still too wide."""

COLORS = {"pass": "green", "fail": "bold red", "not run": "yellow"}
"""Of the verdicts of a ledger."""

BRIEF = (
    *("rate", "calibration_ratio", "active_units", "neg_log_likelihood", "frechet"),
    "best/epoch",
)
"""Columns shown here without their interval."""

HYPHENATED = {"calibration": "calib-\nration", "likelihood": "likeli-\nhood"}
"""Words that are wider than the numbers below them."""


def _short(name: str, cell: str) -> str:
    return cell.split(" ")[0] if name in BRIEF else cell.replace(" ± ", "±")


def _header(name: str) -> str:
    name = name.replace("best/", "best/\n")
    return "_\n".join(HYPHENATED.get(word, word) for word in name.split("_"))


def _table(cells: pd.DataFrame) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in cells.columns:
        table.add_column(_header(name), justify="right", no_wrap=True)
    for row in cells.to_dict("records"):
        table.add_row(*(_short(str(name), cell) for name, cell in row.items()))
    return table


@dataclass(frozen=True)
class Console:
    """A terminal, or a log file without one: then a line every 10 % instead of a bar."""

    out: rich.console.Console = field(default_factory=live.terminal)

    def question(self, question: str) -> None:
        """Show what is asked, in its first line."""
        self.out.print(f"[bold]{escape(question.strip().splitlines()[0])}[/bold]")

    def plan(self, plan: Plan, pixels: int) -> None:
        """Say what will be trained."""
        runs, study = plan.runs, plan.study
        values = plan.written.values()
        groups = [group for group in dict.fromkeys(point.group for point in plan.configs) if group]
        listed = ", ".join(values)
        each = f" x {len(groups)} groups ({', '.join(groups)})" if groups else ""
        self.out.print(
            f"{len(values)} values of {study.axis.name} ({listed}){each} x {plan.seeds} seeds "
            f"= {len(runs)} runs of {runs[0].epochs} epochs on {plan.dataset} ({pixels} pixels), "
            f"study {plan.name!r}"
        )

    def estimate(
        self,
        runs: Sequence[RunConfig],
        data: Dataset,
        options: Common,
        at_once: Callable[[int], int],
    ) -> None:
        """Say in how many stacks runs are trained, about how long that takes, and why.

        Args:
            runs: all runs of the plan.
            data: their dataset.
            options: device and tracking store.
            at_once: width of a device's stack -> width of the plan's.
        """
        from studies import estimate

        log.info("estimating the time")
        said = estimate.sentence(runs, data, options.device, options.tracking_uri, at_once)
        self.out.print(said, markup=False)

    @contextmanager
    def progress(self, plan: Plan, left: int) -> Iterator[Steps]:
        """Show training as it goes; yields what is to be called after every epoch."""
        points, epochs = len(plan.configs), plan.runs[0].epochs
        if left == 0:
            self.out.print("Every run is finished already; nothing is trained again.")
        elif left < points:
            self.out.print(f"{points - left} points are finished; {left} are left.")
        with self.bar(left * plan.seeds, epochs) as on_epoch:
            yield on_epoch

    @contextmanager
    def bar(self, runs: int, epochs: int) -> Iterator[Steps]:
        """Show the training of so many runs; yields what is to be called after every epoch."""
        if worker.crowd():
            with live.heard(lambda what, further: report(0, what)):
                yield Steps(epochs, report)
            return
        with live.bar(self.out, runs * epochs) as advance:
            yield Steps(epochs, advance)

    def outcome(self, plan: Plan | SearchPlan, outcome: Outcome, tracking_uri: str | None) -> None:
        """Show the table, the answer, and where to look further."""
        from analysis import tables  # pandas, which the plan does not wait for

        cells = tables.cells(outcome.table)
        for left_out in ((), *(SPARE[: n + 1] for n in range(len(SPARE)))):
            table = _table(cells.drop(columns=[*HIDDEN, *left_out], errors="ignore"))
            wanted = self.out.options.update(max_width=1000)
            if self.out.measure(table, options=wanted).maximum <= self.out.width:
                break
        self.out.print(table)
        self.answer(outcome, tracking_uri)

    def conclusion(self, ended: Outcome | str) -> Outcome | None:
        """Return what was found; if another process says it, say which."""
        if not isinstance(ended, str):
            return ended
        self.out.print(ended, soft_wrap=True, markup=False)
        return None

    def ledger(self, rows: Sequence[Row], outcome: Outcome, tracking_uri: str | None) -> None:
        """Show judged claims, heading by heading, the answer, and where to look further."""
        for heading, part in itertools.groupby(rows, key=lambda row: row.heading):
            table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
            table.add_column(heading)
            for name in ("reference", "obtained", "tolerance"):
                table.add_column(name, justify="right")
            table.add_column("verdict")
            for row in part:
                claim, color = row.claim, COLORS[row.verdict]
                verdict = f"[{color}]{row.verdict}[/]" + (f": {row.note}" if row.note else "")
                table.add_row(claim.name, claim.reference, row.obtained, claim.tolerance, verdict)
            self.out.print(table)
        self.answer(outcome, tracking_uri)

    def answer(self, outcome: Outcome, tracking_uri: str | None) -> None:
        """Show the answer, and where to look further."""
        # As they are: a path may hold brackets, rich's own signs.
        self.out.print(outcome.answer, soft_wrap=not self.out.is_terminal, markup=False)
        report = f"\nReport: {outcome.folder / 'report.html'}"
        self.out.print(report, soft_wrap=True, markup=False)
        page = f"/#/experiments/{outcome.experiment_id}{view.LINK}"
        self.out.print(f"Every run: {_way(tracking_uri)}{page}", soft_wrap=True, markup=False)
        self.out.print(NEXT, soft_wrap=True, markup=False)


def _way(tracking_uri: str | None) -> str:
    """Say how the page of a tracking store is opened, up to its address."""
    where = places.without_password(places.tracking_address(tracking_uri))
    if where.startswith(("http://", "https://")):
        return where.rstrip("/")
    own = where == places.default_tracking() and (places.project_root() / "Makefile").exists()
    command = (
        "make ui" if own else f"mlflow ui --workers 1 --backend-store-uri {shlex.quote(where)}"
    )
    return f"{command}, then http://127.0.0.1:5000"
