"""What processes that share a database need of it: a lock, patience while it is away, a pulse.

PostgreSQL serves any number of machines; an SQLite file serves the processes of one.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from harness.config import UserError
from harness.places import sqlite_file, unusable, without_password
from studies.runner import stopping

if TYPE_CHECKING:
    from sqlalchemy import Engine

Result = TypeVar("Result")

CONNECTING = {
    "connect_timeout": "4",  # seconds for each address of a host; localhost has two
    "keepalives_idle": "30",
    "tcp_user_timeout": "20000",  # ms: a connection into the void is given up
    "options": "-c timezone=utc",  # Optuna's heartbeats have no time zone
}
"""Options of libpq, unless the URL has its own."""

PATIENCE = 600.0
"""Seconds for which a database may be away before a study gives up."""

LONGEST_PAUSE = 10.0
"""Seconds, at most, between two attempts."""

SILENCE = 60
"""Seconds after which PostgreSQL takes a lock from a process that is stopped."""

_forking = threading.Lock()
"""Held by a thread while it works, and by whoever forks: no child inherits a lock half-way."""

_patience = threading.local()
"""Whether this thread is within `patiently`."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_forking.acquire,
        after_in_parent=_forking.release,
        after_in_child=_forking.release,
    )


def is_postgres(url: str) -> bool:
    """Say whether a URL names a PostgreSQL database that psycopg opens."""
    return url.partition("://")[0] in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2")


def check_kind(url: str) -> None:
    """Refuse a database that has no lock here.

    Raises:
        UserError: it is neither SQLite nor PostgreSQL.
    """
    if sqlite_file(url) is None and not is_postgres(url):
        raise UserError(
            f"--storage {without_password(url)}: studies are kept in SQLite or PostgreSQL; give "
            "sqlite:///FILE, or postgresql+psycopg://USER@HOST/DATABASE"
        )


def engine_options(url: str) -> dict[str, Any]:
    """Return what SQLAlchemy's engine is made with: a connection that is gone is made anew."""
    if not is_postgres(url):
        return {"connect_args": {"timeout": 60}}
    from sqlalchemy import make_url

    own = make_url(url).query
    given = {name: value for name, value in CONNECTING.items() if name not in own}
    return {"pool_pre_ping": True, "connect_args": given}


def exclusive(url: str, name: str) -> AbstractContextManager[object]:
    """Return the lock of a name among all processes that share a database; not re-entrant.

    The kernel, or the PostgreSQL server, takes it from a process that dies. PostgreSQL takes it
    also from one that is stopped for `SILENCE`; then leaving the lock is an error.

    Args:
        url: SQLAlchemy URL of the database.
        name: what is locked.

    Raises:
        UserError: the database is of a kind that has no lock here.
    """
    check_kind(url)
    digest = hashlib.sha256(name.encode()).digest()
    file = sqlite_file(url)
    if file is not None:
        return FileLock(f"{file}.{digest[:4].hex()}.lock")
    return _advisory(url, int.from_bytes(digest[:8], signed=True))


@cache
def _lock_engine(url: str) -> Engine:
    """Return what connects for a lock alone; no connection is kept that has none."""
    from sqlalchemy import NullPool, create_engine

    return create_engine(url, poolclass=NullPool, **engine_options(url))


@contextmanager
def _advisory(url: str, key: int) -> Iterator[None]:
    """Hold a lock of a transaction, which works through a pool of connections too (pgbouncer)."""
    from sqlalchemy import text

    with _lock_engine(url).connect() as connection, connection.begin():
        wanted = f"set local idle_in_transaction_session_timeout = '{SILENCE}s'"
        connection.execute(text(wanted))
        connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": key})
        with pulse(lambda: connection.execute(text("select 1")), SILENCE / 4):
            yield


@contextmanager
def pulse(beat: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call a function every so many seconds beside the work, in a thread, whatever it raises.

    It is never under way while the process forks: a child would inherit its locks as they are.
    """
    done = threading.Event()

    def live() -> None:
        while not done.wait(seconds):
            with _forking, suppress(Exception):
                beat()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def is_away(error: BaseException) -> bool:
    """Say whether an error means that a database does not answer now, and later may."""
    from sqlalchemy.exc import (
        DBAPIError,
        InterfaceError,
        OperationalError,
        PendingRollbackError,
    )

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PendingRollbackError):  # a pulse found the connection lost
            return True
        if isinstance(cause, DBAPIError):
            if type(cause.orig).__module__.startswith("sqlite3"):
                return "locked" in str(cause.orig)
            lost = cause.connection_invalidated
            return lost or isinstance(cause, OperationalError | InterfaceError)
        cause = cause.__cause__ or cause.__context__
    return False


def patiently(work: Callable[[], Result], url: str) -> Result:
    """Do what may be done twice, again and again while its database is away.

    Args:
        work: what is done.
        url: the database, for the message.

    Raises:
        UserError: the database was away for `PATIENCE`.
    """
    if getattr(_patience, "begun", False):  # what is under way is repeated as a whole
        return work()
    given_up, pause = time.monotonic() + PATIENCE, 0.1
    while True:
        try:
            _patience.begun = True
            return work()
        except Exception as error:
            if not is_away(error):
                raise
            if time.monotonic() > given_up:
                raise unusable(url, "--storage", error) from error
        finally:
            _patience.begun = False
        stopping.check()
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
