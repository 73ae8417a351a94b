"""The spool of a server: whole runs on disk until the server has them, delivered by a thread.

A process has a folder `HOST-PROCESS-TOKEN` below its server's, locked while it lives, and in it a
folder for each run, named by its key: `writes.jsonl`, a line for each write, and `files/NAME`,
the files that a write uploads. The thread sends what has been appended, in order, and removes the
folder of a run once its end is delivered. The folder of an ended process is taken over by the next
one, which repeats its runs from the beginning and ends those that have no end.

Only the last line of a run is synchronised, with all before it: a run without it is trained again.
"""

import atexit
import errno
import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import requests
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from harness.errors import UserError
from harness.tracking.addresses import LOGIN, causes, is_server, reason, without_secrets
from harness.tracking.runs import KEY, Write, create, is_deleted, perform

WRITES = "writes.jsonl"
END = b'{"kind": "end"'  # how the last line of a run begins
REFUSALS = (400, 401, 403, 404)  # after any other HTTP code a write is sent again
PATIENCE = 60.0  # seconds without an answer after which a server counts as away

logger = logging.getLogger(__name__)


def status(error: BaseException | None) -> int | None:
    """Return the HTTP code of an error of MLflow's client, None where there was no answer.

    MLflow 3.17.2 has 500 for what it does not translate: no answer, and JSON without its codes.
    """
    if isinstance(error, MlflowException):
        return error.get_http_status_code()
    if isinstance(error, requests.RequestException) and error.response is not None:
        return error.response.status_code
    return None


def root_reason(error: BaseException) -> str:
    """Return in a few words why a server did not answer: the error behind all others."""
    return reason([*causes(error)][-1])


def refused(uri: str, what: str, error: BaseException, folder: Path | None = None) -> UserError:
    """Return the error of a request that a server refuses."""
    hint = "check the run, its experiment and your rights"
    if status(error) == 401:
        hint = f"set {LOGIN}"
    elif folder is not None:
        hint += f", and delete {folder} to give its records up"
    store = f"the MLflow server at {uri}" if is_server(uri) else without_secrets(uri)
    return UserError(f"{store} refuses {what} ({reason(error)}); {hint}")


@dataclass
class _Delivery:
    """A run on disk, and how much of it the server has; `inherited` from an ended process."""

    folder: Path
    inherited: bool
    run_id: str = ""
    experiment: str = ""
    offset: int = 0
    failures: int = 0
    deleted: bool = False
    refusal: UserError | None = None

    @property
    def file(self) -> Path:
        return self.folder / WRITES

    def waits(self) -> bool:
        with suppress(FileNotFoundError):  # all is delivered
            left = self.inherited or self.file.stat().st_size > self.offset
            return left and self.refusal is None
        return False

    def unsent(self) -> list[tuple[Write, int]]:
        """Return the writes that the server lacks, with the offset after each; metrics joined."""
        writes: list[tuple[Write, int]] = []
        offset = self.offset
        with self.file.open("rb") as lines:
            lines.seek(offset)
            for line in lines:
                if not line.endswith(b"\n"):  # torn, or being written
                    break
                write, offset = json.loads(line), offset + len(line)
                if write["kind"] == "metrics" and writes and writes[-1][0]["kind"] == "metrics":
                    before, _ = writes.pop()
                    before["values"] += write["values"]
                    write = before
                writes.append((write, offset))
        if self.inherited and offset and not _has_end(self.file):
            end = {"kind": "end", "status": "KILLED", "reason": "its process ended"}
            writes.append(({**end, "time": int(self.file.stat().st_mtime * 1000)}, offset))
        return writes


