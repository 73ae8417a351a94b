"""The process that worker processes are forked from.

It imports PyTorch once and never runs `__main__`. The server of `multiprocessing` would be shared
with a user's `Process`, and its workers outlive a killed parent. This module imports nothing heavy:
a command line may `start` the server before it imports PyTorch itself.
"""

import contextlib
import fcntl
import os
import select
import signal
import sys
import threading
import weakref
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle

PROGRAM = """
import sys
sys.path[:] = sys.argv[1:]
from harness.forkserver import serve
serve()
"""

# Imported for all workers: first for training, and once training has begun for measuring.
FIRST = ["harness.processes", "harness.training.engine"]
LATER = ["harness.metrics.quality", "sklearn.neighbors", "sklearn.pipeline", "sklearn.linear_model"]

# NumPy's threads would run before a fork. Blocks below 32 MB are of the heap, which keeps 128 MB: a
# likelihood takes 1.4 times as long if the kernel zeroes pages for each tensor.
VARIABLES = {"OPENBLAS_NUM_THREADS": "1"}
VARIABLES |= {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**27)}

_lock = threading.Lock()
_server: tuple[Connection, ...] = ()
_ours = weakref.WeakSet[Connection]()  # made by this process; its forked children close them


def start() -> None:
    """Start the server unless it runs; returns at once, while the server imports PyTorch."""
    global _server
    with _lock:
        _server = _server or _started()


def fork() -> tuple[Connection, Connection]:
    """Start a worker, which calls the function that it is sent first; return connection, lifeline.

    The kernel kills the worker when the lifeline closes, and so when this process ends in any way.
    """
    global _server
    start()
    here, there, lifeline = _linked()
    with there, _lock:
        try:
            send_handle(_server[0], there.fileno(), 0)
        except ConnectionError:  # the server was killed
            _server = _started()
            send_handle(_server[0], there.fileno(), 0)
    return here, lifeline


def failure() -> OSError | None:
    """Return why the server could not fork the last worker, None if it could, or has ended."""
    with contextlib.suppress(EOFError, OSError):
        return _server[0].recv() if _server and _server[0].poll() else None
    return None


def _started() -> tuple[Connection, Connection]:
    here, there, lifeline = _linked()
    with there:
        os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", PROGRAM, *sys.path],
            os.environ | VARIABLES,
            file_actions=[(os.POSIX_SPAWN_DUP2, there.fileno(), 0)],
            setsigmask=[signal.SIGINT, signal.SIGTERM],  # a scheduler sends them to all processes
        )
    return here, lifeline


def _linked() -> tuple[Connection, Connection, Connection]:
    """Return both ends of a connection, and the lifeline of the process at the second one."""
    (here, there), (alive, lifeline) = Pipe(), Pipe(duplex=False)
    with alive:
        send_handle(here, alive.fileno(), 0)
    _ours.update((here, lifeline))
    return here, there, lifeline


def _live_with(connection: Connection) -> None:
    # The kernel kills this process when the lifeline of its connection closes.
    alive = recv_handle(connection)
    fcntl.fcntl(alive, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(alive, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(alive, fcntl.F_SETFL, os.O_ASYNC)
    if select.select([alive], [], [], 0)[0]:
        os._exit(0)  # it has closed already


def _leave() -> None:
    # A forked child leaves server and workers to its parent, and starts others.
    global _lock, _server
    for connection in _ours:
        connection.close()
    _lock, _server = threading.Lock(), ()


os.register_at_fork(after_in_child=_leave)


def serve() -> None:
    """Fork a worker for every connection that comes through standard input, until it closes."""
    os.closerange(3, 1 << 16)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers that have ended vanish
    parent, later = Connection(0), iter(LATER)
    with contextlib.suppress(EOFError):
        _live_with(parent)
        for name in FIRST:
            __import__(name)
        while True:
            worker = Connection(recv_handle(parent))
            try:
                child = os.fork()
            except OSError as error:  # a limit on processes, or too little memory
                child = -1
                parent.send(error)
            if child == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                with contextlib.suppress(EOFError, OSError):  # the pool has been closed
                    _live_with(worker)
                    worker.recv()(worker)
                os._exit(0)
            worker.close()
            while not parent.poll(0.5) and (name := next(later, "")):
                __import__(name)
