"""`--workers N`: the same command N times on this machine, each with a log file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from harness.config import UserError
from studies.runner import stopping
from studies.runner.options import Places, arguments

NUMBER = "VAE_SWEEP_WORKER"  # variable of a worker: its number, from 1, and how many: "2/4"
INTERVAL = 1.0  # seconds between two queries of the workers and the database


def started() -> int:
    """Return how many workers a worker's parent started, 0 in a process that is no worker."""
    return int(os.environ.get(NUMBER, "/0").partition("/")[2])


def train(
    options: Places,
    start: Sequence[str],
    study: str,
    cache: Path,
    counts: Callable[[], tuple[int, int]],
    show: Callable[[int, str], None],
) -> None:
    """Train what is left of a study by worker processes; all have ended when this returns.

    `start` are the words after `python` that start it, before its options.
    Their logs are CACHE/workers/STUDY/N.log. `counts()` returns how many runs have finished and how
    many are left; `show` gets the number of runs that finished meanwhile, and a text.
    """
    from harness import processes  # loads torch

    folder, (before, left) = cache / "workers" / study, counts()
    folder.mkdir(parents=True, exist_ok=True)
    given = replace(options, study_name=study, fresh=False)
    left_out = ("workers", "json", "leave")
    command = [sys.executable, *start, *arguments(given, left_out)]
    cores, more = divmod(processes.available(), options.workers)
    team: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for number in range(1, options.workers + 1):
            threads = max(1, cores + (number <= more))
            added = {NUMBER: f"{number}/{options.workers}", "OMP_NUM_THREADS": str(threads)}
            with (folder / f"{number}.log").open("ab") as log:
                team[number] = subprocess.Popen(
                    command,
                    env={**os.environ, **added},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # the parent passes Ctrl-C on
                )
        while team:
            stopping.check()
            time.sleep(INTERVAL)
            for number, worker in [*team.items()]:
                if (code := worker.poll()) is not None:
                    del team[number]
                if code:
                    print(
                        f"worker {number} ended with code {code}: {folder}/{number}.log",
                        file=sys.stderr,
                    )
            done, left = counts()
            show(done - before, f"runs left: {left}; {len(team)} workers write logs in {folder}")
    except BaseException:
        _stop([*team.values()])
        raise
    if left:
        raise UserError(
            f"study {study!r}: no worker is left alive (runs left: {left}; logs: {folder}); the "
            "same command continues it"
        )


def _stop(team: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop every worker after its epoch; a second Ctrl-C kills them."""
    for worker in team:
        worker.terminate()
    for worker in team:
        try:
            worker.wait()
        except KeyboardInterrupt:
            for other in team:
                other.kill()
            worker.wait()