class Spool:
    """The runs that this process writes to one server; its folder is shared by all processes."""

    def __init__(self, folder: Path, uri: str, client: MlflowClient) -> None:
        self.folder, self.uri, self._client = folder, uri, client
        self._home = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._locks: dict[Path, FileLock] = {}  # of this process's folder and inherited ones
        self._runs: dict[str, _Delivery] = {}
        self._complete: set[str] = set()  # inherited runs that had an end
        self._appended, self._retry = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._away, self._answered = "", 0.0
        self._take_over()

    def put(self, key: str, write: Write) -> None:
        """Append a write with copies of its files; what the server has refused is an error."""
        folder = self._home / key
        try:
            if write["kind"] == "create":
                self._begin(folder)
            elif write["kind"] == "files":
                copy = shutil.copytree(write["folder"], folder / "files" / uuid.uuid4().hex)
                write = {**write, "folder": copy.name}
            elif write["kind"] == "end":
                for path in [*folder.rglob("*"), folder]:
                    _synchronise(path)
            _append(folder / WRITES, write)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({error.strerror or error}), where records wait for "
                "their server; make room there, then the same command goes on"
            ) from error
        self._start(folder)
        if key in self._runs and (refusal := self._runs[key].refusal):
            raise refusal

    def _begin(self, folder: Path) -> None:
        if self._home not in self._locks:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{self._home}.lock", thread_local=False)
            lock.acquire()  # before the folder exists, which others would take over
            self._locks[self._home] = lock
            atexit.register(self._remove, self._home)
        folder.mkdir(parents=True)

    def _start(self, folder: Path) -> None:
        self._runs.setdefault(folder.name, _Delivery(folder, folder.parent != self._home))
        self._appended.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="spool", daemon=True)
            self._thread.start()

    def undelivered(self) -> set[str]:
        """Return the keys of the runs on this disk that the server does not have whole."""
        return {file.parent.name for file in self.folder.glob(f"*/*/{WRITES}")}

    def complete(self) -> set[str]:
        """Return the keys of runs whose end is on this disk, or was when this process started."""
        files = self.folder.glob(f"*/*/{WRITES}")
        return self._complete | {file.parent.name for file in files if _has_end(file)}

    def deliver(self, keys: set[str] | None, *, wait_while_answering: bool = False) -> None:
        """Wait until the server has what was written of some runs; see `Store.deliver`."""
        start, pause = time.monotonic(), 0.01
        while self._waits(keys) and not (self._away and wait_while_answering):
            if time.monotonic() - max(start, self._answered) > PATIENCE:
                runs = len(self.undelivered())
                raise UserError(
                    f"the MLflow server at {self.uri} does not answer ({self._away or 'busy'}); "
                    f"records of {runs} run{'s' * (runs != 1)} wait in {self.folder}, and the "
                    "same command delivers them and goes on once the server is back"
                )
            self._retry.set()
            time.sleep(pause)
            pause = min(2 * pause, 1)

    def _waits(self, keys: set[str] | None) -> bool:
        self._take_over()  # of processes that have ended meanwhile
        runs = {k: run for k, run in dict(self._runs).items() if keys is None or k in keys}
        for run in runs.values():
            if run.refusal is not None and (keys is not None or not run.inherited):
                raise run.refusal
        others = ((keys or set()) - runs.keys()) & self.undelivered()
        return any(run.waits() for run in runs.values()) or bool(others & self.complete())

    def _take_over(self) -> None:
        """Deliver the runs of ended processes."""
        for folder in self.folder.glob("*/"):
            if folder in self._locks:
                continue
            lock = FileLock(f"{folder}.lock", timeout=0, thread_local=False)
            try:
                lock.acquire()
            except (Timeout, OSError):  # its process runs, or another one was first
                continue
            self._locks[folder] = lock
            for run in folder.glob("*/"):
                if _has_end(run / WRITES):
                    self._complete.add(run.name)
                self._start(run)
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        """Remove the folder of a process and its lock, unless runs are left in it."""
        with suppress(OSError):
            if folder.exists():
                folder.rmdir()
            if lock := self._locks.pop(folder, None):  # the thread may have been first
                Path(lock.lock_file).unlink()
                lock.release()

    def _work(self) -> None:
        """Deliver what is appended; the thread runs this method and those below."""
        pause = 1.0
        while True:
            self._appended.wait()
            self._appended.clear()
            try:
                # What has failed comes last, so that it does not hold up others.
                for run in sorted(dict(self._runs).values(), key=lambda run: run.failures):
                    self._send(run)
                pause = 1.0
            except Exception as error:  # no answer, or one that may pass
                run.failures += 1
                self._note(root_reason(error))
                self._appended.set()
                self._retry.clear()
                self._retry.wait(pause)
                pause = min(2 * pause, 60.0)

    def _send(self, run: _Delivery) -> None:
        if not run.waits():
            return
        try:
            writes = run.unsent() if run.file.exists() else []
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{run.folder}, with records for an MLflow server, cannot be read"
            self._refuse(run, UserError(f"{problem} ({reason(error)}); delete it to give them up"))
            return
        if run.inherited and not writes:  # it was not begun, or its end is delivered
            self._finish(run)
        for write, offset in writes:
            try:
                if not run.deleted:
                    self._perform(run, write)
            except Exception as error:
                if status(error) not in REFUSALS:
                    raise
                if run.run_id and is_deleted(self._client, run.run_id):
                    gone = "was deleted in MLflow; its further records are dropped"
                    logger.warning("Run %s %s", run.run_id, gone)
                    run.deleted = True
                    self._appended.set()
                    return
                what = f"to write run {run.folder.name}"
                self._refuse(run, refused(self.uri, what, error, run.folder))
                return
            self._note("")
            if write["kind"] == "end":
                self._finish(run)
            run.offset = offset

    def _refuse(self, run: _Delivery, refusal: UserError) -> None:
        if run.inherited:  # no code of this process waits for it
            logger.warning("%s", refusal)
        run.refusal = refusal

    def _perform(self, run: _Delivery, write: Write) -> None:
        if write["kind"] == "create":
            run.experiment = write["experiment"]
            key = run.folder.name
            run.run_id = min(self._found(run), default="") or create(self._client, key, write)
        elif write["kind"] == "files":
            write = {**write, "folder": str(run.folder / "files" / write["folder"])}
        perform(self._client, run.run_id, write)
        if write["kind"] == "end":
            for duplicate in self._found(run) - {run.run_id}:  # of a request without an answer
                self._client.delete_run(duplicate)

    def _found(self, run: _Delivery) -> set[str]:
        found = self._client.search_runs([run.experiment], f"tags.{KEY} = '{run.folder.name}'")
        return {one.info.run_id for one in found}

    def _finish(self, run: _Delivery) -> None:
        run.file.unlink(missing_ok=True)  # first: without it, the run counts as delivered
        shutil.rmtree(run.folder, ignore_errors=True)
        del self._runs[run.folder.name]
        if run.inherited:
            self._remove(run.folder.parent)

    def _note(self, away: str) -> None:
        """Note whether the server answers, and log when that changes."""
        if away and not self._away:
            what = f"does not answer ({away}); training goes on, and records wait in {self.folder}"
            logger.warning("The MLflow server at %s %s.", self.uri, what)
        elif self._away and not away:
            logger.warning("The MLflow server at %s is back.", self.uri)
        self._away = away
        self._answered = self._answered if away else time.monotonic()


def _has_end(file: Path) -> bool:
    """Return whether the last whole line of a run is its end."""
    with suppress(OSError), file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 65_536))
        return opened.read().rpartition(b"\n")[0].rpartition(b"\n")[2].startswith(END)
    return False


def _append(file: Path, write: Write) -> None:
    """Append a line; one that could not be written whole is taken back."""
    line = json.dumps(write).encode() + b"\n"
    with file.open("ab", buffering=0) as opened:  # a buffer would be written again on closing
        before = opened.tell()
        try:
            if opened.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if write["kind"] == "end":
                os.fsync(opened.fileno())
        except OSError:
            os.truncate(file, before)
            raise


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
