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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from filelock import FileLock

from harness.config import UserError
from harness.tracking import addresses, schema
from harness.tracking.addresses import DATABASE_PATIENCE as PATIENCE
from harness.tracking.addresses import is_locked, sqlite_file, trouble, unusable
from studies.runner import stopping

Result = TypeVar("Result")

SILENCE = 60  # seconds after which PostgreSQL takes locks from a process that is stopped

# Options of libpq, unless the URL has them.
CONNECTING = {
    "connect_timeout": "4",  # seconds for each address of a host; localhost has two
    "keepalives_idle": "30",
    "tcp_user_timeout": "20000",  # ms, after which a connection into the void is closed
    # Optuna's heartbeats have no time zone, and its transactions lock the rows of trials.
    "options": f"-c timezone=utc -c idle_in_transaction_session_timeout={SILENCE}s",
}
BEAT = "VAE_SWEEP_BEAT"  # variable with the seconds between heartbeats, the same for all processes
MISSED = 6  # heartbeats that a process may miss before its trials are reassigned
POSTGRES = ("postgresql", "postgresql+psycopg", "postgresql+psycopg2")  # kinds of URL of psycopg

_retrying = threading.local()


def checked_address(url: str | None) -> str:
    """Return the URL of Optuna's database; refuse one that cannot be used. Write nothing."""
    url = addresses.storage_address(url)
    schema.check_database(url, "--storage")
    if sqlite_file(url) is None:
        known = addresses.without_secrets(url)
        if url.partition("://")[0] not in POSTGRES or known == "***":
            give = "postgresql+psycopg://USER@HOST/DATABASE, with %40 for each @ of a password"
            where = f"--storage {known}: studies are kept in SQLite or PostgreSQL"
            raise UserError(f"{where}; give sqlite:///FILE, or {give}")
        with _connected(url) as connection:
            schema.check_tables(connection, url, "--storage")
    return url


def open_storage(url: str | None) -> optuna.storages.RDBStorage:
    """Open Optuna's database, creating its tables where they are missing."""
    url = checked_address(url)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seconds = heartbeat_seconds()
    try:
        if (file := sqlite_file(url)) and not file.exists():
            file.touch()  # with the rights of the umask, as SQLite's own are not
        with exclusive(url, "tables"), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.RDBStorage(
                url.replace("{", "{{").replace("}", "}}"),  # it fills in its version
                _engine_options(url),
                heartbeat_interval=seconds,
                grace_period=MISSED * seconds,
            )
    except Exception as error:  # any driver's error
        raise unusable(url, "--storage", error) from error


def read_storage(url: str) -> optuna.storages.RDBStorage:
    """Open Optuna's database to read a study that it has: without a lock, which is a file."""
    return optuna.storages.RDBStorage(url, _engine_options(url), skip_table_creation=True)


def has_study(url: str, name: str) -> bool:
    """Return whether a database has a study of a name; nothing is written, no tables either."""
    query = sqlalchemy.text("select 1 from studies where study_name = :name")
    with _connected(url) as connection:
        tables = sqlalchemy.inspect(connection).has_table("studies")
        return tables and connection.execute(query, {"name": name}).first() is not None


@contextmanager
def _connected(url: str) -> Iterator[sqlalchemy.Connection]:
    try:
        with _lock_engine(url).connect() as connection:
            yield connection
    except UserError:
        raise
    except Exception as error:  # any driver's error
        raise unusable(url, "--storage", error) from error


def alone(url: str, name: str, work: Callable[[], Result]) -> Result:
    """Call an idempotent function in the lock of a name, again while the database is away."""

    def locked() -> Result:
        with exclusive(url, name):
            return work()

    return retry(locked, url)


@contextmanager
def exclusive(url: str, name: str) -> Iterator[None]:
    """Hold the lock of a name among all processes that share a database; not re-entrant.

    The kernel, or the PostgreSQL server, takes it from a process that dies. PostgreSQL takes it
    also from one that is stopped for `SILENCE`; then leaving the lock is an error.
    """
    digest = hashlib.sha256(name.encode()).digest()
    if file := sqlite_file(url):
        with FileLock(f"{file}.{digest[:4].hex()}.lock"):
            yield
        return
    key = int.from_bytes(digest[:8], signed=True)
    with _lock_engine(url).connect() as connection, connection.begin():
        sql = connection.exec_driver_sql
        sql(f"set local idle_in_transaction_session_timeout = '{SILENCE}s'")
        sql(f"select pg_advisory_xact_lock({key})")  # of a transaction: works through pgbouncer
        with pulse(lambda: sql("select 1"), SILENCE / 4):
            yield


@cache
def _lock_engine(url: str) -> sqlalchemy.Engine:
    return sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, **_engine_options(url))


def _engine_options(url: str) -> dict[str, Any]:
    if sqlite_file(url) is not None:
        return {"connect_args": {"timeout": 60}}
    given = sqlalchemy.make_url(url).query
    options = {name: value for name, value in CONNECTING.items() if name not in given}
    return {"pool_pre_ping": True, "connect_args": options}  # a lost connection is replaced


@contextmanager
def pulse(beat: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call a function every so many seconds in a thread, and ignore its exceptions."""
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


def is_away(error: BaseException | None) -> bool:
    """Return whether an error means that a database does not answer now, and later may."""
    if isinstance(error, sqlalchemy.exc.PendingRollbackError):  # a pulse was first
        return True
    if not isinstance(error, sqlalchemy.exc.DBAPIError):
        return error is not None and is_away(error.__cause__ or error.__context__)
    if isinstance(error.orig, sqlite3.Error):
        return is_locked(error.orig)
    away = sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError
    return error.connection_invalidated or isinstance(error, away)


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
            away = is_away(error)
            if time.monotonic() > given_up if away else trouble(error):
                raise unusable(url, "--storage", error) from error
            if not away:
                raise
        finally:
            _retrying.begun = False
        stopping.check()
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def heartbeat_seconds() -> int:
    """Return the seconds between heartbeats."""
    given = os.environ.get(BEAT, "20")
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"{BEAT}={given!r}: give a whole number of seconds >= 1")
    return int(given)


def process_name(process: int | None = None) -> str:
    """Return the name of a process here, by default this one: "HOST/BOOT/PIDNS:PID:START".

    START, the process's start in ticks since the boot, differs for later processes of that id.
    Other machines may have the host's name, and the same number of a namespace.
    """
    process = process or os.getpid()
    return f"{_host()}:{process}:{_start(process)}"


def is_gone(owner: str) -> bool:
    """Return whether a process of this boot and container has ended; False for any other."""
    host, process, start = owner.rsplit(":", 2)
    return host == _host() and _start(int(process)) != start


def in_words(owner: str) -> str:
    """Return "process 4711 on node7" for a process's name."""
    machine, process, _ = owner.rsplit(":", 2)
    return f"process {process} on {machine.partition('/')[0]}"


def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"


def _start(process: int) -> str:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]
