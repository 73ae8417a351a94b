"""A store of the first edition, unpacked: what commit 593445c wrote must stay readable."""

import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

ARCHIVE = Path(__file__).with_name("first_edition.tar.gz")

HOME = "@HOME@"
"""The store's folder, in the archive's files."""


def unpack(folder: Path) -> str:
    """Put the store into an empty folder, with databases that name it; return its tracking URI."""
    with tarfile.open(ARCHIVE) as files:
        files.extractall(folder, filter="data")
    for file in folder.rglob("*.json"):
        file.write_text(file.read_text().replace(HOME, str(folder)))
    for file in folder.glob("*.sql"):
        with closing(sqlite3.connect(file.with_suffix(".db"))) as database:
            database.executescript(file.read_text().replace(HOME, str(folder)))
        file.unlink()
    return f"sqlite:///{folder}/mlflow.db"
