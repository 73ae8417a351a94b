"""What a command shows: its plan, progress, table and answer, or one JSON object."""

from __future__ import annotations

import itertools
import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from harness.tracking import addresses
from studies.runner.options import is_page, python

if TYPE_CHECKING:
    import pandas as pd

    from harness.training.engine import EpochRecord
    from studies.ledger.claims import Row
    from studies.runner.study import Plan
    from studies.runner.summary import Outcome

CLOSED = 141
"""Exit code of a command whose standard output was closed, as of a process that SIGPIPE ends."""

LOGGERS = ("harness", "studies")
"""Loggers whose messages are shown, from level INFO on."""

EVERY = 15.0
"""Seconds after which a log gets a line though nothing new began."""

HIDDEN = (
    "neg_elbo",
    "val/mse",
    "val/rate",
    "val/active_units",
    "best/val/neg_elbo",
    "best/val/mse",
)
"""Columns left to the report, so that the table fits 100 characters."""

SPARE = ("best/epoch", "pca_floor", "calibration_ratio")
"""Columns left to it one by one where the table is still too wide."""

BRIEF = ("rate", "calibration_ratio", "active_units", "neg_log_likelihood", "frechet", "best/epoch")
"""Columns shown here without their interval."""

HYPHENATED = {"calibration": "calib-\nration", "likelihood": "likeli-\nhood"}
"""Words that are wider than the numbers below them."""

COLORS = {"pass": "green", "fail": "bold red", "not run": "yellow"}
"""Of the verdicts of a ledger."""


class _Screen(rich.console.Console):
    """A console that ends the process with code 141 once nobody reads it."""

    def on_broken_pipe(self) -> NoReturn:
        self.quiet = True
        raise SystemExit(CLOSED)


class _Handler(logging.Handler):
    """Shows messages; those with `extra={"progress": True}` only report how far something is."""

    def __init__(self, show: Callable[[str, bool], None]) -> None:
        super().__init__(logging.INFO)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:  # goes where it would go without this handler
            logging.getLogger().callHandlers(record)
        else:
            self.show(record.getMessage(), getattr(record, "progress", False))


class Steps:
    """Progress of training in runs, an epoch being a part of one.

    `advance` takes the number of runs that are done, and what is happening.
    """

    def __init__(self, advance: Callable[[float, str], None]) -> None:
        self._advance, self._others = advance, 0

    def __call__(self, record: EpochRecord) -> None:
        """Count an epoch of a stack; what a dropped run does not train counts as done."""
        epochs = record.configs[0].epochs
        saved = len(record.dropped) * (epochs - record.epoch)
        self._advance((len(record.rows) + saved) / epochs, _line(record))

    def elsewhere(self, runs: int, text: str = "") -> None:
        """Count the runs that other processes have finished since the start."""
        more = max(0, runs - self._others)
        if more or text:
            self._advance(more, text or "other processes go on")
        self._others += more


