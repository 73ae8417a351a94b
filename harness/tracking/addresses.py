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

# User and password before an address's host; a password may hold all but line breaks and "@".
USERINFO = re.compile(r"(?<=://)(?:[^/\s]*|[^/@\s:]*:(?!\d+(?:/|$))[^@\n]*)@")
SECRET = re.compile(r"([?&;](?:password|passwd|pwd|token)=)[^&\s'\"]+", re.IGNORECASE)

LOGIN = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"  # MLflow's, of a server

LACKING = {errno.ENOSPC: "disk", errno.EDQUOT: "disk", errno.EFBIG: "disk", errno.ENOMEM: "memory"}
LACKING[errno.EAGAIN] = "processes"  # of a process that cannot be started
SHORTAGES = {  # texts of SQLite's and PyTorch's errors where it is used up; they carry no number
    "disk": ("database or disk is full", "disk I/O error"),
    "memory": (
        *("can't allocate memory", "annot allocate memory", "out of memory", "failed to map"),
        "a worker process was killed",
    ),
    "processes": ("can't start new thread",),
}


def project_root() -> Path:
    """Return the default folder of databases: the repository, or the current directory."""
    repository = Path(__file__).resolve().parents[2]
    return repository if (repository / "pyproject.toml").exists() else Path.cwd()


def default_tracking() -> str:
    """Return the default tracking URI, `mlflow.db` in the default folder."""
    return _default("mlflow.db")


def _default(name: str) -> str:
    return f"sqlite:///{str(project_root() / name).replace('%', '%25').replace('?', '%3F')}"


def tracking_address(uri: str | None) -> str:
    """Return a tracking URI; for None that of MLFLOW_TRACKING_URI or the default."""
    if uri is None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or default_tracking()
    uri = _given(uri, "--tracking-uri")
    if is_server(uri) and without_password(uri) != uri:
        raise UserError(
            f"--tracking-uri {without_password(uri)} holds a user or password; leave them out and "
            f"set {LOGIN}"
        )
    if not is_server(uri) and not uri.startswith("sqlite:"):
        error = ValueError("it is neither an SQLite file nor a server")
        raise unusable(uri, "--tracking-uri", error)
    return uri.rstrip("/") if is_server(uri) else uri


def storage_address(url: str | None) -> str:
    """Return the URL of Optuna's storage; for None `optuna.db` in the default folder."""
    return _given(_default("optuna.db") if url is None else url, "--storage")


def _given(address: str, option: str) -> str:
    if not address.strip():
        raise UserError(f"{option} is empty; give an address, or leave it out")
    return address


def without_password(text: str) -> str:
    """Return a text with addresses in it without their users and passwords."""
    return SECRET.sub(r"\1***", USERINFO.sub("", text))


def reason(error: BaseException) -> str:
    """Return an error's first line, without passwords."""
    return without_password((str(error).strip() or type(error).__name__).splitlines()[0])


def shortage(error: BaseException) -> str | None:
    """Return "disk", "memory" or "processes" if an error or a cause of it means a lack of it."""
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
    """Return the file of an SQLite URL, None for any other URL; %3F in it is a "?"."""
    kind, _, path = url.partition("sqlite:///")
    return None if kind or not path else Path(unquote(path.partition("?")[0])).absolute()


def is_new(url: str) -> bool:
    """Return whether opening a database would create its file."""
    file = sqlite_file(url)
    return file is not None and not file.exists()


def unusable(url: str, option: str, error: BaseException) -> UserError:
    """Return the error of an address that cannot be used."""
    return UserError(
        f"{option} {without_password(url)} cannot be used ({reason(error)}); give a writable "
        "place, for instance sqlite:///here.db, or a running server's address"
    )


def check_database(url: str, option: str) -> None:
    """Refuse an SQLite URL that cannot be used; nothing is written, and other URLs pass."""
    import sqlite3  # --help does not wait for it

    file = sqlite_file(url)
    try:
        if url in ("sqlite://", "sqlite:///") or url.startswith("sqlite:///:memory:"):
            raise OSError("a database in memory ends with the process")
        path, question, options = url.removeprefix("sqlite:///").partition("?")
        if file is not None and question and "=" not in options:
            raise OSError("? ends the file's name; write %3F for one in it")
        if file is not None and not file.parent.exists() and Path(path).parent.exists():
            raise OSError(f"it means {file}; write %25 for a % in a name")
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
