"""Addresses of databases and servers: defaults, checks, and what can be printed of them."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator, Set
from pathlib import Path
from urllib.parse import unquote

from harness.errors import UserError

# An address in a text; a password in it may hold blanks, unless it may be a port.
ADDRESS = re.compile(r"[\w+.-]+://(?:[^/@\s:]*:(?!\d+(?:[/\s]|$))[^@\n]*@)?\S*[^\s'\")\],.:;]")
SECRET = re.compile(r"(pass|pwd|token|secret|key|auth|cred|sig)\w*=", re.IGNORECASE)  # parameters

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
        (
            *("annot allocate memory", "can't allocate memory", "failed to map"),
            *("out of memory", "a worker process was killed"),
        ),
    ),
    "no more processes and threads are allowed (ulimit -u); allow or end some": (
        {errno.EAGAIN},
        set(),
        ("can't start new thread",),
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
    return _default("mlflow.db")


def _default(name: str) -> str:
    return f"sqlite:///{str(project_root() / name).replace('%', '%25').replace('?', '%3F')}"


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
    return _given(_default("optuna.db") if url is None else url, "--storage")


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
    """Return the file of an SQLite URL, None for any other URL; %3F in it is a "?"."""
    kind, _, path = url.partition("sqlite:///")
    return None if kind or not path else Path(unquote(path.partition("?")[0])).absolute()


def is_new(url: str) -> bool:
    """Return whether a database has no file yet, or an empty one."""
    file = sqlite_file(url)
    return file is not None and not (file.exists() and file.stat().st_size)


def unusable(url: str, option: str, error: BaseException) -> UserError:
    """Return the error of an address that cannot be used."""
    named = f"{option} {without_secrets(url)}"
    return UserError(
        trouble(error, named)
        or f"{named} cannot be used ({reason(error)}); give a writable place, for instance "
        "sqlite:///here.db, or a running server's address"
    )


def try_folder(folder: Path) -> None:
    """Raise OSError unless a folder exists and can be written, or can be made."""
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir():
        raise OSError(f"{above} is not a folder")
    with tempfile.TemporaryFile(dir=above):  # shows what permissions alone do not: a full disk
        pass
