"""One command line for all studies, made from the dataclass `Options`."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from harness import places
from harness.config import UserError
from studies import live, stopping
from studies.options import Options
from studies.plan import make_plan
from studies.sources import read_own
from studies.study import Study
from studies.worker import program

if TYPE_CHECKING:
    from studies.summary import Outcome

log = logging.getLogger(__name__)

Given = TypeVar("Given")

STOPPED = "Stopped. Finished runs are kept; the same command goes on from here."
LACKING = {
    "disk": "the disk is full ({}). Make room; finished runs are kept, the same command goes on.",
    "memory": "there is too little memory ({}). Free some, and the same command goes on, or give a "
    "smaller --batch-size under another --study-name.",
}
"""What is said where something lacks."""


def main(study: Study, args: Sequence[str] | None = None) -> None:
    """Run a study from the command line; bad input ends it with one line and exit code 2."""
    with clear_errors():
        execute(study, parse(study.name, study.question, type(study.axis.values[0]), args))


@contextlib.contextmanager
def clear_errors(stopped: str = STOPPED) -> Iterator[None]:
    """Turn a user's error, a full disk or memory, Ctrl-C or SIGTERM into a line and an exit code.

    Args:
        stopped: what to say after Ctrl-C or SIGTERM.
    """
    try:
        with stopping.heeded(), live.shown():
            yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(stopping.exit_code())
    except Exception as error:
        lacking = places.shortage(error)
        if lacking is None:
            raise
        print(f"error: {LACKING[lacking].format(places.reason(error))}", file=sys.stderr)
        sys.exit(2)


def parse(name: str, question: str, kind: type, args: Sequence[str] | None = None) -> Options[Any]:
    """Read the options of a study, whose `--values` are of the given kind.

    Raises:
        UserError: an option is unknown or its value cannot be read.
    """
    return read(Options[kind], name, question, args)  # type: ignore[valid-type]


def read(options: type[Given], name: str, question: str, args: Sequence[str] | None) -> Given:
    """Read a dataclass of options from the command line of the study NAME.

    Raises:
        UserError: an option is unknown or its value cannot be read.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                options,
                prog=program(name),
                description=question.strip(),
                args=args,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as error:
        if error.code != 2:
            raise
        raise UserError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """Take the message out of tyro's box of several lines."""
    first, *rest = box.strip().splitlines()
    lines = [line.strip("│ ").strip() for line in rest]
    message: list[str] = []
    for line in lines:
        if re.fullmatch(r"[─╰╯]+", line):
            break
        message.append(line)
    return f"{' '.join(message)}; --help lists all options"


def start_pool(device: str) -> None:
    """Start the server of the workers that train on a CPU, which imports PyTorch meanwhile.

    Args:
        device: as in the options.
    """
    on_cpu = device == "cpu" or (device == "auto" and not Path("/dev/nvidiactl").exists())
    if on_cpu and os.environ.get("OMP_NUM_THREADS") != "1" and (os.cpu_count() or 1) > 1:
        from harness import forkserver

        forkserver.start()


def execute(study: Study, options: Options[Any]) -> Outcome | None:
    """Run a study and show it; None for a dry run, or where another process shows it.

    Raises:
        UserError: an option, the data or a store cannot be used.
    """
    own = read_own(options.dataset, options.image_size)
    plan = make_plan(study, options, own)
    if not options.dry_run and options.workers == 1:
        start_pool(options.device)

    # After parsing, so that --help and misspelt options answer at once.
    import harness
    from harness.linear.pca import begin_pca
    from harness.training import engine
    from studies.console import Console
    from studies.study import run

    console = Console()
    console.question(study.question)
    log.info("loading PyTorch and %s", plan.dataset)
    engine.resolve_device(options.device, options.precision or "float32")
    data = own or harness.load_dataset(options.dataset, options.data_dir)
    for config in plan.runs:
        engine.check_runs([config], data)
    console.plan(plan, data.pixels)
    if options.dry_run:
        seeds = plan.seeds
        console.estimate(plan.runs, data, options, lambda width: max(1, width // seeds) * seeds)
        return None
    if any(config.likelihood == "gaussian" for config in plan.runs):
        begin_pca(data)
    outcome = run(plan, data, options, console)
    if outcome is None:
        return None
    console.outcome(plan, outcome, options.tracking_uri)
    return outcome
