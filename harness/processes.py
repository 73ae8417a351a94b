"""A pool of clean worker processes, in any of which a run has the same bits."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
import sys
import traceback
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from math import prod
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
from torch import Tensor

from harness import forkserver

R = TypeVar("R")

_files: dict[int, int] = {}  # `id` of a tensor made by `shared` -> the descriptor of its memory


def available() -> int:
    """Return how many cores this process may keep busy: PyTorch's threads (OMP_NUM_THREADS)."""
    return torch.get_num_threads()


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Compute as a worker does: on so many threads, with denormals flushed."""
    threads = torch.get_num_threads()
    flushed = (torch.tensor(1e-38, dtype=torch.float32) * 1e-2).item() == 0  # there is no getter
    torch.set_num_threads(count)
    torch.set_flush_denormal(True)  # Adam's moments decay into them
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushed)


one_thread = functools.partial(on_threads, 1)


def shared(tensor: Tensor) -> Tensor:
    """Return a contiguous copy of a tensor in memory that workers share with this process.

    It is an ordinary copy on a GPU, on other systems than Linux, in a result and as a view.
    """
    if tensor.device.type != "cpu" or sys.platform != "linux":
        return tensor.clone()
    file = os.memfd_create("shared tensor")  # /dev/shm has 64 MB in many containers
    copy = _map(f"/proc/self/fd/{file}", tensor.dtype, tensor.shape)
    copy.copy_(tensor.detach())
    _files[id(copy)] = file
    weakref.finalize(copy, lambda key: os.close(_files.pop(key)), id(copy))
    return copy


def _map(path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    memory = torch.from_file(path, shared=True, size=max(1, prod(shape)), dtype=dtype)
    return memory[: prod(shape)].view(shape)  # nothing of size 0 can be mapped


class Pool:
    """Worker processes that call functions on items; a context manager.

    A worker is a fork of a server without `__main__`, so scripts need no guard, and functions and
    modules that a script or a notebook cell defines are sent whole. A worker keeps `common`, the
    first arguments of every function, for all maps, with what functions change in it. Each computes
    on so many `threads`, and there are no more workers than cores for them. With one worker, and on
    other systems than Linux, functions are called in this process.
    """

    def __init__(self, workers: int, common: tuple[Any, ...] = (), threads: int = 1) -> None:
        self._common, self._threads = common, threads
        self._workers: dict[Connection, Connection] = {}  # and their lifelines
        self._busy: dict[Connection, tuple[int, Any]] = {}
        self._closed = False
        workers = min(workers, available() // threads)
        if workers > 1 and sys.platform == "linux":
            task = functools.partial(_work, threads, sys.path, os.getcwd(), _dumps(common))
            with _worker_lost():
                self._workers.update(forkserver.fork() for _ in range(workers))
                for worker in self._workers:
                    worker.send(task)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def map(self, function: Callable[..., R], items: Iterable[Any]) -> Iterator[tuple[int, R]]:
        """Yield the index of an item and ``function(*common, item)`` as results are ready.

        An error of the function, a RuntimeError where a worker was killed, and leaving the
        iteration end the workers and close the pool.
        """
        if self._closed or self._busy:
            raise RuntimeError(f"the pool is {'in another map' if self._busy else 'closed'}")
        left = enumerate(items)
        if not self._workers:
            for index, item in left:
                with on_threads(self._threads):
                    result = function(*self._common, item)
                yield index, result
            return
        self._busy = busy = dict[Connection, tuple[int, Any]]()  # of this map
        idle, done = list(self._workers), list[tuple[int, R]]()
        try:
            while idle:
                for worker, (index, item) in zip(idle, left, strict=False):
                    task = _dumps((function, item))
                    with _worker_lost():
                        worker.send_bytes(task)
                    busy[worker] = index, item  # whose memory is kept meanwhile
                yield from done
                ready = wait(list(busy)) if busy else []
                idle, done = [worker for worker in busy if worker in ready], []
                for worker in idle:
                    with _worker_lost():
                        answer = worker.recv_bytes()
                    result, error = pickle.loads(answer)
                    if error is not None:
                        raise error
                    done.append((busy.pop(worker)[0], result))
        except BaseException as error:
            if busy or not isinstance(error, GeneratorExit):
                self.close()
            raise

    def close(self) -> None:
        """End the workers, in the middle of a computation too."""
        self._closed = True
        for lifeline in self._workers.values():
            lifeline.close()
        self._workers.clear()
        self._busy.clear()


@contextlib.contextmanager
def _worker_lost() -> Iterator[None]:
    try:
        yield
    except BlockingIOError:  # the server cannot be started: a limit on processes
        raise
    except (EOFError, OSError) as error:
        killed = RuntimeError("a worker process was killed; was there too little memory?")
        raise forkserver.failure() or killed from error


def _dumps(value: object) -> bytes:
    """Return a pickle that holds what only this process defines, and refers to shared memory."""
    from cloudpickle import CloudPickler  # a GPU's machine, where no worker starts, may lack it

    class Pickler(CloudPickler):
        dispatch_table = ChainMap({Tensor: _reduced}, CloudPickler.dispatch_table)

    buffer = io.BytesIO()
    Pickler(buffer).dump(value)
    return buffer.getvalue()


def _reduced(tensor: Tensor) -> Any:  # noqa: ANN401 - as of __reduce_ex__
    if (file := _files.get(id(tensor))) is None:
        return tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    return _map, (f"/proc/{os.getpid()}/fd/{file}", tensor.dtype, tuple(tensor.shape))


def _work(threads: int, path: list[str], folder: str, pickled: bytes, pool: Connection) -> None:
    sys.path[:] = path
    os.chdir(folder)
    common: Any = None
    with on_threads(threads):
        while True:
            task = pool.recv_bytes()
            try:
                common = common or pickle.loads(pickled)
                function, item = pickle.loads(task)
                answer = _dumps((function(*common, item), None))
            except BaseException as error:
                error.add_note(f"In a worker process:\n{traceback.format_exc()}")
                answer = _pickled_error(error)
            with contextlib.suppress(OSError):
                print(end="", flush=True)  # what the function has printed
            pool.send_bytes(answer)


def _pickled_error(error: BaseException) -> bytes:
    try:
        answer = _dumps((None, error))
        pickle.loads(answer)  # fails for an exception whose arguments are not its constructor's
    except Exception:
        return _dumps((None, RuntimeError("".join(traceback.format_exception(error)))))
    return answer
