"""Addresses of databases and servers: defaults, checks, and what can be printed of them."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

from harness.errors import UserError

# An address in a text; a password in it may hold blanks, unless it may be a port.
ADDRESS = re.compile(r"[\w+.-]+://(?:[^/@\s:]*:(?!\d+(?:[/\s]|$))[^@\n]*@)?\S*[^\s'\")\],.:;]")
SECRET = re.compile(r"(pass|pwd|token|secret|key|auth|cred|sig)\w*=", re.IGNORECASE)  # parameters

LOGIN = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"  # MLflow's, of a server

LACKING = {errno.ENOSPC: "disk", errno.EDQUOT: "disk", errno.EFBIG: "disk", errno.ENOMEM: "memory"}
SHORTAGES = {  # texts of SQLite's and PyTorch's errors where it is used up; they carry no number
    "disk": ("database or disk is full", "disk I/O error"),
    "memory": ("can't allocate memory", "out of memory", "a worker process was killed"),
}


def project_root() -> Path:
    """Return the default folder of databases: the repository, or the current directory."""
    repository = Path(__file__).resolve().parents[2]
    return repository if (repository / "pyproject.toml").exists() else Path.cwd()


def default_tracking() -> str:
    """Return the default tracking URI, `mlflow.db` in the default folder."""
    return f"sqlite:///{project_root()}/mlflow.db"


def tracking_address(uri: str | None) -> str:
    """Return a tracking URI; for None that of MLFLOW_TRACKING_URI or the default."""
    if uri is None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or default_tracking()
    uri = _given(uri, "--tracking-uri")
    if is_server(uri) and without_secrets(uri) != uri:
        raise UserError(
            f"--tracking-uri {without_secrets(uri)} holds a user or password; leave them out and "
            f"set {LOGIN}"
        )
    if not is_server(uri) and not uri.startswith("sqlite:"):
        error = ValueError("it is neither an SQLite file nor a server")
        raise unusable(uri, "--tracking-uri", error)
    return uri.rstrip("/") if is_server(uri) else uri


def storage_address(url: str | None) -> str:
    """Return the URL of Optuna's storage; for None `optuna.db` in the default folder."""
    return _given(f"sqlite:///{project_root() / 'optuna.db'}" if url is None else url, "--storage")


def _given(address: str, option: str) -> str:
    if not address.strip():
        raise UserError(f"{option} is empty; give an address, or leave it out")
    return address


def without_secrets(address: str) -> str:
    """Return an address as it is printed: without user, password, and parameters with a secret.

    It is read as SQLAlchemy does; where that leaves an "@" in doubt, nothing of it is returned.
    """
    rest, query = address.partition("://")[2] or address, unquote(address.partition("?")[2])
    has_login, has_secret = "@" in rest and not rest.startswith("/"), SECRET.search(query)
    if not has_login and not has_secret:
        return address
    import sqlalchemy  # --help does not wait for it

    try:
        url = sqlalchemy.make_url(address)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return "***"
    if has_login and (url.username is None or rest.count("@") > 1):
        return "***"
    where = url.host, url.port, url.database
    return sqlalchemy.URL.create(url.drivername, None, None, *where).render_as_string()


def without_password(text: str) -> str:
    """Return a text with the addresses in it as they are printed."""
    return ADDRESS.sub(lambda found: without_secrets(found[0]), text)


def reason(error: BaseException) -> str:
    """Return an error's first line, without passwords."""
    return without_password((str(error).strip() or type(error).__name__).splitlines()[0])


def shortage(error: BaseException) -> str | None:
    """Return "disk" or "memory" if an error or one of its causes means that it is used up."""
    for cause in causes(error):
        if isinstance(cause, MemoryError):
            return "memory"
        if isinstance(cause, OSError) and cause.errno in LACKING:
            return LACKING[cause.errno]
        for resource, texts in SHORTAGES.items():
            if any(text in str(cause) for text in texts):
                return resource
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_server(uri: str) -> bool:
    """Return whether a tracking URI is a server's address."""
    return uri.startswith(("http://", "https://"))


def sqlite_file(url: str) -> Path | None:
    """Return the file of an SQLite URL, None for any other URL."""
    kind, _, path = url.partition("sqlite:///")
    return None if kind or not path else Path(path.partition("?")[0]).absolute()


def is_new(url: str) -> bool:
    """Return whether opening a database would create its file."""
    file = sqlite_file(url)
    return file is not None and not file.exists()


def unusable(url: str, option: str, error: BaseException) -> UserError:
    """Return the error of an address that cannot be used."""
    return UserError(
        f"{option} {without_secrets(url)} cannot be used ({reason(error)}); give a writable "
        "place, for instance sqlite:///here.db, or a running server's address"
    )


def check_database(url: str, option: str) -> None:
    """Refuse an SQLite URL that cannot be used; nothing is written, and other URLs pass."""
    import sqlite3  # --help does not wait for it

    file = sqlite_file(url)
    try:
        if url in ("sqlite://", "sqlite:///") or url.startswith("sqlite:///:memory:"):
            raise OSError("a database in memory ends with the process")
        if file is not None and not file.exists():
            try_folder(file.parent)
        elif file is not None and not file.is_file():
            raise OSError(f"{file} is not a file")
        elif file is not None:
            # Through SQLite: closing the file otherwise takes this process's locks on it, and what
            # it then writes to the log, which another process may delete, is lost.
            address = f"{file.as_uri()}?mode=ro&immutable=1"
            with closing(sqlite3.connect(address, uri=True)) as connection:
                connection.execute("pragma schema_version")
    except (OSError, sqlite3.Error) as error:
        # Read without locks and without its log, a database that is in use may look corrupt.
        if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_CORRUPT:
            raise unusable(url, option, error) from error


def try_folder(folder: Path) -> None:
    """Raise OSError unless a folder exists and can be written, or can be made."""
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir():
        raise OSError(f"{above} is not a folder")
    with tempfile.TemporaryFile(dir=above):  # shows what permissions alone do not: a full disk
        pass
