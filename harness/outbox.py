"""What is written to a server: tried at once, kept in a journal while the server is away.

Training never waits for a server that is gone: after a write that failed the next attempt comes
1, 2, 4, ... 60 s later, and after one that took t > 0.5 s at least 9 t later, so that attempts cost
a tenth of the time. Whatever is written meanwhile goes to the end of the journal. No thread is
involved, since the engine forks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from harness.config import UserError
from harness.journal import WRITES, Journal, Write

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds until the next attempt after the first failure, doubled with every further one."""

SLOW, SHARE = 0.5, 0.1
"""Seconds from which on an answer is slow, and the share of time that slow answers may cost."""

PATIENCE = 30.0
"""Seconds without an answer after which the end of a study no longer waits for its server."""


class Unavailable(Exception):
    """A server cannot be reached, or answers that it is broken or busy: this may pass."""


class Sender(Protocol):
    """What delivers single writes."""

    def send(self, write: Write, run_id: str | None, *, again: bool) -> str:
        """Deliver a write and return the run's id; `again`: it may have been delivered before.

        Raises:
            Unavailable: not now.
            UserError: the server refuses the write.
        """

    def remove_others(self, experiment: str, key: str, run_id: str) -> None:
        """Delete runs with the same key, made by requests whose answers were lost.

        Raises:
            Unavailable: not now.
        """


class Pace:
    """When a server is asked next."""

    def __init__(self) -> None:
        self._next = 0.0
        self._failures = 0

    def ready(self) -> bool:
        """Say whether the server may be asked now."""
        return time.monotonic() >= self._next

    def note(self, seconds: float, *, answered: bool) -> None:
        """Take into account how long an attempt took and whether there was an answer."""
        self._failures = 0 if answered else self._failures + 1
        pause = min(FIRST_PAUSE * 2 ** (self._failures - 1), LONGEST_PAUSE) if self._failures else 0
        if seconds > SLOW:
            pause = max(pause, seconds * (1 - SHARE) / SHARE)
        self._next = time.monotonic() + pause


