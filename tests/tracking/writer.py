"""Processes that write runs to a spool and are killed on the way.

`python writer.py SPOOL URI EXPERIMENT AMONG N...` forks a child for each N. It writes a run whose
key is N in 32 digits and kills itself as the N-th write or request of all begins or, after the
requests, has just ended ("begun", "answered"); AMONG is "writes", "begun" or "answered".
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import requests
from mlflow import MlflowClient

from harness.tracking import spool
from harness.tracking.runs import NOTE, RunLog

EPOCHS = 3


def write_run(put, experiment: str, key: str, *, end: bool = True) -> RunLog:
    """Write a run, of 9 writes in a spool."""
    tags, params = {"study": "s", "role": "run", "place": "1"}, {"seed": "0"}
    create = {"experiment": experiment, "name": "a run", "tags": tags, "params": params}
    log = RunLog(put, key, create)
    log.text('{"a": 1}', "provenance.json")
    for epoch in range(1, EPOCHS + 1):
        log.metrics({"mse": 1 / (epoch + 3), "nan": float("nan"), "big": float("inf")}, epoch)
    log.picture("reconstructions", np.full((8, 8), 7, dtype=np.uint8), 1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sub").mkdir()
        (Path(folder) / "sub" / "weights").write_bytes(b"\x00\xff" * 9)
        log.folder(Path(folder))
    log.tag(NOTE, "replay it")
    if end:
        log.end()
    return log


def key_of(number: int) -> str:
    """Return the key of the run that is killed at a step."""
    return f"{number:032}"


def die_at(owner, name: str, number: int, *, after: bool = False) -> None:
    """Kill this process as the n-th call of a method begins, or when it has returned."""
    real, count = getattr(owner, name), 0

    def counted(*values, **named):
        nonlocal count
        count += 1
        mine = count == number
        if mine and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*values, **named)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def child(folder: Path, uri: str, experiment: str, among: str, number: int) -> None:
    """Write a run and die."""
    if among == "writes":
        die_at(spool, "_append", number)
    else:
        die_at(requests.Session, "request", number, after=among == "answered")
    writing = spool.Spool(folder, uri, MlflowClient(uri))
    log = write_run(writing.put, experiment, key_of(number))
    if among != "writes":
        writing.deliver({log.key})


def main() -> None:
    """Fork a child for each number, one after the other."""
    folder, uri, experiment, among, *numbers = sys.argv[1:]
    for number in map(int, numbers):
        process = os.fork()
        if process == 0:
            try:
                child(Path(folder), uri, experiment, among, number)
            finally:
                os._exit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
