"""All cores of a CPU kept busy: runs side by side in forked processes, each on one thread.

Products of 32 rows do not profit from a second thread, and a run on one thread gives the same bits
whatever runs beside it. Threads of one process would wait for Python's lock at every operator.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from math import prod
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch
from torch import Tensor

from harness import doing

PATIENCE = 1.0
"""Seconds after which a waiting worker looks whether its parent is still there."""


PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2)."""


def shared_zeros(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros that forked processes see and change together; on a GPU, ordinary ones."""
    if device.type != "cpu":
        return torch.zeros(*shape, device=device, dtype=dtype)
    memory = mmap.mmap(-1, max(1, prod(shape)) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype)[: prod(shape)].view(*shape)


def available() -> int:
    """Return how many cores this process may keep busy: PyTorch's threads (OMP_NUM_THREADS)."""
    return torch.get_num_threads()


class Crew:
    """Workers that apply one function to items, at once on as many cores as PyTorch has threads.

    Workers are forked when the crew is made and know all that there is then; what the function
    changes is lost but for `shared_zeros`. Every call computes on one thread, with denormals
    flushed, which Adam's moments decay into. With one core, on a GPU or where forking is not safe
    the function is called here.

    Args:
        function: what is applied.
        workers: at most so many, for instance the number of items.
        device: where the function computes.
    """

    def __init__(self, function: Callable[[Any], Any], workers: int, device: torch.device) -> None:
        self._function, self._on_cpu = function, device.type == "cpu"
        workers = min(workers, available())
        forks = self._on_cpu and workers > 1 and sys.platform == "linux"
        self._workers = [self._hire() for _ in range(workers)] if forks else []

    def _hire(self) -> tuple[multiprocessing.process.BaseProcess, Connection]:
        here, there = multiprocessing.Pipe()
        worker = _forked(_serve, self._function, there)
        there.close()
        return worker, here

    def map(self, items: Sequence[Any], what: str = "") -> list[Any]:
        """Return the function's results in the order of the items.

        Args:
            items: the function's arguments.
            what: said of every item that is done; "" where items are many and short.

        Raises:
            Exception: what the function raised first.
        """
        if not self._workers:
            with one_thread() if self._on_cpu else contextlib.nullcontext():
                done = []
                for item in items:
                    done.append(self._function(item))
                    _count(what, len(done), len(items))
                return done
        results: dict[int, Any] = {}
        left = iter(enumerate(items))
        busy: dict[Any, int] = {}
        for _, connection in self._workers:
            _hand(connection, left, busy)
        while busy:
            for ready in wait(list(busy)):
                connection = cast("Connection", ready)
                results[busy.pop(connection)] = _received(connection)
                _count(what, len(results), len(items))
                _hand(connection, left, busy)
        return [results[i] for i in range(len(items))]

    def dismiss(self) -> None:
        """End the workers."""
        for worker, connection in self._workers:
            connection.close()
            worker.kill()
        for worker, _ in self._workers:
            worker.join()
        self._workers = []


def works_forked(function: Callable[[], None]) -> bool:
    """Say whether a function ends without an error in a forked process."""

    def attempt() -> None:
        with contextlib.suppress(Exception):
            function()
            os._exit(0)
        os._exit(1)

    child = _forked(attempt)
    child.join()
    return child.exitcode == 0


@contextlib.contextmanager
def crew(function: Callable[[Any], Any], workers: int, device: torch.device) -> Iterator[Crew]:
    """Hire a `Crew` for a while."""
    hired = Crew(function, workers, device)
    try:
        yield hired
    finally:
        hired.dismiss()


def _forked(
    function: Callable[..., None],
    *args: Any,  # noqa: ANN401 - of any function
) -> multiprocessing.process.BaseProcess:
    """Start a forked process that ends with this one."""
    child = multiprocessing.get_context("fork").Process(target=function, args=args, daemon=True)
    with warnings.catch_warnings():  # it uses nothing that a thread could have locked
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    return child


def _hand(connection: Connection, left: Iterator[tuple[int, Any]], busy: dict[Any, int]) -> None:
    for place, item in left:
        with _lost_worker():
            connection.send(item)
        busy[connection] = place
        return


def _count(what: str, done: int, of: int) -> None:
    if what:
        doing.count(what, done, of)


def _received(connection: Connection) -> Any:  # noqa: ANN401 - the function's result
    with _lost_worker():
        result, error = connection.recv()
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def _lost_worker() -> Iterator[None]:
    """Say what it means that nobody is at the other end."""
    try:
        yield
    except (EOFError, ConnectionError):
        raise RuntimeError("a worker process was killed; was there too little memory?") from None


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    """Work until the parent is gone; Ctrl-C, and SIGTERM sent to a whole job, are its to heed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    _die_with_parent()
    _settle()
    while os.getppid() == parent:
        if not connection.poll(PATIENCE):
            continue
        try:
            item = connection.recv()
        except EOFError:
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = function(item), None
        except Exception as error:
            error.add_note(f"In a worker process:\n{traceback.format_exc()}")
            answer = None, error
        _send(connection, answer)


def _send(connection: Connection, answer: tuple[Any, Exception | None]) -> None:
    try:
        connection.send(answer)
    except Exception as error:
        connection.send((None, RuntimeError(f"a worker's answer cannot be sent: {error!r}")))


def _die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent dies, be it in the middle of an epoch."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _settle() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute as a worker does: on one thread, with denormals flushed."""
    threads = torch.get_num_threads()
    _settle()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
