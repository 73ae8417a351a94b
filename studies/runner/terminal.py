"""Output of a command: plan, progress, table and answer, or one JSON document."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import shlex
import socket
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NoReturn

import rich.box
import rich.console
import rich.live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from harness.tracking import addresses
from studies.runner.options import is_page, python

if TYPE_CHECKING:
    import pandas as pd

    from harness.training.engine import EpochRecord
    from studies.runner.study import Plan
    from studies.runner.summary import Outcome

CLOSED = 141  # exit code where standard output was closed, as of a process that SIGPIPE ends
LOGGERS = ("harness", "studies")  # their messages are shown, from level INFO on
EVERY = 15.0  # seconds after which a log gets a line though nothing new began

# Columns of a table: shown in the report alone; left out one by one where the table is too wide;
# without their interval. And where names of columns are broken.
HIDDEN = (
    *("neg_elbo", "val/mse", "val/rate", "val/active_units"),
    *("best/val/neg_elbo", "best/val/mse"),
)
SPARE = ("best/epoch", "pca_floor", "calibration_ratio", "frechet", "neg_log_likelihood")
BRIEF = ("rate", "calibration_ratio", "active_units", "neg_log_likelihood", "frechet", "best/epoch")
BREAKS = {"best/": "best/\n", "_": "_\n", "libration": "lib-\nration", "lihood": "li-\nhood"}

ALIKE = ("model", "hidden", "channels", "batch_size")  # of runs whose durations are compared
COLORS = {"pass": "green", "fail": "bold red", "not run": "yellow"}  # of a ledger's verdicts


class _Screen(rich.console.Console):
    """A console that ends the process with code 141 once standard output is closed."""

    def on_broken_pipe(self) -> NoReturn:
        self.quiet = True
        raise SystemExit(CLOSED)


class Steps:
    """Progress of training in runs, an epoch being a part of one.

    `advance` takes the number of runs that are done, and a text.
    """

    def __init__(self, advance: Callable[[float, str], None]) -> None:
        self._advance, self._others = advance, 0

    def __call__(self, record: EpochRecord) -> None:
        """Count an epoch of a stack; epochs that a dropped run is not trained count as done."""
        runs, epochs = len(record.rows), record.configs[0].epochs
        saved = len(record.dropped) * (epochs - record.epoch)
        name = "neg_elbo" if "neg_elbo" in record.val else "mse"  # of a plain autoencoder
        best = min(filter(math.isfinite, map(float, record.val.get(name, ()))), default=math.nan)
        self._advance(
            (runs + saved) / epochs,
            f"epoch {record.epoch}/{epochs} of {runs} run{'s'[: runs > 1]}, "
            f"{record.images_per_second:,.0f} images/s, best {name} {best:.4g}",
        )

    def elsewhere(self, runs: int, text: str = "") -> None:
        """Count the runs that other processes have finished since the start."""
        more = max(0, runs - self._others)
        if more or text:
            self._advance(more, text or "other processes go on")
        self._others += more


class Terminal(logging.Handler):
    """A terminal with a moving line, or a log with a line every 10 % or 15 s.

    With `json` the outcome is one JSON document on standard output, and all else is written to
    standard error. As a handler it shows the messages of the library.
    """

    def __init__(self, *, json: bool = False, out: rich.console.Console | None = None) -> None:
        super().__init__(logging.INFO)
        stream = sys.stderr if json else sys.stdout
        width = None if stream is not None and stream.isatty() else 100
        self.out = out or _Screen(highlight=False, width=width, stderr=json)
        self.json, self.results = json, [dict[str, Any]()]
        self._moving = rich.live.Live(console=self.out, transient=True)
        self._head, self._last = "", time.monotonic()

    def line(self, text: str) -> None:
        """Show text as it is: a path may hold brackets, which rich would read as its markup."""
        self._last = time.monotonic()
        self.out.print(text, soft_wrap=True, markup=False)

    def question(self, question: str) -> None:
        """Show the first line of a study's question."""
        self.out.print(f"[bold]{escape(question.strip().splitlines()[0])}[/bold]")

    def plan(self, plan: Plan, pixels: int) -> None:
        """Show the runs of a plan; later results belong to this study."""
        of_plan = {"study": plan.name, "dataset": plan.source.name}
        self.results = [*filter(None, self.results), of_plan]
        where = f"on {plan.source.name} ({pixels} pixels), study {plan.name!r}"
        self.out.print(f"{plan.sentence} {where}", markup=False)

    def dry_run(self, tracking_uri: str | None, storage: str | None, estimate: str) -> None:
        """Show the stores of a dry run and the estimated duration."""
        tracking = addresses.without_password(addresses.tracking_address(tracking_uri))
        storage = addresses.without_password(addresses.storage_address(storage))
        self.results[-1] |= {"tracking_uri": tracking, "storage": storage, "estimate": estimate}
        self.line(f"Tracking: {tracking}\nStorage: {storage}\n{estimate}")

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show messages of the library meanwhile."""
        with contextlib.ExitStack() as after:
            for logger in map(logging.getLogger, LOGGERS):
                after.callback(logger.removeHandler, self)
                after.callback(logger.setLevel, logger.level)
                after.callback(setattr, logger, "propagate", logger.propagate)
                logger.addHandler(self)
                logger.setLevel(logging.INFO)
                logger.propagate = False  # MLflow gives the root a handler when it makes a database
            if self.json:  # the output of libraries is no part of the document
                after.enter_context(contextlib.redirect_stdout(sys.stderr))
            after.callback(self._moving.stop)
            yield

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message; one with `extra={"progress": True}` only counts."""
        if record.levelno >= logging.WARNING:  # as without this handler
            logging.getLogger().callHandlers(record)
        elif self.out.is_terminal:
            self._move(record.getMessage())
            self._moving.refresh()
        elif not getattr(record, "progress", False) or self._is_due():
            self.line(f"{'':7}{record.getMessage()}")  # as far to the right as after a percentage

    def _move(self, text: str) -> None:
        shown = Text(self._head + text)
        shown.truncate(self.out.width, overflow="ellipsis")
        self._moving.update(shown)
        self._moving.start()

    def _is_due(self) -> bool:
        return time.monotonic() - self._last >= EVERY

    @contextlib.contextmanager
    def progress(self, runs: int, left: int) -> Iterator[Steps]:
        """Show the training of the runs that are left; yields the callback of every epoch."""
        if left == 0:
            self.line("Every run is finished already; nothing is trained again.")
        elif left < runs:
            self.line(f"{runs - left} runs are finished; {left} are left.")
        start, share = time.monotonic(), 0.0

        def advance(steps: float, now: str) -> None:
            nonlocal share
            before, share = share, min(1.0, round(share + steps / max(1, left), 9))
            if self.out.is_terminal:
                self._head = f"{100 * share:3.0f} %  "
                if 0 < share < 1:
                    rest = (time.monotonic() - start) * (1 / share - 1)
                    self._head = f"{100 * share:3.0f} %, {duration(rest)} left  "
                self._move(now)
            elif int(10 * share) > int(10 * before) or self._is_due():
                self.line(f"{100 * share:3.0f} %  {now}")

        yield Steps(advance)
        self._head = ""

    def outcome(self, outcome: Outcome, tracking_uri: str | None) -> None:
        """Show the table, or the claims of a ledger, the answer and where to look further."""
        from harness.tracking.page import LINK  # it loads MLflow, which --help does not need

        where = addresses.without_password(addresses.tracking_address(tracking_uri))
        frame, report = outcome.table, str(outcome.folder / "report.html")
        finite = frame.notna() & ~frame.isin([math.inf, -math.inf])  # JSON has no other numbers
        self.results[-1] |= {
            "study": outcome.plan.name,
            "experiment_id": outcome.experiment_id,
            "table": frame.astype(object).where(finite, None).to_dict("records"),
            "answer": outcome.answer,
            "report": report,
            "tracking_uri": where,
        }
        if self.json:
            return
        for heading, rows in itertools.groupby(outcome.sections or (), lambda row: row.heading):
            header = (heading, "reference", "obtained", "tolerance", "verdict")
            cells = [
                (*row.cells[:-1], f"[{COLORS[row.verdict]}]{row.cells[-1]}[/]") for row in rows
            ]
            self.out.print(table(header, cells, left=(heading, "verdict")))
        if not outcome.sections:
            self.out.print(_fitting(frame, self.out))
        self.out.print(outcome.answer, soft_wrap=not self.out.is_terminal, markup=False)
        self.line(f"\nReport: {report}")
        self.line(f"Every run: {way(where)}/#/experiments/{outcome.experiment_id}{LINK}")
        self.line(following(outcome.plan, tracking_uri))

    def summary_elsewhere(self, run_id: str, address: str, answer: str) -> None:
        """Show the answer of a study whose summary another process wrote, and its address."""
        self.results[-1] |= {"answer": answer, "summary_run_id": run_id, "summary": address}
        if not self.json:
            self.out.print(answer, soft_wrap=not self.out.is_terminal, markup=False)
            self.line(f"\nAnother process wrote the summary, run {run_id}: {address}")

    def finish(self, code: int | str, error: str = "") -> None:
        """With `--json`, print the object: of one study, or a list of them under "studies"."""
        if self.json and code != CLOSED:
            result = self.results[0] if len(self.results) == 1 else {"studies": self.results}
            failed = {"error": error.removeprefix("error: ")} if error else {}
            print(json.dumps({**result, **failed, "exit_code": code}, allow_nan=False))


