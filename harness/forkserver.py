"""The process that worker processes are forked from.

It imports PyTorch once and never runs `__main__`. `multiprocessing` has such a server too, but one
for all of a program, so that a user's own `Process` would ignore SIGTERM, and its workers outlive a
parent that is killed in the middle of a computation. This module imports nothing heavy: a command
line may `start` the server before it imports PyTorch itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle

PROGRAM = """
import os, sys
os.closerange(3, 1 << 16)
sys.path[:] = sys.argv[1:]
from harness import forkserver

def load():
    import harness.training.engine
    from harness.processes import work
    return work

forkserver.serve(load)
"""
"""Program of the server; its standard input is the connection to its parent."""

LATER = (
    "harness.metrics.quality",
    "sklearn.neighbors",
    "sklearn.pipeline",
    "sklearn.linear_model",
)
"""Modules for workers that measure: imported behind the first training step, not before it."""

PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)

_lock = threading.Lock()
_server: tuple[Connection, ...] = ()
"""The connection to the server, and what the server lives as long as."""


def start() -> None:
    """Start the server unless it runs; returns at once, while the server imports PyTorch."""
    global _server
    with _lock:
        _server = _server or _started()


def fork() -> tuple[Connection, int]:
    """Start a worker and return the connection to it and its process id.

    Raises:
        EOFError: the server or the worker was killed.
    """
    global _server
    here, there = Pipe()
    with there, _lock:
        _server = _server or _started()
        try:
            send_handle(_server[0], there.fileno(), 0)
        except ConnectionError:  # the server was killed
            _server = _started()
            send_handle(_server[0], there.fileno(), 0)
    return here, here.recv()


def _started() -> tuple[Connection, Connection]:
    here, there = Pipe()
    alive, lifeline = Pipe(duplex=False)
    with there, alive:
        os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", PROGRAM, *sys.path],
            os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # else NumPy's threads run before a fork
            file_actions=[(os.POSIX_SPAWN_DUP2, there.fileno(), 0)],
            setsigmask=[signal.SIGINT, signal.SIGTERM],  # from the first moment
        )
        send_handle(here, alive.fileno(), 0)
    return here, lifeline


def _forget() -> None:
    """Leave the server to the process which has started it: a forked child starts another."""
    global _lock, _server
    for connection in _server:
        connection.close()
    _lock, _server = threading.Lock(), ()


if sys.platform == "linux":
    os.register_at_fork(after_in_child=_forget)


def serve(load: Callable[[], Callable[[Connection], None]]) -> None:
    """Fork a worker for every connection that the parent sends, until the parent has ended.

    The kernel kills the server when the parent ends, and the workers when the server ends.

    Args:
        load: imports what workers need, and returns what a worker does with its connection.
    """
    with contextlib.suppress(EOFError):  # the parent has ended
        parent = Connection(0)
        alive = Connection(recv_handle(parent))
        fcntl.fcntl(alive, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(alive, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(alive, fcntl.F_SETFL, os.O_ASYNC)
        if alive.poll():
            os._exit(0)
        work, later = load(), list(LATER)
        server, libc = os.getpid(), ctypes.CDLL(None)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers that have ended vanish
        while True:
            worker = Connection(recv_handle(parent))
            if os.fork() == 0:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                if os.getppid() == server:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    with contextlib.suppress(EOFError, OSError):  # the pool has been closed
                        worker.send(os.getpid())
                        work(worker)
                os._exit(0)
            worker.close()
            while later and not parent.poll(0.5):
                with contextlib.suppress(ImportError):
                    importlib.import_module(later.pop(0))
    os._exit(0)
