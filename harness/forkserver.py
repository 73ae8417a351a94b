"""The process that worker processes are forked from, as its parent sees it.

It imports PyTorch once and never runs `__main__`. `multiprocessing` has such a server too, but one
for all of a program, so that a user's own `Process` would ignore SIGTERM, and its workers outlive a
parent that is killed in the middle of a computation. This module imports nothing heavy: a command
line may `start` the server before it imports PyTorch itself.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import send_handle

PROGRAM = """
import os, sys
os.closerange(3, 1 << 16)
sys.path[:] = sys.argv[1:]
from harness.processes import serve
serve()
"""
"""Program of the server; its standard input is the connection to its parent."""

_lock = threading.Lock()
_server: Connection | None = None


def start() -> None:
    """Start the server unless it runs; returns at once, while the server imports PyTorch."""
    global _server
    with _lock:
        if _server is None:
            _server = _started()


def fork() -> tuple[Connection, int]:
    """Start a worker and return the connection to it and its process id.

    Raises:
        EOFError: the server or the worker was killed.
    """
    global _server
    here, there = Pipe()
    with there:
        start()
        with _lock:
            assert _server is not None
            try:
                send_handle(_server, there.fileno(), 0)
            except ConnectionError:  # the server was killed
                _server = _started()
                send_handle(_server, there.fileno(), 0)
    return here, here.recv()


def _started() -> Connection:
    """Start the server, in whose life SIGINT and SIGTERM are blocked from the first moment."""
    here, there = Pipe()
    with there:
        os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", PROGRAM, *sys.path],
            os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # else NumPy's threads run before a fork
            file_actions=[(os.POSIX_SPAWN_DUP2, there.fileno(), 0)],
            setsigmask=[signal.SIGINT, signal.SIGTERM],
        )
    return here


def _forget() -> None:
    """Leave the server to the process which has started it: a forked child starts another."""
    global _lock, _server
    if _server is not None:
        _server.close()
    _lock, _server = threading.Lock(), None


if sys.platform == "linux":
    os.register_at_fork(after_in_child=_forget)
