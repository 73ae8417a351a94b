"""One command line for all studies, made from the dataclass `Options`."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from harness.config import UserError
from studies.options import Options, make_plan
from studies.study import Study


def main(study: Study, args: Sequence[str] | None = None) -> None:
    """Run a study from the command line; bad input ends it with one line and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs are closed as KILLED
    try:
        _main(study, parse(study, args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "\nStopped. Finished runs are kept; the same command goes on from here.",
            file=sys.stderr,
        )
        sys.exit(130)


def parse(study: Study, args: Sequence[str] | None = None) -> Options[Any]:
    """Read the options of a study; `--values` takes what its axis holds.

    Raises:
        UserError: an option is unknown or its value cannot be read.
    """
    kind = type(study.axis.values[0])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                Options[kind],  # type: ignore[valid-type]
                prog=f"python -m studies.{study.name}",
                description=f"{study.question.strip()}\n\nSweeps {study.axis.name}.",
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


def _main(study: Study, options: Options[Any]) -> None:
    plan = make_plan(study, options)

    # After parsing, so that --help and misspelt options answer at once.
    import harness
    from studies.console import Console
    from studies.study import run

    console = Console()
    harness.engine.resolve_device(options.device)
    data = harness.load_dataset(options.dataset, options.data_dir)
    for config in plan.runs:
        harness.engine.check_stack([config], data)
    console.plan(plan, data.pixels)
    if not options.dry_run:
        console.outcome(plan, run(plan, data, options, console), options.tracking_uri)
