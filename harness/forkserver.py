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
import os
import signal
import socket
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
forkserver.end_with_parent()
from harness import processes
import harness.training.engine
forkserver.serve(processes.work)
"""
"""Program of the server; its standard input is the connection to its parent."""

WHEN_IDLE = (
    "harness.metrics.quality",
    "sklearn.neighbors",
    "sklearn.pipeline",
    "sklearn.linear_model",
)
"""Modules that the server imports while no worker is wanted, so that workers need not."""

PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)

_lock = threading.Lock()
_server: Connection | None = None


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
            send_handle(_server, there.fileno(), 0)
        except ConnectionError:  # the server was killed
            _server = _started()
            send_handle(_server, there.fileno(), 0)
    return here, here.recv()


def _started() -> Connection:
    """Start the server, with SIGINT and SIGTERM blocked from the first moment."""
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


def end_with_parent() -> None:
    """End the server as soon as its parent has ended, also while it imports a module."""
    parent = socket.socket(fileno=os.dup(0))

    def look(*_: object) -> None:
        with contextlib.suppress(BlockingIOError):
            if not parent.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                os._exit(0)

    signal.signal(signal.SIGIO, look)
    fcntl.fcntl(parent, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent, fcntl.F_SETFL, fcntl.fcntl(parent, fcntl.F_GETFL) | os.O_ASYNC)
    look()


def serve(work: Callable[[Connection], None]) -> None:
    """Fork a worker for every connection that the parent sends, until the parent has ended.

    The server ends with the parent, and the kernel kills the workers when the server ends.
    """
    parent, libc = Connection(os.dup(0)), ctypes.CDLL(None)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers that have ended vanish
    server, modules = os.getpid(), list(WHEN_IDLE)
    while True:
        while modules and not parent.poll():
            with contextlib.suppress(ImportError):
                __import__(modules.pop(0))
        try:
            worker = Connection(recv_handle(parent))
        except EOFError:
            os._exit(0)
        if os.fork() == 0:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == server:
                parent.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                with contextlib.suppress(EOFError, OSError):  # the connection has been closed
                    worker.send(os.getpid())
                    work(worker)
            os._exit(0)
        worker.close()
