"""The command line of every study: options, exit codes, and the steps of a command."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

import harness
from harness.config import UserError, plain
from harness.errors import SummaryError, line_of, printable
from harness.tracking import addresses
from studies.runner import stopping
from studies.runner.options import (
    NAMED,
    READ_WITH,
    SETTINGS,
    Common,
    Options,
    Places,
    read_named,
    setting_options,
    start_words,
)
from studies.runner.study import KNOWN, Plan, Study, make_plan, read_own, shown_values
from studies.runner.terminal import CLOSED, Terminal, drop, expected, reopen
from studies.runner.usage import in_words, short_help

if TYPE_CHECKING:
    from harness.data.dataset import Dataset
    from studies.runner.summary import Outcome

log = logging.getLogger(__name__)

Given = TypeVar("Given")

STOPPED = "Stopped. Finished runs are kept; the same command continues from here."

MANY = 8  # values of an axis that the help lists whole


def main(study: Study, args: Sequence[str] | None = None) -> None:
    """Run a study from the command line; the exit codes are those of `clear_errors`."""
    with clear_errors(args) as terminal:
        options = parse(study, args)
        execute(partial(make_plan, study, options), options, terminal)


def run(study: Study, data: Dataset | None = None, **options: Any) -> Outcome | None:
    """Run, continue or extend a study from Python: `run(STUDY, seeds=2, epochs=5).table`.

    `options` are those of its command line by name, settings of `RunConfig` among them; `data`, as
    of `Dataset.from_tensors`, takes the place of `dataset`. Returns its table as a frame, its
    answer, and the folder of its report; None for a dry run, or where another process writes the
    summary.
    """
    options = plain(options)
    if data is not None:
        for name in ("dataset", *READ_WITH):
            if options.get(name) is not None:
                raise UserError(f"{name}={options[name]!r} beside data=: leave one of them out")
        if data.name in KNOWN:
            raise UserError(f"data= is {data.name!r}: give dataset={data.name!r} in its place")
    words = study.start or start_words(study.name)
    if options.get("workers", 1) > 1 and (data is not None or words[0] != "-m"):
        why = "workers start a command line, which has neither your data nor your study"
        raise UserError(f"workers={options['workers']}: {why}; leave it out")
    settings = {name: options.pop(name) for name in SETTINGS if name in options}
    given = Options(**options, settings=settings)
    terminal = Terminal(json=given.json)
    with terminal.shown():
        return execute(partial(make_plan, study, given), given, terminal, data)


@contextlib.contextmanager
def clear_errors(args: Sequence[str] | None = None, stopped: str = STOPPED) -> Iterator[Terminal]:
    """Run a command; turn an error or a signal into one line and an exit code.

    The exit codes are those of docs/stopping.md; a fault of the code is a traceback. `stopped` is
    printed after Ctrl-C or SIGTERM.
    """
    reopen()
    terminal = Terminal(json="--json" in (sys.argv[1:] if args is None else args))
    code, message = 0, ""
    try:
        with stopping.handled(), terminal.shown():
            yield terminal
    except (SummaryError, UserError) as error:
        code, message = 3 if isinstance(error, SummaryError) else 2, f"error: {error}"
    except KeyboardInterrupt:
        code, message = stopping.exit_code() or 130, stopped
    except SystemExit as end:
        code = int(end.code or 0)
        message = f"standard output was closed. {stopped}" if code == CLOSED else ""
    except BrokenPipeError:
        code = CLOSED
    except Exception as error:
        if (trouble := addresses.trouble(error)) is None:
            terminal.finish(1, line_of(error))  # and the traceback
            raise
        code, message = 2, f"error: {trouble}"
    if not code and terminal.failures:
        code, message = 3, f"error: {' '.join(terminal.failures)}"
    if code == CLOSED:
        code = stopping.exit_code() or CLOSED
    try:
        shown = printable(message).replace("\n", r"\n")
        print(shown, end="\n" if message else "", file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)
    try:
        terminal.finish(code, message)
        print(end="", flush=True)
    except OSError:
        drop(sys.stdout)  # for Python's last flush
        code = code or stopping.exit_code() or CLOSED
    if code:
        sys.exit(code)


def parse(study: Study, args: Sequence[str] | None = None) -> Options:
    """Return the options of a study from its command line; else UserError."""
    notes = dict.fromkeys((study.axis.name, study.group), "swept by this study")
    few, many = (study.epochs(KNOWN[name]) for name in ("digits", "mnist"))
    notes["epochs"] = f"default: {few}; {many} for 10,000 training images or more"
    settings = setting_options(study.base, notes)
    values = [*map(shlex.quote, shown_values(study.axis.values).values())]
    if len(values) > MANY:
        values = [*values[: MANY // 2], "...", f"{values[-1]}; {len(values)} values"]
    of_study = {"seeds": str(study.seeds), "values": " ".join(values)}
    return read(Options, study.name, study.question, args, settings, of_study)


def read(
    options: type[Given],
    name: str,
    question: str,
    args: Sequence[str] | None,
    settings: type | None = None,
    defaults: Mapping[str, str] = MappingProxyType({}),
) -> Given:
    """Return a dataclass of options from the command line of the study NAME; else UserError.

    With a dataclass of `setting_options`, the field `settings` holds those that are given; then
    --help is `short_help`, with the `defaults` that only this study has.
    """
    parsed: Any = options
    if settings is not None:
        nested = ("settings", settings, field(default_factory=settings))
        parsed = make_dataclass("Options", [nested], bases=(options,), frozen=True)
    args, printed = sys.argv[1:] if args is None else args, io.StringIO()
    command = shlex.join(["python", *start_words(name)])
    if settings is not None and {"-h", "--help"}.intersection(args):
        print(short_help(command, question, options, settings, defaults))
        sys.exit(0)
    args = ["--help" if word == "--help-all" else word for word in args]
    try:
        with contextlib.redirect_stderr(printed):
            found = tyro.cli(
                parsed,
                prog=command,
                description=question.strip(),
                args=args,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as error:
        if error.code != 2:
            raise
        # The message repeats arguments: it is that of addresses without their passwords.
        hide = partial(re.sub, "(?s)(?<==).*|^[^-].*", lambda m: addresses.without_secrets(m[0]))
        if (hidden := [*map(hide, args)]) != [*args]:
            read(options, name, question, hidden, settings)  # raises
        # The message between the first two rules of tyro's box.
        text = " ".join(re.sub("[│╮]", " ", re.split("[─-]{5,}", printed.getvalue())[1]).split())
        names = [one.name for part in (options, settings) if part for one in fields(part)]
        raise UserError(f"{in_words(text, names)}; --help lists all options") from None
    if settings is None:
        return found
    chosen = {k: v for k, v in vars(found.settings).items() if v is not None}
    chosen |= {k: read_named(k, chosen[k]) for k in NAMED if k in chosen}
    if not chosen["terms"]:
        del chosen["terms"]
    return options(**{**vars(found), "settings": chosen})


def start(options: Places, question: str, dataset: str, terminal: Terminal) -> str:
    """Show the question, load PyTorch and return the kind of device, checked.

    The server of the workers that train on a CPU imports PyTorch meanwhile.
    """
    one_process = options.workers == 1 and not options.dry_run
    gpu = options.device != "cpu" and Path("/dev/nvidiactl").exists()
    cores = os.environ.get("OMP_NUM_THREADS") != "1" and (os.cpu_count() or 1) > 1
    if one_process and cores and not gpu:
        from harness import forkserver

        forkserver.start()
    terminal.out.print(question.strip().splitlines()[0], style="bold")
    log.info("loading PyTorch and %s", dataset)
    from harness.training.engine import resolve_device  # --help answers without it

    stopping.check()
    return resolve_device(options.device).type


def execute(
    make_plan: Callable[[Dataset | None], Plan],
    options: Common,
    terminal: Terminal,
    own: Dataset | None = None,
) -> Outcome | None:
    """Run a study and show it; None for a dry run, or where another process shows it.

    `make_plan` is called with the user's `own` data, loaded if need be, or None for a dataset that
    a plan knows by its name.
    """
    own = own or read_own(options)
    plan = make_plan(own)
    start(options, plan.question, plan.source.name, terminal)
    data = own or harness.load_dataset(options.dataset, options.data_dir)
    return execute_plan(plan, data, options, terminal)


def execute_plan(plan: Plan, data: Dataset, options: Places, terminal: Terminal) -> Outcome | None:
    """Run a plan on its data and show the outcome, or what a run would do; None as of `execute`."""
    from harness.linear.pca import begin_pca
    from harness.training import engine
    from studies.runner import tryout
    from studies.runner.run import check_study, run, standing

    for config in plan.configs:
        engine.check_runs([config], data)
        kind = engine.resolve_device(options.device, config.precision).type
    engine.check_threads(options.threads_per_run, kind, options.workers)
    terminal.plan(plan, data.pixels, "pixels" if data.columns is None else "columns")
    if tryout.is_needed(plan):
        tryout.try_out(plan, data)
    check_study(plan, options)  # before a thread computes: Python cannot end while one does
    if options.dry_run:
        done, missing = standing(plan, options)
        estimate = expected(plan, missing, kind, options.tracking_uri)
        tracking = addresses.tracking_address(options.tracking_uri)
        stores = tracking, addresses.storage_address(options.storage)
        terminal.dry_run(stores, done, missing, estimate)
        return None
    if any(config.likelihood == "gaussian" for config in plan.configs):
        begin_pca(data)
    outcome = run(plan, data, options, terminal)
    if outcome is not None:
        terminal.outcome(outcome, options.tracking_uri)
    return outcome