class Outbox:
    """All writes of this process to one server, in order.

    Args:
        folder: where journals of the server are.
        address: of the server, as users are told.
        sender: delivers single writes.
        journal: one that was taken over.
    """

    def __init__(
        self, folder: Path, address: str, sender: Sender, journal: Journal | None = None
    ) -> None:
        self.folder, self.address = folder, address
        self._sender, self._journal = sender, journal
        self._pace = Pace()
        self._run_ids: dict[str, str] = {} if journal is None else journal.run_ids
        self._open: dict[str, str] = {} if journal is None else dict(journal.unfinished)
        # Runs whose creation was tried more than once: the server may have made two.
        self._doubtful: dict[str, str] = {} if journal is None else dict(journal.created)
        self._error = ""

    def put(self, write: Write) -> None:
        """Deliver a write after all that wait, or let it wait behind them.

        Raises:
            UserError: the server refuses it, or it can be neither delivered nor kept.
        """
        while self._waits() and self._pace.ready():
            self._deliver_first()
        if self._waits() or not (self._pace.ready() and self._sent(write, again=False)):
            self._keep(write)
        self._open[write.run] = write.experiment
        if write.kind == "end":
            del self._open[write.run]

    def run_id(self, key: str) -> str:
        """Return the id that the server gave a run, waiting for the server if need be.

        Raises:
            UserError: as `settle`.
        """
        if key not in self._run_ids:
            self.settle()
        return self._run_ids[key]

    def known(self, key: str) -> str:
        """Return the id of a run, or its key where the server has not given an id yet."""
        return self._run_ids.get(key, key)

    def end_open(self, status: str, reason: str) -> bool:
        """End every run that is open, with the reason as a tag; says whether all is delivered."""
        for key, experiment in list(self._open.items()):
            why = {"name": "reason", "value": reason}
            self.put(Write(key, experiment, "tag", why))
            end = {"status": status, "time": int(time.time() * 1000)}
            self.put(Write(key, experiment, "end", end))
        return not self._waits()

    def settle(self) -> None:
        """Deliver what waits, of this process and of dead ones; return when nothing does.

        Raises:
            UserError: the server has not answered for `PATIENCE` seconds, or refuses a write.
        """
        self._empty()
        for folder in sorted(found.parent for found in self.folder.glob(f"*/{WRITES}")):
            journal = Journal.left(folder)
            if journal is not None:
                dead = Outbox(self.folder, self.address, self._sender, journal)
                dead._finish()
                self._run_ids |= dead._run_ids
                self._doubtful |= dead._doubtful
        self._remove_twins([key for key in self._doubtful if key not in self._open])

    def _finish(self) -> None:
        """Deliver what a dead process left, and end what it had not ended."""
        assert self._journal is not None
        if self._waits():
            # All that it wrote later is here too. Else its last writes went straight to the server.
            self.end_open("KILLED", "its process is gone")
            self._empty()
        else:
            self._journal.remove()

    def _empty(self) -> None:
        last = time.monotonic()
        told = False
        if self._waits():
            _say(f"Delivering what waits for the MLflow server at {self.address}.")
        while self._waits():
            if self._deliver_first():
                last = time.monotonic()
            elif time.monotonic() - last > PATIENCE:
                raise self._lost()
            else:
                if not told:
                    _say(f"It does not answer; waiting up to {PATIENCE:.0f} s.")
                told = True
                time.sleep(FIRST_PAUSE)

    def _waits(self) -> bool:
        return self._journal is not None and bool(self._journal.waiting)

    def _deliver_first(self) -> bool:
        """Try to deliver the first write that waits, and say whether that worked."""
        assert self._journal is not None
        _, write = self._journal.waiting[0]
        if not self._sent(write, again=True):
            return False
        self._journal.delivered()
        if not self._waits():
            self._close()
        return True

    def _sent(self, write: Write, *, again: bool) -> bool:
        start, answered = time.monotonic(), False
        try:
            self._run_ids[write.run] = self._sender.send(
                write, self._run_ids.get(write.run), again=again
            )
            answered = True
        except Unavailable as error:
            self._first_failure(str(error))
        except UserError as error:
            raise self._refused(error) from error
        finally:
            self._pace.note(time.monotonic() - start, answered=answered)
        if answered and write.kind == "end":
            self._remove_twins([write.run])
        return answered

    def _remove_twins(self, keys: Iterable[str]) -> None:
        """Delete what late answers to lost requests have made of runs; what fails is tried again.

        That of a run which is not over may still come.
        """
        for key in [key for key in keys if key in self._doubtful and key in self._run_ids]:
            try:
                self._sender.remove_others(*self._identity(key))
            except Unavailable:
                return
            except UserError as error:
                _say(f"A run may be there twice: {error}.")
            if key not in self._open:
                del self._doubtful[key]

    def _identity(self, key: str) -> tuple[str, str, str]:
        return self._doubtful[key], key, self._run_ids[key]

    def _keep(self, write: Write) -> None:
        if self._journal is None:
            self._journal = Journal.new(self.folder)
            self._journal.run_ids = self._run_ids
        self._journal.keep(write)
        if write.kind == "create":
            self._doubtful[write.run] = write.experiment

    def _close(self) -> None:
        """Remove the journal, all delivered, and the twins of its runs."""
        assert self._journal is not None
        self._journal.remove()
        self._journal = None
        if self._error:
            _say(f"The MLflow server at {self.address} is back; all records are delivered.")
            self._error = ""
        self._remove_twins(self._doubtful)

    def _first_failure(self, reason: str) -> None:
        if not self._error:
            _say(
                f"The MLflow server at {self.address} does not answer ({reason}); training goes "
                f"on, and records are kept in {self.folder} until it does."
            )
        self._error = reason

    def _lost(self) -> UserError:
        assert self._journal is not None
        runs = len({write.run for _, write in self._journal.waiting})
        return UserError(
            f"the MLflow server at {self.address} does not answer ({self._error}); records of "
            f"{runs} runs wait in {self._journal.folder}, and the same command delivers them and "
            "goes on once the server is back"
        )

    def _refused(self, error: UserError) -> UserError:
        if not self._waits():
            return error
        assert self._journal is not None
        return UserError(f"{error}; delete {self._journal.folder} to give the records in it up")


def _say(sentence: str) -> None:
    print(f"\n{sentence}", file=sys.stderr)
