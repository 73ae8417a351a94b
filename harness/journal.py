"""Writes that wait for their server, on disk: appended and synchronised one by one, in order.

A journal is a folder: `writes.jsonl` with a line for each write, `files/N` with what write N
uploads, and `done.txt` with a line for each write that was delivered. It is locked by the process
that it belongs to and free once that is dead, so that another delivers it, and never two at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from harness.config import UserError
from harness.places import alive, own_process

WRITES, DONE, FILES, LOCK = "writes.jsonl", "done.txt", "files", "lock"

LINGERING = 20
"""Seconds in which the workers of a dead process, which may hold its lock, are gone too."""


@dataclass(frozen=True)
class Write:
    """One write to a run, as plain values.

    Attributes:
        run: key of the run, which stands for its id until the server has given one.
        experiment: id of the run's experiment.
        kind: create, batch, tag, input, files or end.
        values: what is written.
        folder: files that are uploaded.
    """

    run: str
    experiment: str
    kind: str
    values: dict[str, Any] = field(repr=False)
    folder: Path | None = field(default=None, repr=False)


class Journal:
    """The journal of one process, created by `Journal.new` or taken over by `Journal.left`.

    Attributes:
        folder: where it is.
        waiting: writes that are not delivered, with their numbers.
        run_ids: key -> id of the runs that the server has.
        created: key -> experiment of the runs whose creation was written here.
        unfinished: key -> experiment of the runs whose end was not written.
    """

    def __init__(self, folder: Path, lock: FileLock) -> None:
        self.folder = folder
        self.waiting: deque[tuple[int, Write]] = deque()
        self.run_ids: dict[str, str] = {}
        self.created: dict[str, str] = {}
        self.unfinished: dict[str, str] = {}
        self._lock, self._count = lock, 0

    @classmethod
    def new(cls, parent: Path) -> Journal:
        """Create a journal of this process.

        Raises:
            UserError: nothing can be written there.
        """
        own = own_process()
        folder = parent / f"{own['host']}-{own['process']}-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir(parents=True)
            lock = FileLock(folder / LOCK)
            lock.acquire()
            # Last, since others look at folders with this file only.
            (folder / WRITES).touch()
        except OSError as error:
            raise _unwritable(folder, error) from error
        return cls(folder, lock)

    @classmethod
    def left(cls, folder: Path) -> Journal | None:
        """Take over what a dead process left; None if it is not dead, or there is nothing.

        Raises:
            UserError: a line of it, but the last, is broken.
        """
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=LINGERING if _owner_is_gone(folder) else 0)
        except (Timeout, OSError):
            return None
        journal = cls(folder, lock)
        if (folder / WRITES).exists():
            journal._read()
        return journal

    def keep(self, write: Write) -> None:
        """Append a write with copies of its files; it survives the process and a power cut.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        number = self._count
        try:
            if write.folder is not None:
                write = replace(write, folder=self._copied(write.folder, number))
            line = {**vars(write), "folder": write.folder and str(number)}
            line["run_id"] = self.run_ids.get(write.run)
            _append(self.folder / WRITES, json.dumps(line))
        except OSError as error:
            shutil.rmtree(self._files(number), ignore_errors=True)
            raise _unwritable(self.folder, error) from error
        self._note(number, write)

    def delivered(self) -> None:
        """Note that the first waiting write was delivered; all together are removed with `remove`.

        Neither synchronised nor vital: a write that is delivered twice changes nothing.
        """
        number, write = self.waiting.popleft()
        with contextlib.suppress(OSError), (self.folder / DONE).open("a") as done:
            done.write(f"{number} {write.run} {self.run_ids[write.run]}\n")
        if write.folder is not None:
            shutil.rmtree(write.folder, ignore_errors=True)

    def remove(self) -> None:
        """Delete the journal, of which nothing waits any more."""
        (self.folder / WRITES).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def _note(self, number: int, write: Write) -> None:
        self._count = number + 1
        self.waiting.append((number, write))
        if write.kind == "create":
            self.created[write.run] = write.experiment
        self.unfinished[write.run] = write.experiment
        if write.kind == "end":
            del self.unfinished[write.run]

    def _files(self, number: int) -> Path:
        return self.folder / FILES / str(number)

    def _copied(self, folder: Path, number: int) -> Path:
        copy = self._files(number)
        shutil.rmtree(copy, ignore_errors=True)  # of a process that died over it
        shutil.copytree(folder, copy)
        for path in [*copy.rglob("*"), copy, copy.parent, self.folder]:
            _synchronise(path)
        return copy

    def _read(self) -> None:
        for number, line in enumerate(_whole_lines(self.folder / WRITES)):
            try:
                values = json.loads(line)
                run_id, stored = values.pop("run_id"), values.pop("folder")
                folder = stored and self.folder / FILES / stored
                write = Write(**values, folder=folder)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(
                    f"{self.folder / WRITES} is broken in line {number + 1}; delete {self.folder} "
                    "to give its records up"
                ) from error
            if run_id is not None:
                self.run_ids[write.run] = run_id
            self._note(number, write)
        for number, run, run_id in self._acknowledged():
            self.run_ids[run] = run_id
            while self.waiting and self.waiting[0][0] <= number:
                self.waiting.popleft()

    def _acknowledged(self) -> list[tuple[int, str, str]]:
        """Read what was delivered; lines that a power cut tore apart say nothing."""
        words = [line.split() for line in _whole_lines(self.folder / DONE)]
        whole = [line for line in words if len(line) == 3 and line[0].isdigit()]
        return [
            (int(number), run.decode(errors="replace"), run_id.decode(errors="replace"))
            for number, run, run_id in whole
        ]


def _owner_is_gone(folder: Path) -> bool:
    """Say whether a journal's process, named by its folder, was one of this machine and is dead."""
    host, process, _ = folder.name.rsplit("-", 2)
    return host == own_process()["host"] and not alive(int(process))


def _whole_lines(file: Path) -> list[bytes]:
    """Read the lines of a file, and cut off a torn last one, so that more can be appended."""
    if not file.exists():
        return []
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(file, len(whole))
    return whole.splitlines()


def _append(file: Path, line: str) -> None:
    """Append a line and wait until it is on disk; what could not be written whole is taken back."""
    whole = line.encode() + b"\n"
    with file.open("ab", buffering=0) as opened:  # a buffer would be written again on closing
        before = opened.seek(0, os.SEEK_END)
        try:
            if opened.write(whole) != len(whole):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
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


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder} cannot be written ({error.strerror or error}), where records wait for their "
        "server; make room there, then the same command goes on"
    )
