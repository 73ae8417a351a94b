"""Forked children that may die: what they printed, what they returned, what they left behind.

A child is a copy of a process that has imported everything, so it starts at once. Databases must be
opened by children only: a connection does not survive a fork.
"""

from __future__ import annotations

import importlib
import os
import pickle
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 600.0
"""Seconds after which a child that does not end is given up."""


IMPORTED = (
    *("studies.runner.run", "studies.runner.summary", "studies.runner.terminal", "seaborn"),
    "harness.tracking.record",
    *("torch.export", "torch._dynamo", "sklearn.linear_model", "sklearn.neighbors"),
    "mlflow.store.tracking.sqlalchemy_store",
)
"""What a study imports on its way, so that its children need not."""


def import_all() -> None:
    """Import what children would have to import one after the other."""
    for module in IMPORTED:
        importlib.import_module(module)


def copy_project(folder: Path) -> Path:
    """Copy the packages, for a spool, reports and caches of their own; return the copy's folder."""
    root = Path(__file__).resolve().parents[1]
    for package in ("harness", "studies", "analysis"):
        pycache = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / package, folder / package, ignore=pycache)
    shutil.copy(root / "pyproject.toml", folder)
    return folder


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        signal: what killed it, 0 if nothing did.
        code: its exit code, 0 if a signal killed it.
        printed: what it wrote to stdout and stderr.
        value: what its function returned, None if it did not.
    """

    signal: int
    code: int
    printed: str
    value: Any


@dataclass(frozen=True)
class Child:
    """A process with a process group of its own, which its workers share."""

    process: int
    folder: Path

    def send(self, number: int, *, group: bool = False) -> None:
        """Send a signal to it, or to its group as a terminal and a scheduler do."""
        (os.killpg if group else os.kill)(self.process, number)

    def ended(self) -> bool:
        """Say whether it has ended, without waiting for it."""
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self) -> Ended:
        """Wait for its end.

        Raises:
            TimeoutError: it did not end; it is killed.
        """
        patience = time.monotonic() + PATIENCE
        while not self.ended():
            if time.monotonic() > patience:
                self.send(signal.SIGKILL, group=True)
                os.waitpid(self.process, 0)
                raise TimeoutError(f"a child did not end: {printed_in(self.folder)[-500:]}")
            time.sleep(0.01)
        _, status = os.waitpid(self.process, 0)
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        returned = self.folder / "child.pickle"
        return Ended(
            killed,
            0 if killed else os.WEXITSTATUS(status),
            printed_in(self.folder),
            pickle.loads(returned.read_bytes()) if returned.exists() else None,
        )

    def left_behind(self) -> bool:
        """Say whether a process that it started is still there half a minute after its end."""
        for _ in range(600):
            try:
                os.killpg(self.process, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.05)
        return True


def printed_in(folder: Path) -> str:
    """Return what the child of a folder has printed so far."""
    printed = folder / "child.out"
    return printed.read_text(errors="replace") if printed.exists() else ""


def start(function: Callable[[], Any], folder: Path) -> Child:
    """Call a function in a forked child.

    Args:
        function: what is called; what it returns is pickled.
        folder: for what the child prints and returns.
    """
    (folder / "child.pickle").unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        _live(function, folder)
    return Child(process, folder)


def _live(function: Callable[[], Any], folder: Path) -> None:
    """Be the child; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        out = os.open(folder / "child.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1)
        (folder / "child.pickle").write_bytes(pickle.dumps(function()))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)
