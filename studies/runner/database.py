"""Optuna's database: a lock among processes, retries while it is away, heartbeats and owners.

PostgreSQL serves any number of machines, an SQLite file the processes of one.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import lazy_loader
import sqlalchemy
from filelock import FileLock

from harness.config import UserError
from harness.tracking.addresses import (
    alive,
    check_database,
    sqlite_file,
    storage_address,
    unusable,
    without_password,
)
from studies.runner import stopping

if TYPE_CHECKING:
    import optuna
else:
    optuna = lazy_loader.load("optuna")

Result = TypeVar("Result")

CONNECTING = {
    "connect_timeout": "4",  # seconds for each address of a host; localhost has two
    "keepalives_idle": "30",
    "tcp_user_timeout": "20000",  # ms, after which a connection into the void is closed
    "options": "-c timezone=utc",  # Optuna's heartbeats have no time zone
}
"""Options of libpq, unless the URL has them."""

PATIENCE = 600.0
"""Seconds for which a database may be away before `retry` gives up."""

SILENCE = 60
"""Seconds after which PostgreSQL takes a lock from a process that is stopped."""

BEAT = "VAE_SWEEP_BEAT"
"""Variable with the seconds between heartbeats (20); the same for all that share a study."""

MISSED = 6
"""Heartbeats that a process may miss before its trials are reassigned."""

_retrying = threading.local()


def is_postgres(url: str) -> bool:
    """Return whether a URL names a PostgreSQL database that psycopg opens."""
    return url.partition("://")[0] in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2")


def check_kind(url: str) -> None:
    """Refuse a database that is neither SQLite nor PostgreSQL, for which there is no lock."""
    if sqlite_file(url) is None and not is_postgres(url):
        raise UserError(
            f"--storage {without_password(url)}: studies are kept in SQLite or PostgreSQL; give "
            "sqlite:///FILE, or postgresql+psycopg://USER@HOST/DATABASE"
        )


def engine_options(url: str) -> dict[str, Any]:
    """Return the arguments of SQLAlchemy's engine; a lost connection is made anew."""
    if not is_postgres(url):
        return {"connect_args": {"timeout": 60}}
    given = sqlalchemy.make_url(url).query
    options = {name: value for name, value in CONNECTING.items() if name not in given}
    return {"pool_pre_ping": True, "connect_args": options}


def open_storage(url: str | None) -> optuna.storages.RDBStorage:
    """Open Optuna's database, creating its tables where they are missing."""
    url = storage_address(url)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_database(url, "--storage")
    check_kind(url)
    seconds = heartbeat_seconds()
    try:
        with exclusive(url, "tables"), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.RDBStorage(
                url, engine_options(url), heartbeat_interval=seconds, grace_period=MISSED * seconds
            )
    except Exception as error:  # any driver's error
        raise unusable(url, "--storage", error) from error


def has_study(url: str, name: str) -> bool:
    """Return whether a database has a study of a name; nothing is written, no tables either."""
    query = sqlalchemy.text("select 1 from studies where study_name = :name")
    try:
        with _lock_engine(url).connect() as connection:
            return connection.execute(query, {"name": name}).first() is not None
    except (sqlalchemy.exc.ProgrammingError, sqlalchemy.exc.OperationalError) as error:
        if is_away(error):
            raise unusable(url, "--storage", error) from error
        return False  # there are no tables


def study_names(storage: optuna.storages.RDBStorage) -> list[str]:
    """Return the names of all studies in a database."""
    return retry(lambda: optuna.get_all_study_names(storage), storage.url)


def exclusive(url: str, name: str) -> AbstractContextManager[object]:
    """Return the lock of a name among all processes that share a database; not re-entrant.

    The kernel, or the PostgreSQL server, takes it from a process that dies. PostgreSQL takes it
    also from one that is stopped for `SILENCE`; then leaving the lock is an error.
    """
    check_kind(url)
    digest = hashlib.sha256(name.encode()).digest()
    file = sqlite_file(url)
    if file is not None:
        return FileLock(f"{file}.{digest[:4].hex()}.lock")
    return _advisory(url, int.from_bytes(digest[:8], signed=True))


@cache
def _lock_engine(url: str) -> sqlalchemy.Engine:
    return sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, **engine_options(url))


@contextmanager
def _advisory(url: str, key: int) -> Iterator[None]:
    """Hold a lock of a transaction, which works through pgbouncer too."""
    text = sqlalchemy.text
    with _lock_engine(url).connect() as connection, connection.begin():
        timeout = f"set local idle_in_transaction_session_timeout = '{SILENCE}s'"
        connection.execute(text(timeout))
        connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": key})
        with pulse(lambda: connection.execute(text("select 1")), SILENCE / 4):
            yield


@contextmanager
def pulse(beat: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call a function every so many seconds in a thread, whatever it raises."""
    done = threading.Event()

    def live() -> None:
        while not done.wait(seconds):
            with suppress(Exception):
                beat()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def is_away(error: BaseException) -> bool:
    """Return whether an error means that a database does not answer now, and later may."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, sqlalchemy.exc.PendingRollbackError):  # a pulse was first
            return True
        if isinstance(cause, sqlalchemy.exc.DBAPIError):
            if isinstance(cause.orig, sqlite3.Error):
                code = getattr(cause.orig, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
                return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
            away = sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError
            return cause.connection_invalidated or isinstance(cause, away)
        cause = cause.__cause__ or cause.__context__
    return False


def retry(work: Callable[[], Result], url: str) -> Result:
    """Call an idempotent function until its database answers; within another call, once."""
    if getattr(_retrying, "begun", False):  # the outermost call repeats the whole
        return work()
    given_up, pause = time.monotonic() + PATIENCE, 0.1
    while True:
        try:
            _retrying.begun = True
            return work()
        except Exception as error:
            if not is_away(error):
                raise
            if time.monotonic() > given_up:
                raise unusable(url, "--storage", error) from error
        finally:
            _retrying.begun = False
        stopping.check()
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def heartbeat_seconds(environment: Mapping[str, str] = os.environ) -> int:
    """Return the seconds between heartbeats."""
    given = environment.get(BEAT, "20")
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"{BEAT}={given!r}: give a whole number of seconds >= 1")
    return int(given)


def process_name(process: int | None = None) -> str:
    """Return the name of a process of this machine, by default this one: "HOST/PIDNS:PID:START".

    START, the process's start in ticks of the kernel, differs for later processes of that id; it is
    "" where there is no /proc.
    """
    process = process or os.getpid()
    return f"{_host()}:{process}:{_start(process)}"


def is_here(owner: str) -> bool:
    """Return whether a process is of this machine and container."""
    return owner.rsplit(":", 2)[0] == _host()


def is_gone(owner: str) -> bool:
    """Return whether a process is known to have ended; of another machine that is never known."""
    if not is_here(owner):
        return False
    _, process, start = owner.rsplit(":", 2)
    return _start(int(process)) != start if start else not alive(int(process))


def in_words(owner: str) -> str:
    """Return "process 4711 on node7" for a process's name."""
    machine, process, _ = owner.rsplit(":", 2)
    return f"process {process} on {machine.partition('/')[0]}"


def _host() -> str:
    space, machine = Path("/proc/self/ns/pid"), socket.gethostname()
    return f"{machine}/{space.stat().st_ino}" if space.exists() else machine


def _start(process: int) -> str:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]
