"""Output of a command: plan, progress, table and answer, or one JSON document."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import logging
import math
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import rich.box
import rich.console
from rich.table import Table

from harness.errors import printable, reading
from harness.tracking import addresses

if TYPE_CHECKING:
    import pandas as pd

    from harness.tracking.store import Store
    from harness.training.engine import EpochRecord
    from studies.runner.study import Plan
    from studies.runner.summary import Outcome

CLOSED = 141  # exit code where standard output was closed, as of a process that SIGPIPE ends
LOGGERS = ("harness", "studies")  # their messages are shown, from level INFO on
EVERY = 15.0  # seconds after which there is a line though nothing new began

# Columns of a table: shown in the report alone; left out one by one where the table is too wide;
# without their interval.
HIDDEN = (
    *("neg_elbo", "val/mse", "val/rate", "val/active_units"),
    *("best/val/neg_elbo", "best/val/mse"),
)
SPARE = (
    *("linear/latents_above_variance", "own_beta"),
    *("neg_log_likelihood", "frechet", "best/epoch", "pca_floor", "calibration_ratio"),
    *("kl_cycles", "kl_warmup_epochs", "free_bits"),
)
MOST_NAMED = 8  # paragraphs of an answer that begin with a name and a colon, on a terminal
BRIEF = ("rate", "calibration_ratio", "active_units", "neg_log_likelihood", "frechet", "best/epoch")

# Fields of a finished study with --json, which are fields of its stored summary too.
ANSWERED: Mapping[str, Any] = {
    **{"verdict": [], "best": None, "not_distinguishable": [], "groups": {}, "procedure": ""},
    **{"warnings": [], "answer": "", "next_command": "", "run_ids": []},
    **{"best_row": None, "model_run_id": ""},
}

ALIKE = ("model", "hidden", "channels", "batch_size")  # of runs whose durations are compared

PLAIN = {"±": "+-", "²": "^2", "é": "e", "–": "-", "−": "-", "×": "x"}  # where there is ASCII alone


class _Screen(rich.console.Console):
    """A console that ends the process with code 141 once standard output is closed."""

    def render_str(self, text: str, **options: Any) -> Any:  # noqa: ANN401 - rich's Text
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        drop(self.file)
        if not self.stderr:
            raise SystemExit(CLOSED)


def drop(stream: IO[str]) -> None:
    """Let a standard stream that cannot be written take everything and show nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def reopen() -> None:
    """Open the closed standard streams on nothing, before another file takes their numbers."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115


class Steps:
    """Progress of training in runs, an epoch being a part of one."""

    def __init__(self, terminal: Terminal, left: int) -> None:
        self._terminal, self._left, self._others = terminal, max(1, left), 0
        self._start, self._share = time.monotonic(), 0.0

    def __call__(self, record: EpochRecord) -> None:
        """Count an epoch of a stack; epochs that a run which ends is not trained count as done."""
        runs, epochs = len(record.rows), record.configs[0].epochs
        saved = len(record.dropped | record.stopped) * (epochs - record.epoch)
        of = f"epoch {record.epoch}/{epochs} of {counted(runs, 'run')}"
        what = "images" if record.columns is None else "rows"
        self.advance((runs + saved) / epochs, f"{of}, {record.images_per_second:,.0f} {what}/s")

    def elsewhere(self, runs: int, text: str = "") -> None:
        """Count the runs that other processes have finished since the start."""
        more = max(0, runs - self._others)
        if more or text:
            self.advance(more, text or "other processes go on")
        self._others += more

    def advance(self, runs: float, text: str) -> None:
        """Count runs; show the text at once, at every 10 %, and after `EVERY` seconds."""
        before, self._share = self._share, min(1.0, round(self._share + runs / self._left, 9))
        if not before or int(10 * self._share) > int(10 * before) or self._terminal.is_due():
            if 0.01 < self._share < 1:  # below, most of the time was the start
                rest = (time.monotonic() - self._start) * (1 / self._share - 1)
                text = f"{text}, {duration(rest)} left"
            self._terminal.line(f"{100 * self._share:3.0f} %  {text}")


class Terminal(logging.Handler):
    """Lines of a command; as a handler it shows the messages of the library.

    With `json` the outcome is one JSON document on standard output, and all else is written to
    standard error.
    """

    def __init__(self, *, json: bool = False) -> None:
        super().__init__(logging.INFO)
        stream = sys.stderr if json else sys.stdout
        width = None if stream is not None and stream.isatty() else 100
        # Without markup: a path may hold brackets.
        self.out = _Screen(highlight=False, markup=False, emoji=False, width=width, stderr=json)
        # Fields of the JSON document, and of the studies in it, of which `study` is the latest.
        self.json, self.several, self.document = json, False, dict[str, Any]()
        self.study, self.studies = dict[str, Any](), list[dict[str, Any]]()
        self.failures = list[str]()  # of metrics of the studies that were shown
        self._last = time.monotonic()

    def line(self, text: str) -> None:
        """Show text without breaking its lines."""
        self._last = time.monotonic()
        self.out.print(text, soft_wrap=True)

    def is_due(self) -> bool:
        """Return whether the last line is old."""
        return time.monotonic() - self._last >= EVERY

    def plan(self, plan: Plan, pixels: int, unit: str = "pixels") -> None:
        """Show the runs of a plan; later results belong to this study."""
        of_plan = {"study": plan.name, "dataset": plan.source.name, "command": plan.command}
        self.study = {**of_plan, "status": "unfinished"}  # until it is shown
        self.studies.append(self.study)
        where = f"on {plan.source.name} ({pixels} {unit}), study {plan.name!r}"
        self.out.print(f"{plan.sentence} {where}")

    def dry_run(
        self, stores: Sequence[str], done: int, missing: int, expected: Mapping[str, str]
    ) -> None:
        """Show the stores of a dry run, what is finished and missing, and what that takes."""
        tracking, storage = map(addresses.without_secrets, stores)
        self.study |= {"status": "planned", "tracking_uri": tracking, "storage": storage}
        self.study |= {"finished_runs": done, "missing_runs": missing, **expected}
        self.line(f"Tracking: {tracking}\nStorage: {storage}")
        is_done, is_missing = (f"{n} {'is' if n == 1 else 'are'}" for n in (done, missing))
        self.line(f"Runs: {is_done} finished, {is_missing} missing; nothing is refused.")
        self.line(f"Disk: {expected['disk']}\n{expected['estimate']}")

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show messages of the library meanwhile, in the letters that the terminal has."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="plain")
        with contextlib.ExitStack() as after:
            for logger in map(logging.getLogger, LOGGERS):
                after.callback(logger.removeHandler, self)
                after.callback(logger.setLevel, logger.level)
                after.callback(setattr, logger, "propagate", logger.propagate)
                logger.addHandler(self)
                logger.setLevel(logging.INFO)
                logger.propagate = False  # MLflow gives the root a handler when it makes a database
            if self.json:
                after.enter_context(_output_on_stderr())
            yield

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message; one with `extra={"progress": True}` only counts."""
        record.msg, record.args = addresses.without_password(record.getMessage()), ()
        if record.levelno >= logging.WARNING:  # as without this handler
            logging.getLogger().callHandlers(record)
        elif not getattr(record, "progress", False) or self.is_due():
            self.line(f"{'':7}{record.getMessage()}")  # as far to the right as after a percentage

    def cores(self, runs: int, threads: int, cores: int) -> None:
        """Show that runs on so many threads each leave cores idle, if more threads would not."""
        used, more = min(runs, cores // threads) * threads, cores // runs
        if used < cores and more > threads:
            are, every = ("is", "are")[used > 1], "all" if more * runs == cores else more * runs
            given = f"{used} of {cores} cores {are} used: {counted(runs, 'run')}"
            self.line(f"{given}; --threads-per-run {more} uses {every}, for large networks")

    def progress(self, runs: int, left: int) -> Steps:
        """Return what shows the training of the runs that are left, to be called every epoch."""
        if left < runs:
            done, are = counted(runs - left, "run"), ("are", "is")
            self.line(f"{done} {are[runs - left == 1]} finished; {left} {are[left == 1]} left.")
        return Steps(self, left)

    def outcome(self, outcome: Outcome, tracking_uri: str | None) -> None:
        """Show what a study found and where to look further."""
        self.failures += outcome.failures
        where = addresses.without_secrets(addresses.tracking_address(tracking_uri))
        answered = {name: getattr(outcome, name) for name in ANSWERED}
        places = {"experiment_id": outcome.experiment_id, "tracking_uri": where}
        places |= {"study": outcome.plan.name, "report": str(outcome.folder / "report.html")}
        self.show({**answered, **places, "table": records(outcome.table)})
        if outcome.written:
            self.line(f"Written: {outcome.written}")

    def show(self, found: Mapping[str, Any]) -> None:
        """Show a finished study, as of `stored`."""
        self.study |= {"status": "finished", **found}
        if self.json:
            return
        import pandas as pd  # and MLflow, which the plan does not need

        from harness.tracking.page import link

        table = pd.DataFrame(found["table"]).fillna(math.nan)
        for place, sentence in enumerate(found["verdict"]):
            is_command = "python " in sentence  # which would be pasted with its line breaks
            self._text(sentence, style=None if place else "bold", unbroken=is_command)
        if len(table):
            fitting, left_out = _fitting(table, self.out, found["best_row"])
            self.out.print(fitting)
            if left_out:
                self._text(f"Columns not shown: {', '.join(left_out)}; the report has them.\n")
        for warning in found["warnings"]:
            self._text(f"Warning: {warning}\n")
        paragraphs = found["answer"].split("\n\n")
        named = [text for text in paragraphs if text.partition(": ")[0].isidentifier()]
        if len(named) > MOST_NAMED:
            paragraphs = [text for text in paragraphs if text not in named]
            paragraphs.append(f"The report has {len(named)} paragraphs more, one a name.")
        self._text("\n\n".join(paragraphs))
        self.line(f"\nReport: {found['report'] or 'report.html of the summary run'}")
        if found["model_run_id"]:
            self.line(f"Model: load_run({found['model_run_id']!r})")
        page = f"{way(found['tracking_uri'])}/#/experiments/{found['experiment_id']}"
        self.line(f"Every run: {page}{link(found['study'])}")

    def _text(self, text: str, style: str | None = None, *, unbroken: bool = False) -> None:
        self.out.print(text, style=style, soft_wrap=unbroken or not self.out.is_terminal)

    def finish(self, code: int | str, error: str = "") -> None:
        """With `--json`, print the document: one study's, or a list of them under "studies"."""
        if self.json and code != CLOSED:
            is_list = self.several or len(self.studies) > 1
            of_studies = {"studies": self.studies} if is_list else dict(*self.studies)
            failed = {"error": error.removeprefix("error: ")} if error else {}
            document = {**of_studies, **self.document, **failed, "exit_code": code}
            print(json.dumps(_finite(document), allow_nan=False, default=str))


@contextlib.contextmanager
def _output_on_stderr() -> Iterator[None]:
    """Write to standard error what is printed meanwhile, by libraries and other processes too."""
    sys.stdout.flush()
    before = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(OSError):  # of a closed pipe
            sys.stdout.flush()
        os.dup2(before, 1)
        os.close(before)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as JSON has them: every digit, null for what is no number."""
    return [_finite(row) for row in table.astype(object).to_dict("records")]


def _finite(value: Any) -> Any:  # noqa: ANN401 - of JSON, which has no NaN and no infinity
    if isinstance(value, Mapping):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stored(store: Store, run_id: str) -> dict[str, Any]:
    """Return a finished study as `Terminal.show` takes it, from its summary run.

    The rows of its table are "table", the command line that repeats it is "command".
    """
    with tempfile.TemporaryDirectory() as folder, reading(f"summary.json of run {run_id}"):
        file = store.fetch(run_id, "summary.json", folder)
        summary = json.loads(file.read_text("utf-8"))
        answered = {name: summary.get(name, value) for name, value in ANSWERED.items()}
        # A study in a store beside may have a report of this name; the same command writes anew.
        every = reports(store.home, summary["name"])
        same = (path for path, run_ids in every.items() if run_ids == summary.get("run_ids", []))
        return {
            **{"study": summary["name"], "dataset": summary["dataset"], **answered},
            **{"table": summary.get("rows", []), "summary_run_id": run_id},
            **{"experiment_id": summary["experiment_id"], "command": summary["command"]},
            "tracking_uri": addresses.without_secrets(store.uri),
            "report": next((str(path / "report.html") for path in same), None),
        }


def reports(home: Path, name: str) -> dict[Path, list[str]]:
    """Return the folders of reports by a study's name -> the ids of their runs."""
    files = (home / "reports").glob(f"{name}*/summary.json")
    return {file.parent: json.loads(file.read_text("utf-8")).get("run_ids", []) for file in files}


def size(*paths: Path | None) -> str:
    """Return in words how many bytes some files, and those in folders, have."""
    files = (file for path in paths if path for file in (path, *path.rglob("*")))
    return in_bytes(sum(file.stat().st_size for file in files if file.is_file()))


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error("plain", _plain)


def _fitting(
    frame: pd.DataFrame, out: rich.console.Console, best: int | None
) -> tuple[Table, list[str]]:
    """Return a table of as many columns as fit, its best row marked, and the others' names."""
    from analysis import tables  # it loads pandas, which the plan does not need

    every = tables.cells(frame)
    cells = every.drop(columns=[*HIDDEN], errors="ignore")
    for name in cells:
        brief = name in BRIEF
        cells[name] = [c.split(" ")[0] if brief else c.replace(" ± ", "±") for c in cells[name]]
    if best is not None:
        cells.iloc[best, 0] += " *"
    wide = out.options.update(max_width=1000)
    for spare in ((), *SPARE, *cells.columns[:1:-1]):  # the first two stay
        cells = cells.drop(columns=spare, errors="ignore")
        shown = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for place, name in enumerate(cells):
            broken = name.replace("/", "/\n").replace("_", "_\n")
            shown.add_column(broken, justify="right" if place else "left", overflow="fold")
        for place, row in enumerate(cells.itertuples(index=False)):
            shown.add_row(*row, style="bold" if place == best else None)
        if out.measure(shown, options=wide).maximum <= out.width:
            break
    return shown, [name for name in every if name not in cells]


def way(where: str) -> str:
    """Return how to open the page of a tracking store, up to its address."""
    if addresses.is_server(where):
        return where.rstrip("/")
    command = shlex.join([sys.executable, "-m", "mlflow", "ui", "--workers", "1"])
    return f"{command} --backend-store-uri {shlex.quote(where)}, then http://127.0.0.1:5000"


def expected(plan: Plan, missing: int, device: str, tracking_uri: str | None) -> dict[str, str]:
    """Estimate duration and disk of missing runs from finished ones of their experiment here."""
    from harness.tracking import connect  # MLflow, which --help does not need

    address = addresses.tracking_address(tracking_uri)
    seconds, sizes, of_an_epoch = list[float](), list[int](), 0.0
    if not missing:
        none = "no run is missing"
        return {"disk": f"nothing more, {none}", "estimate": f"duration: {none}."}
    if not addresses.is_server(address) and not addresses.is_new(address):  # a dry run creates none
        store = connect(address, write=False)
        client, of_an_epoch = store.client, store.bytes_of_an_epoch()
        experiment = client.get_experiment_by_name(plan.experiment)
        ids = [experiment.experiment_id] if experiment else []
        test = f"tags.host = '{socket.gethostname()}' and attributes.status = 'FINISHED'"
        like = {name: str(getattr(plan.configs[0], name)) for name in ALIKE} | {"device": device}
        for run in client.search_runs(ids, test, max_results=100):  # the latest first
            params, info = run.data.params, run.info
            with contextlib.suppress(KeyError, TypeError, ValueError):  # another program's run
                if like.items() <= params.items():
                    epochs = int(params["epochs"]) * int(params.get("stack_width", 1))
                    seconds.append((info.end_time - info.start_time) / 1000 / epochs)
                    files = Path(url2pathname(urlsplit(info.artifact_uri).path)).rglob("*")
                    sizes.append(sum(file.stat().st_size for file in files))
    if not seconds:
        unknown = "not known (no finished run like these here)"
        return {"disk": unknown, "estimate": f"duration: {unknown}. Nothing was trained."}
    left = sum(config.epochs for config in plan.configs) * missing / len(plan.configs)
    whole, basis = duration(median(seconds) * left), f"from {counted(len(seconds), 'finished run')}"
    disk = in_bytes(median(sizes) * missing + of_an_epoch * left)
    return {
        "disk": f"about {disk} ({basis} and the database here), and a report",
        "estimate": f"duration: about {whole} ({basis} here). Nothing was trained.",
    }


def in_bytes(number: float) -> str:
    """Return a number of bytes in words: "14 MB"."""
    power = min(max(int(math.log10(max(number, 1)) // 3), 1), 3)
    return f"{number / 1000**power:.{int(number < 9.95 * 1000**power)}f} {' kMG'[power]}B"


def duration(seconds: float) -> str:
    """Return a duration in round numbers: "40 s", "7 min", "2.2 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 run", "2 runs"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
