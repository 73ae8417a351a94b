"""Where databases are, how one is created, and which process this is."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

from filelock import FileLock

from harness.config import UserError

USERINFO = re.compile(r"(?<=://)(?:[^/\s]*|[^/@\s:]*:(?!\d+(?:/|$))[^@\n]*)@")
"""User and password before an address's host; a password may hold all but line breaks and "@"."""

SECRET = re.compile(r"([?&;](?:password|passwd|pwd|token)=)[^&\s'\"]+", re.IGNORECASE)
"""A password among an address's options."""

DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Module of a database's driver -> what pip installs, where the names differ."""

TABLES = {"--tracking-uri": "experiments", "--storage": "studies"}
"""Option that names a database -> a table that the database has unless it is empty."""


def project_root() -> Path:
    """Return where databases and artifacts go by default: the repository, or where one stands."""
    repository = Path(__file__).resolve().parents[1]
    return repository if (repository / "pyproject.toml").exists() else Path.cwd()


def default_tracking() -> str:
    """Return the tracking URI of a user who names none: `mlflow.db` where databases go."""
    return f"sqlite:///{project_root()}/mlflow.db"


def tracking_address(uri: str | None) -> str:
    """Return a tracking URI, of None that of MLFLOW_TRACKING_URI or the default."""
    if uri is None:
        return os.environ.get("MLFLOW_TRACKING_URI") or default_tracking()
    return _given(uri, "--tracking-uri")


def storage_address(url: str | None) -> str:
    """Return the URL of Optuna's storage, of None `optuna.db` where databases go."""
    if url is None:
        return f"sqlite:///{project_root() / 'optuna.db'}"
    return _given(url, "--storage")


def _given(address: str, option: str) -> str:
    if not address.strip():
        raise UserError(f"{option} is empty; give an address, or leave it out")
    return address


def without_password(text: str) -> str:
    """Return an address, or a text with addresses in it, without their users and passwords."""
    return SECRET.sub(r"\1***", USERINFO.sub("", text))


def reason(error: BaseException) -> str:
    """Say in one line why something failed: what is to be installed, or the error's first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            package = DRIVERS.get(cause.name, cause.name)
            return f"{cause.name} is not installed: pip install '{package}'"
        cause = cause.__cause__ or cause.__context__
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return without_password(first)


SHORTAGES = {
    "disk": ("database or disk is full", "disk I/O error"),
    "memory": ("can't allocate memory", "out of memory", "a worker process was killed"),
}
"""What lacks -> words of libraries that say so, SQLite's and PyTorch's."""

LACKING = {errno.ENOSPC: "disk", errno.EDQUOT: "disk", errno.EFBIG: "disk", errno.ENOMEM: "memory"}
"""What lacks by the system's error number."""


def shortage(error: BaseException) -> str | None:
    """Say what an error or one of its causes is a lack of, "disk" or "memory"; None for others."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return "memory"
        if isinstance(cause, OSError) and cause.errno in LACKING:
            return LACKING[cause.errno]
        for lacking, said in SHORTAGES.items():
            if any(words in str(cause) for words in said):
                return lacking
        cause = cause.__cause__ or cause.__context__
    return None


def sqlite_file(url: str) -> Path | None:
    """Return the file behind an SQLite URL, None for any other URL."""
    prefix = "sqlite:///"
    path = url.removeprefix(prefix).partition("?")[0]
    return Path(path).absolute() if url.startswith(prefix) else None


def unusable(url: str, option: str, error: BaseException) -> UserError:
    """Return what a user is told about an address that cannot be used."""
    return UserError(
        f"{option} {without_password(url)} cannot be used ({reason(error)}); give a writable "
        "place, for instance sqlite:///here.db, or a running server's address"
    )


def check_database(url: str, option: str) -> None:
    """Refuse an SQLite URL that cannot be used; nothing is written, and other URLs pass.

    Raises:
        UserError: there is something else, or nothing can be created there.
    """
    try:
        _check_sqlite(url, TABLES[option])
    except (OSError, sqlite3.Error) as error:
        raise unusable(url, option, error) from error


def _check_sqlite(url: str, table: str) -> None:
    if url in ("sqlite://", "sqlite:///") or url.startswith("sqlite:///:memory:"):
        raise OSError("a database in memory is gone with the process")
    file = sqlite_file(url)
    if file is None:
        return
    if is_new(url):
        _try_folder(file.parent)
    elif not file.is_file():
        raise OSError(f"{file} is not a file")
    elif _is_foreign(file, table):
        raise OSError(f"{file} is a database of something else")


def _try_folder(folder: Path) -> None:
    """Raise OSError unless a folder can be made, or written if it is there."""
    above = next(there for there in (folder, *folder.parents) if there.exists())
    if not above.is_dir():
        raise OSError(f"{above} is not a folder")
    with tempfile.TemporaryFile(dir=above):  # has no name, and tells what rights alone do not
        pass


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written; nothing is.

    Raises:
        UserError: it cannot be written, or something else is there.
    """
    try:
        _try_folder(folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({reason(error)}), where results go; make room or rights "
            "there, or name a --tracking-uri in another folder"
        ) from error


def is_new(url: str) -> bool:
    """Say whether opening a database would create its file."""
    file = sqlite_file(url)
    return file is not None and not file.exists()


def _is_foreign(file: Path, table: str) -> bool:
    """Say whether a database has tables, but not the given one."""
    try:
        return bool(found := _tables(file, "&immutable=1")) and table not in found
    except sqlite3.DatabaseError:  # broken, or another process is writing: then with its locks
        return bool(found := _tables(file)) and table not in found


def _tables(file: Path, how: str = "") -> set[str]:
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro{how}", uri=True)) as connection:
        rows = connection.execute("select name from sqlite_master where type = 'table'")
        return {name for (name,) in rows}


def is_server(uri: str) -> bool:
    """Say whether a tracking URI is a server's address."""
    return uri.startswith(("http://", "https://"))


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def asked_once() -> AbstractContextManager[None]:
    """Let MLflow meanwhile ask a server once and for seconds, where it would try for minutes."""
    return environment({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "8"})


def creation_lock(url: str) -> FileLock:
    """Return the lock under which a database's tables are created: doing it twice breaks them."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    elsewhere = Path(tempfile.gettempdir()) / f"vae-sweep-harness-{digest}"
    return FileLock(f"{sqlite_file(url) or elsewhere}.lock")


def memory_folder() -> str | None:
    """Return a folder in memory for temporary files; None, the usual one, where there is none."""
    folder = "/dev/shm"
    return folder if os.path.isdir(folder) and os.access(folder, os.W_OK) else None


def use_write_ahead_log(database: Path) -> None:
    """Set an SQLite database to write-ahead logging, which halves the cost of a write."""
    connection = sqlite3.connect(database)
    connection.execute("pragma journal_mode=WAL")
    connection.close()


def own_process() -> dict[str, str]:
    """Return the tags that say which process writes a run."""
    return {"host": socket.gethostname(), "process": str(os.getpid())}


def alive(process: int) -> bool:
    """Say whether a process of this machine is running."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
