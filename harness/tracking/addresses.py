"""Addresses of databases and servers: defaults, checks, and what can be printed of them."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator, Set
from contextlib import closing
from pathlib import Path

from harness.errors import UserError

# User and password before an address's host; a password may hold all but line breaks and "@".
USERINFO = re.compile(r"(?<=://)(?:[^/\s]*|[^/@\s:]*:(?!\d+(?:/|$))[^@\n]*)@")
SECRET = re.compile(r"([?&;](?:password|passwd|pwd|token)=)[^&\s'\"]+", re.IGNORECASE)

LOGIN = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"  # MLflow's, of a server

DATABASE_PATIENCE = 600.0  # seconds for which a database may be away or locked


LOCKED = "another process holds a database"
# What can be wrong outside of a process and what helps, by numbers of a system's errors, primary
# codes of SQLite's, and texts of errors whose library gives no number.
TROUBLES: dict[str, tuple[Set[int], Set[int], tuple[str, ...]]] = {
    "the disk is full; free some": (
        {errno.ENOSPC, errno.EDQUOT, errno.EFBIG},
        {10, 13},  # I/O error, full
        ("database or disk is full", "No space left on device"),
    ),
    "there is too little memory; free some": (
        {errno.ENOMEM},
        {7},
        ("can't allocate memory", "out of memory", "a worker process was killed"),
    ),
    "a file or folder cannot be used; give yourself the right to read and write it": (
        {errno.EACCES, errno.EPERM, errno.EROFS},
        {3, 8, 14},  # permission, read-only, cannot open
        (),
    ),
    f"{LOCKED}; end it": (set(), {5, 6}, ()),  # busy, locked
    "a file is no intact database; restore it from a copy": (
        {errno.EIO},
        {11, 26},  # corrupt, not a database
        ("no such table", "no such column"),
    ),
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
    return _given(f"sqlite:///{project_root() / 'optuna.db'}" if url is None else url, "--storage")


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


def trouble(error: BaseException, of: str = "") -> str | None:
    """Return in one line what is wrong with a disk, memory or a database, None for other errors.

    The error may be one of the causes of `error`; `of` is the option with a store's address.
    """
    for cause in causes(error):
        number = errno.ENOMEM if isinstance(cause, MemoryError) else getattr(cause, "errno", None)
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        for known, (numbers, codes, texts) in TROUBLES.items():
            if number in numbers or code in codes or any(text in str(cause) for text in texts):
                (what, way), why = known.split("; "), f"{of}{': ' if of else ''}{reason(cause)}"
                return f"{what} ({why}); {way}, and the same command goes on"
    return None


def is_locked(error: BaseException) -> bool:
    """Return whether an error means that another process holds the lock of an SQLite database."""
    return (trouble(error) or "").startswith(LOCKED)


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
    named = f"{option} {without_password(url)}"
    return UserError(
        trouble(error, named)
        or f"{named} cannot be used ({reason(error)}); give a writable place, for instance "
        "sqlite:///here.db, or a running server's address"
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
