"""Children that die at a chosen durable step of a real study.

A durable step is a call that changes a database or a file that outlives the process. Such calls are
counted by wrapping the libraries' real methods in a forked child; the production code has no hooks.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import optuna

from analysis import report
from benchmarks import children
from benchmarks.children import Ended
from harness.tracking import spool
from harness.training.checkpoint import Checkpoints
from studies.runner import summary

SPOOLED = SimpleNamespace(copytree=shutil.copytree, rmtree=shutil.rmtree)
"""The functions of `shutil` that the spool uses; elsewhere they serve temporary folders."""

STEPS: list[tuple[Any, tuple[str, ...]]] = [
    (
        optuna.storages.RDBStorage,  # as Optuna's cache calls it, in version 5.0.0
        (
            *("create_new_study", "set_study_user_attr", "_create_new_trial", "_set_trial_param"),
            *("record_heartbeat", "set_trial_intermediate_value"),
            *("set_trial_user_attr", "set_trial_system_attr", "set_trial_state_values"),
        ),
    ),
    (
        mlflow.MlflowClient,
        (
            *("create_experiment", "set_experiment_tag", "create_run", "log_batch", "log_inputs"),
            *("log_artifact", "log_artifacts", "set_tag", "set_terminated", "delete_run"),
        ),
    ),
    (spool, ("_append", "_synchronise")),
    (spool.Spool, ("_begin", "_remove")),
    (SPOOLED, ("copytree", "rmtree")),
    (summary, ("write_pictures", "log_summary")),
    (report, ("build",)),
    (Checkpoints, ("save", "remove", "clear")),
]
"""Owner and names of the calls that are durable steps."""


def in_child(
    folder: Path,
    function: Callable[[], Any],
    die_at: int = 0,
    by: int = signal.SIGKILL,
    among: str = "",
) -> Ended:
    """Call a function in a forked child that sends itself a signal as its n-th step begins.

    Args:
        folder: folder for the child's output, result and steps (`begun`).
        function: called in the child.
        die_at: number of the step, from 1; 0 sends nothing.
        by: the signal.
        among: name of the steps that are counted, "" for all.
    """
    steps = folder / "child.steps"
    steps.unlink(missing_ok=True)

    def counting() -> Any:
        count_steps(steps, die_at, by, among)
        return function()

    child = children.start(counting, folder)
    ended = child.wait()
    assert not child.left_behind()
    return ended


def begun(folder: Path) -> list[str]:
    """Return the names of the durable steps that the last child of a folder began."""
    steps = folder / "child.steps"
    return steps.read_text().split() if steps.exists() else []


def count_steps(file: Path, die_at: int, by: int, among: str) -> None:
    """Write every durable step of this process to a file as it begins; send a signal at one."""
    out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    process, count, lock = os.getpid(), 0, threading.Lock()

    def note(name: str) -> None:
        nonlocal count
        if os.getpid() != process:  # a worker of the engine
            return
        with lock:  # the spool's thread counts too
            count += among in ("", name)
            os.write(out, f"{name}\n".encode())
            if count == die_at and among in ("", name):
                os.kill(process, by)

    def wrapped(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            note(name)
            return real(*args, **kwargs)

        return call

    for owner, names in STEPS:
        for name in names:
            setattr(owner, name, wrapped(getattr(owner, name), name))
    spool.shutil = SPOOLED  # type: ignore[assignment]
