"""`--workers N`: the same command N times on this machine, with one voice.

Workers are processes of their own that take trials from the study as those of any other machine do.
They share the cores of a CPU evenly. What one says that is not progress is passed on with its name.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from harness.config import UserError
from studies import stopping
from studies.progress import MARK
from studies.worker import NUMBER, start_words

if TYPE_CHECKING:
    from studies.options import Common

PATIENCE = 30.0
"""Seconds that a worker has for its end after a second Ctrl-C."""

LOOK = 0.2
"""Seconds between looks for a signal."""


def train(options: Common, page: str, study: str, advance: Callable[[int, str], None]) -> bool:
    """Train what is left of a study by worker processes; all have ended when this returns.

    Args:
        options: of this command line.
        page: the study's module in `studies`.
        study: name of the study, which exists.
        advance: (epochs of runs that are done, what is happening) -> None.

    Returns:
        Whether a worker refused its work; then the others may have done it all.

    Raises:
        KeyboardInterrupt, SystemExit: as `stopping.check`, when all workers have stopped.
    """
    options = replace(options, study_name=study, fresh=False)
    said: queue.Queue[tuple[int, str]] = queue.Queue()
    numbers = range(1, options.workers + 1)
    team = [_start(number, options, page) for number in numbers]
    ears = [
        threading.Thread(target=_hear, args=(number, worker, said), daemon=True)
        for number, worker in zip(numbers, team, strict=True)
    ]
    for ear in ears:
        ear.start()
    try:
        while any(ear.is_alive() for ear in ears) or not said.empty():
            _listen(said, advance)
            stopping.check()
    except BaseException:
        _stop(team)
        for ear in ears:
            ear.join(PATIENCE)
        while not said.empty():
            _listen(said, advance)
        raise
    return 2 in [worker.returncode for worker in team]


def check_done(left: int, study: str, *, refused: bool = False) -> None:
    """Refuse to conclude a study of which trials are left.

    Args:
        left: how many.
        study: its name.
        refused: whether a worker refused its work.

    Raises:
        UserError: there are some.
    """
    if left and refused:
        raise UserError("a worker refused its work (above); repair that and repeat the command")
    if left:
        raise UserError(
            f"study {study!r} is not finished (trials left: {left}): no worker is left alive; the "
            "same command goes on from here"
        )


def arguments(options: Common) -> list[str]:
    """Return the command line that says what options say, all but `--workers`."""
    words = []
    for field in fields(options):
        value = getattr(options, field.name)
        if value == field.default or field.name == "workers":
            continue
        words.append(f"--{field.name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else (value,))
    return words


def cores(number: int, workers: int, available: int) -> int:
    """Return how many of the available cores the worker of a number has; at least one."""
    return max(1, available // workers + (number <= available % workers))


def _start(number: int, options: Common, page: str) -> subprocess.Popen[str]:
    from harness import processes  # loads torch

    workers = options.workers
    threads = cores(number, workers, processes.available())
    return subprocess.Popen(
        [sys.executable, *start_words(page), *arguments(options)],
        env={**os.environ, NUMBER: f"{number}/{workers}", "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is the parent's to pass on
    )


def _hear(number: int, worker: subprocess.Popen[str], said: queue.Queue[tuple[int, str]]) -> None:
    assert worker.stdout is not None
    with worker.stdout:
        for line in worker.stdout:
            said.put((number, line.rstrip("\n")))
    if code := worker.wait():
        said.put((number, f"ended with code {code}"))


def _listen(said: queue.Queue[tuple[int, str]], advance: Callable[[int, str], None]) -> None:
    try:
        number, line = said.get(timeout=LOOK)
    except queue.Empty:
        return
    if line.startswith(MARK):
        steps, now = json.loads(line.removeprefix(MARK))
        advance(steps, f"worker {number}: {now}")
    else:
        print(f"worker {number}: {line}", file=sys.stderr)


def _stop(team: list[subprocess.Popen[str]]) -> None:
    """Let every worker stop after its epoch; a second Ctrl-C ends that too."""
    try:
        _signal(team)
        for worker in team:
            worker.wait()
    except KeyboardInterrupt:
        _signal(team)
        for worker in team:
            try:
                worker.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.kill()


def _signal(team: list[subprocess.Popen[str]]) -> None:
    for worker in team:
        if worker.poll() is None:
            worker.terminate()
