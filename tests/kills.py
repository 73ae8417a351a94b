"""Processes that die at a chosen durable step of a real study, and what is left of them.

A durable step is a call that changes a database or a file that outlives the process. Such calls are
counted by wrapping the libraries' real methods in a forked child; the production code has no hooks.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import optuna

from studies import summary

MLFLOW = (
    *("create_experiment", "create_run", "log_batch", "log_inputs", "log_image", "log_text"),
    *("log_artifact", "log_artifacts", "set_tag", "set_terminated", "update_run"),
    *("create_logged_model", "_create_logged_model", "finalize_logged_model", "log_outputs"),
    *("set_logged_model_tags", "log_model_artifacts", "_log_model_artifacts"),
)
OPTUNA = (
    *("create_new_study", "set_study_user_attr", "_create_new_trial", "_set_trial_param"),
    *("set_trial_state_values", "set_trial_user_attr", "set_trial_system_attr"),
)
FILES = ("make_folder", "save_figures", "write_pictures", "write_summary")
STEPS = [
    *((mlflow.MlflowClient, name) for name in MLFLOW),
    *((optuna.storages.RDBStorage, name) for name in OPTUNA),
    *((summary, name) for name in FILES),
]
"""Owner and name of every call that is a durable step."""

PATIENCE = 120
"""Seconds after which a child that does not end fails the test."""


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        signal: what killed it, 0 if nothing did.
        code: its exit code, 0 if a signal killed it.
        said: what it wrote to stdout and stderr.
        value: what its function returned, None if it did not.
        steps: names of the durable steps that it began.
        group: its process group, which its workers share.
    """

    signal: int
    code: int
    said: str
    value: Any
    steps: list[str]
    group: int

    def left_behind(self) -> bool:
        """Say whether a process that it started is still there after a while."""
        for _ in range(100):
            try:
                os.killpg(self.group, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.05)
        return True


def in_child(
    folder: Path, function: Callable[[], Any], die_at: int = 0, by: int = signal.SIGKILL
) -> Ended:
    """Call a function in a forked child, which may be killed as its n-th durable step begins.

    Args:
        folder: for what the child says and returns.
        function: what is called.
        die_at: number of the step, from 1; 0 kills nobody.
        by: the signal.
    """
    said, value, steps = (folder / f"child.{kind}" for kind in ("out", "pickle", "steps"))
    for file in (said, value, steps):
        file.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _live(function, said, value, steps, die_at, by)
    status = _wait(child)
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return Ended(
        killed,
        os.WEXITSTATUS(status) if not killed else 0,
        said.read_text(),
        pickle.loads(value.read_bytes()) if value.exists() else None,
        steps.read_text().split() if steps.exists() else [],
        child,
    )


def _wait(child: int) -> int:
    for _ in range(PATIENCE * 100):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a child did not end within {PATIENCE} s")


def _live(
    function: Callable[[], Any], said: Path, value: Path, steps: Path, die_at: int, by: int
) -> None:
    """Be the child; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        with counted(steps, die_at, by):
            value.write_bytes(pickle.dumps(function()))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


@contextmanager
def counted(steps: Path, die_at: int, by: int) -> Iterator[None]:
    """Count durable steps, each written down as it begins, and die at one of them."""
    begun = os.open(steps, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    own, count = os.getpid(), 0

    def note(name: str) -> None:
        nonlocal count
        if os.getpid() != own:  # a worker of the engine
            return
        count += 1
        os.write(begun, f"{name}\n".encode())
        if count == die_at:
            os.kill(own, by)

    def wrapped(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            note(name)
            return real(*args, **kwargs)

        return call

    before = {}
    for owner, name in STEPS:
        if not hasattr(owner, name):
            continue
        before[owner, name] = getattr(owner, name)
        setattr(owner, name, wrapped(before[owner, name], name))
    try:
        yield
    finally:
        for (owner, name), real in before.items():
            setattr(owner, name, real)
