"""Where databases are, how one is created, and which process this is."""

from __future__ import annotations

import hashlib
import os
import socket
import sqlite3
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock


def project_root() -> Path:
    """Return where databases and artifacts go by default: the repository, or where one stands."""
    repository = Path(__file__).resolve().parents[1]
    return repository if (repository / "pyproject.toml").exists() else Path.cwd()


def default_tracking() -> str:
    """Return the tracking URI of a user who names none: `mlflow.db` where databases go."""
    return f"sqlite:///{project_root()}/mlflow.db"


def tracking_address(uri: str | None) -> str:
    """Return a tracking URI, of None that of MLFLOW_TRACKING_URI or the default."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or default_tracking()


def without_password(uri: str) -> str:
    """Return an address without the user and password that it may hold."""
    place = urlsplit(uri).netloc
    return uri.replace(place, place.rpartition("@")[2], 1) if "@" in place else uri


def sqlite_file(url: str) -> Path | None:
    """Return the file behind an SQLite URL, None for any other URL."""
    prefix = "sqlite:///"
    return Path(url.removeprefix(prefix)).absolute() if url.startswith(prefix) else None


def creation_lock(url: str) -> FileLock:
    """Return the lock under which a database's tables are created: doing it twice breaks them."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    elsewhere = Path(tempfile.gettempdir()) / f"vae-sweep-harness-{digest}"
    return FileLock(f"{sqlite_file(url) or elsewhere}.lock")


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