class Terminal:
    """A terminal with a moving line, or a log file with a line every 10 % or 15 s.

    With `json` the outcome is one JSON object on standard output, and all else on standard error.
    """

    def __init__(self, *, json: bool = False, out: rich.console.Console | None = None) -> None:
        stream = sys.stderr if json else sys.stdout
        width = None if stream is not None and stream.isatty() else 100
        self.out = out or _Screen(highlight=False, width=width, stderr=json)
        self.json, self.results = json, list[dict[str, Any]]()
        self._status, self._last = self.out.status(""), time.monotonic()
        self._bar: Progress | None = None

    def line(self, text: str) -> None:
        """Show text as it is: a path may hold brackets, which rich would read as its markup."""
        self._last = time.monotonic()
        self.out.print(text, soft_wrap=True, markup=False)

    def question(self, question: str) -> None:
        """Show the first line of a study's question."""
        self.out.print(f"[bold]{escape(question.strip().splitlines()[0])}[/bold]")

    def plan(self, plan: Plan, pixels: int) -> None:
        """Show what will be trained; what follows belongs to this study."""
        self.results.append({"study": plan.name, "dataset": plan.source.name})
        where = f"on {plan.source.name} ({pixels} pixels), study {plan.name!r}"
        self.out.print(f"{plan.sentence} {where}", markup=False)

    def estimate(self, tracking_uri: str | None, storage: str | None, sentence: str) -> None:
        """Show the stores of a dry run and the estimated duration."""
        stores = {
            "tracking_uri": addresses.without_password(addresses.tracking_address(tracking_uri)),
            "storage": addresses.without_password(addresses.storage_address(storage)),
        }
        self._note(**stores, estimate=sentence)
        self.line(f"Tracking: {stores['tracking_uri']}\nStorage: {stores['storage']}")
        self.out.print(sentence, markup=False)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show messages of the library meanwhile."""
        loggers = [logging.getLogger(name) for name in LOGGERS]
        before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
        for logger in loggers:
            others = [found for found in logger.handlers if not isinstance(found, _Handler)]
            logger.handlers = [*others, _Handler(self._show)]
            logger.propagate = False  # the root has a handler too, once MLflow has made a database
            logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            self._status.stop()
            for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
                logger.setLevel(level)

    def _show(self, text: str, further: bool) -> None:  # noqa: FBT001 - as `_Handler` calls it
        if self.out.is_terminal and self._bar is not None:
            self._bar.update(self._bar.task_ids[0], now=text)
        elif self.out.is_terminal:
            self._status.update(text)
            self._status.start()
        elif not further or self._is_due():
            self.line(f"{'':7}{text}")  # as far to the right as after a percentage

    def _is_due(self) -> bool:
        return time.monotonic() - self._last >= EVERY

    @contextmanager
    def progress(self, runs: int, left: int) -> Iterator[Steps]:
        """Show the training of what no process has finished; yields the callback of every epoch."""
        if left == 0:
            self.line("Every run is finished already; nothing is trained again.")
        elif left < runs:
            self.line(f"{runs - left} runs are finished; {left} are left.")
        bar = Progress(
            TextColumn("{task.percentage:3.0f} %"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[now]}"),
            TimeRemainingColumn(),
            console=self.out,
            disable=not self.out.is_terminal or left == 0,
        )
        task = bar.add_task("training", total=left, now="starting")

        def advance(steps: float, now: str) -> None:
            before = round(bar.tasks[0].percentage, 6)
            bar.update(task, advance=steps, now=now)
            after = round(bar.tasks[0].percentage, 6)
            if not self.out.is_terminal and (after // 10 > before // 10 or self._is_due()):
                self.line(f"{after:3.0f} %  {now}")

        self._status.stop()
        self._bar = bar
        try:
            with bar:
                yield Steps(advance)
        finally:
            self._bar = None

    def outcome(self, outcome: Outcome, tracking_uri: str | None) -> None:
        """Show the table, or the claims of a ledger, the answer and where to look further."""
        from harness.tracking.page import LINK  # MLflow, which --help does not wait for

        where = addresses.without_password(addresses.tracking_address(tracking_uri))
        frame = outcome.table
        finite = frame.notna() & ~frame.isin([math.inf, -math.inf])  # JSON has no other numbers
        self._note(
            study=outcome.plan.name,
            experiment_id=outcome.experiment_id,
            table=frame.astype(object).where(finite, None).to_dict("records"),
            answer=outcome.answer,
            report=str(outcome.folder / "report.html"),
            tracking_uri=where,
        )
        if self.json:
            return
        if outcome.sections:
            for heading, rows in itertools.groupby(outcome.sections, key=lambda row: row.heading):
                self.out.print(_claims(heading, rows))
        else:
            self.out.print(self._fitting(frame))
        self.out.print(outcome.answer, soft_wrap=not self.out.is_terminal, markup=False)
        self.line(f"\nReport: {outcome.folder / 'report.html'}")
        self.line(f"Every run: {way(where)}/#/experiments/{outcome.experiment_id}{LINK}")
        self.line(following(outcome.plan, tracking_uri))

    def summary_elsewhere(self, run_id: str, address: str, answer: str) -> None:
        """Show the answer of a study whose summary another process wrote, and its address."""
        self._note(answer=answer, summary_run_id=run_id, summary=address)
        if not self.json:
            self.out.print(answer, soft_wrap=not self.out.is_terminal, markup=False)
            self.line(f"\nAnother process wrote the summary, run {run_id}: {address}")

    def finish(self, code: int | str, error: str = "") -> None:
        """With `--json`, print the object: of one study, or a list of them under "studies"."""
        if self.json and code != CLOSED:
            one = self.results[0] if self.results else {}
            result = {"studies": self.results} if len(self.results) > 1 else one
            failed = {"error": error.removeprefix("error: ")} if error else {}
            print(json.dumps({**result, **failed, "exit_code": code}, allow_nan=False))

    def _note(self, **fields: object) -> None:
        if not self.results:
            self.results.append({})
        self.results[-1] |= fields

    def _fitting(self, frame: pd.DataFrame) -> Table:
        """Return a table of as many columns as the terminal has room for."""
        from analysis import tables  # pandas, which the plan does not wait for

        cells = tables.cells(frame)
        for left_out in ((), *(SPARE[: n + 1] for n in range(len(SPARE)))):
            table = _table(cells.drop(columns=[*HIDDEN, *left_out], errors="ignore"))
            wanted = self.out.options.update(max_width=1000)
            if self.out.measure(table, options=wanted).maximum <= self.out.width:
                break
        return table


def _table(cells: pd.DataFrame) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in cells.columns:
        words = name.replace("best/", "best/\n").split("_")
        header = "_\n".join(HYPHENATED.get(word, word) for word in words)
        table.add_column(header, justify="right", no_wrap=True)
    for row in cells.to_dict("records"):
        short = (c.split(" ")[0] if n in BRIEF else c.replace(" ± ", "±") for n, c in row.items())
        table.add_row(*short)
    return table


def _claims(heading: str, rows: Iterable[Row]) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(heading)
    for name in ("reference", "obtained", "tolerance"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for row in rows:
        claim = row.claim
        verdict = f"[{COLORS[row.verdict]}]{row.verdict}[/]" + (f": {row.note}" if row.note else "")
        table.add_row(claim.name, claim.reference, row.obtained, claim.tolerance, verdict)
    return table


def _line(record: EpochRecord) -> str:
    runs, epochs = len(record.rows), record.configs[0].epochs
    return (
        f"epoch {record.epoch}/{epochs} of {runs} run{'s'[: runs > 1]}, "
        f"{record.images_per_second:,.0f} images/s, best {_best(record)}"
    )


def _best(record: EpochRecord) -> str:
    """Return the lowest neg_elbo; of plain autoencoders, which have none, the lowest mse."""
    for name, digits in (("neg_elbo", 2), ("mse", 4)):
        found = [float(value) for value in record.val.get(name, ()) if math.isfinite(value)]
        if found:
            return f"{name} {min(found):.{digits}f}"
    return "of none: all diverge"


def way(where: str) -> str:
    """Return how to open the page of a tracking store, up to its address."""
    if addresses.is_server(where):
        return where.rstrip("/")
    command = f"{python()} -m mlflow ui --workers 1 --backend-store-uri {shlex.quote(where)}"
    if where == addresses.default_tracking() and Path.cwd() == Path(__file__).resolve().parents[2]:
        command = "make ui"
    return f"{command}, then http://127.0.0.1:5000"


def following(plan: Plan, tracking_uri: str | None) -> str:
    """Return commands that can follow a study, as they are written in the current directory."""
    uri = addresses.without_password(tracking_uri or "")
    store = f" --tracking-uri {shlex.quote(uri)}" if uri else ""
    again = f"one run again with {python()} -m studies.replay RUN_ID{store}, or "
    again = again if plan.study is None or is_page(plan.study) else ""
    return f"Next: {plan.growth}{again}another study: {python()} -m studies.all --dry-run."