def table(header: Iterable[str], rows: Iterable[Iterable[str]], left: Container[str] = ()) -> Table:
    """Return a table of text, columns flush right but for those of names in `left`."""
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in header:
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _fitting(frame: pd.DataFrame, out: rich.console.Console) -> Table:
    """Return a table of as many columns as fit."""
    from analysis import tables  # it loads pandas, which the plan does not need

    cells = tables.cells(frame).drop(columns=[*HIDDEN], errors="ignore")
    for name in cells:
        brief = name in BRIEF
        cells[name] = [c.split(" ")[0] if brief else c.replace(" ± ", "±") for c in cells[name]]
    wide = out.options.update(max_width=1000)
    for spare in ((), *SPARE):
        cells = cells.drop(columns=spare, errors="ignore")
        shown = table(map(_broken, cells), cells.itertuples(index=False))
        if out.measure(shown, options=wide).maximum <= out.width:
            break
    return shown


def _broken(name: str) -> str:
    for word, broken in BREAKS.items():
        name = name.replace(word, broken)
    return name


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


def expected(plan: Plan, device: str, tracking_uri: str | None) -> str:
    """Estimate the duration of a plan from finished runs of its experiment on this machine."""
    from harness.tracking import connect  # it loads MLflow, which --help does not need

    address, each = addresses.tracking_address(tracking_uri), list[float]()
    file = addresses.sqlite_file(address)
    if file is not None and file.exists():  # a dry run creates none
        client = connect(address).client
        experiment = client.get_experiment_by_name(plan.experiment)
        ids = [experiment.experiment_id] if experiment else []
        test = f"tags.host = '{socket.gethostname()}' and attributes.status = 'FINISHED'"
        like = {name: str(getattr(plan.configs[0], name)) for name in ALIKE} | {"device": device}
        for run in client.search_runs(ids, test, max_results=100):  # the latest first
            params, info = run.data.params, run.info
            if like.items() <= params.items():
                epochs = int(params["epochs"]) * int(params.get("stack_width", 1))
                each.append((info.end_time - info.start_time) / 1000 / epochs)
    if not each:
        return "duration: not known (no finished run like these here). Nothing was trained."
    whole = median(each) * sum(config.epochs for config in plan.configs)
    return (
        f"duration: about {duration(whole)} with final metrics (from {len(each)} finished runs "
        "like these here). Nothing was trained."
    )


def duration(seconds: float) -> str:
    """Return a duration in round numbers: "40 s", "7 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    hours, minutes = divmod(round(seconds / 60, -1 if seconds > 5400 else 0), 60)
    return " ".join(f"{n:.0f} {unit}" for n, unit in ((hours, "h"), (minutes, "min")) if n)
