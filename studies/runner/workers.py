"""`--workers N`: the same command N times on this machine, each with a log file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from harness.config import UserError
from studies.runner import stopping
from studies.runner.options import Places, arguments, start_words

NUMBER = "VAE_SWEEP_WORKER"
"""Environment variable of a worker: its number, from 1, and how many there are: "2/4"."""

PATIENCE = 30.0
"""Seconds that a worker has for its end after a second Ctrl-C."""

OF_PARENT = ("workers", "json", "leave")
"""Options that workers are not given."""

LOOK = 1.0
"""Seconds between looks at the workers and at the database."""


class Rank(NamedTuple):
    """A worker's number, from 1, among so many."""

    number: int
    workers: int


def rank(environment: Mapping[str, str] = os.environ) -> Rank | None:
    """Return the rank of a worker, which leaves the summary to its parent; else None."""
    text = environment.get(NUMBER)
    return Rank(*map(int, text.split("/"))) if text else None


def train(
    options: Places,
    page: str,
    study: str,
    cache: Path,
    counts: Callable[[], tuple[int, int]],
    show: Callable[[int, str], None],
) -> None:
    """Train what is left of a study by worker processes; all have ended when this returns.

    Args:
        options: of this command line.
        page: the study's module in `studies`.
        study: name of the study, which exists.
        cache: folder in which the workers' logs are written, as `workers/STUDY/N.log`.
        counts: () -> (finished runs, runs left), from the database.
        show: (runs finished meanwhile, what is happening) -> None.
    """
    folder, (before, left) = cache / "workers" / study, counts()
    folder.mkdir(parents=True, exist_ok=True)
    options = replace(options, study_name=study, fresh=False)
    team: dict[int, subprocess.Popen[bytes]] = {}
    refused = False
    try:
        for number in range(1, options.workers + 1):
            team[number] = _start(number, options, page, folder)
        while team:
            stopping.check()
            time.sleep(LOOK)
            for number, worker in [*team.items()]:
                if (code := worker.poll()) is not None:
                    refused |= code == 2
                    del team[number]
                    _report(number, code, folder)
            done, left = counts()
            show(done - before, f"runs left: {left}; {len(team)} workers write logs in {folder}")
    except BaseException:
        _stop([*team.values()])
        raise
    if refused or left:
        why = "a worker ended with code 2" if refused else "no worker is left alive"
        raise UserError(
            f"study {study!r}: {why} (above; runs left: {left}); finished runs are kept, the same "
            "command continues it"
        )


def cores(number: int, workers: int, available: int) -> int:
    """Return how many of the available cores the worker of a number has; at least one."""
    return max(1, available // workers + (number <= available % workers))


def _start(number: int, options: Places, page: str, folder: Path) -> subprocess.Popen[bytes]:
    from harness import processes  # loads torch

    threads = cores(number, options.workers, processes.available())
    own = {NUMBER: f"{number}/{options.workers}", "OMP_NUM_THREADS": str(threads)}
    with _log(folder, number).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *start_words(page), *arguments(options, OF_PARENT)],
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is the parent's to pass on
        )


def _log(folder: Path, number: int) -> Path:
    return folder / f"{number}.log"


def _report(number: int, code: int, folder: Path) -> None:
    if code:
        log = _log(folder, number)
        lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
        last = lines[-1].strip() if lines else "nothing was printed"
        print(f"worker {number} ended with code {code}: {last} ({log})", file=sys.stderr)


def _stop(team: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let every worker stop after its epoch; a second Ctrl-C ends the wait."""
    try:
        _terminate(team)
        for worker in team:
            worker.wait()
    except KeyboardInterrupt:
        _terminate(team)
        for worker in team:
            try:
                worker.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.kill()


def _terminate(team: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in team:
        if worker.poll() is None:
            worker.terminate()
