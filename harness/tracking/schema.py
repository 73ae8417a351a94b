"""Whose a database is, MLflow's or Optuna's, and of which version; finding out writes nothing."""

import importlib.metadata
import importlib.util
import shlex
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy
from alembic.script import ScriptDirectory

from harness.errors import UserError
from harness.tracking.addresses import is_new, sqlite_file, try_folder, unusable, without_password


@dataclass(frozen=True)
class Library:
    """A library that keeps a database: its option, migrations, and columns of its own tables."""

    name: str
    option: str
    migrations: str
    upgrade: str
    columns: Mapping[str, set[str]]
    maker: str = "select null"  # query for the version that made the tables


LIBRARIES = (
    Library(
        "MLflow",
        "--tracking-uri",
        "store/db_migrations",
        "mlflow db upgrade",
        {"experiments": {"experiment_id", "artifact_location", "lifecycle_stage"}},
    ),
    Library(
        "Optuna",
        "--storage",
        "storages/_rdb/alembic",
        "optuna storage upgrade --storage",
        {
            "studies": {"study_id", "study_name"},
            "version_info": {"schema_version", "library_version"},
        },
        "select library_version from version_info",
    ),
)


def check_database(url: str, option: str, *, write: bool = True) -> None:
    """Refuse a database that cannot be used as that of an option; nothing is written.

    One that is to be read must exist. Of other kinds than SQLite, `check_tables` is the check.
    """
    file = sqlite_file(url)
    try:
        if url in ("sqlite://", "sqlite:///") or url.startswith("sqlite:///:memory:"):
            raise OSError("a database in memory ends with the process")
        if file is None:
            return
        if file.exists() and not file.is_file():
            raise OSError(f"{file} is not a file")
        if is_new(url) and not write:
            what = "is empty" if file.exists() else "does not exist"
            raise UserError(f"{file} {what}; name the store of the runs with {option}")
        if not file.exists():
            try_folder(file.parent)
            return
        engine = sqlalchemy.create_engine(read_only(file), poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            check_tables(connection, url, option)
    except (OSError, sqlalchemy.exc.DBAPIError) as error:
        cause = getattr(error, "orig", None) or error
        # Read without locks and without its log, a database that is in use may look corrupt.
        if getattr(cause, "sqlite_errorcode", None) != sqlite3.SQLITE_CORRUPT:
            raise unusable(url, option, cause) from error


def read_only(file: Path) -> str:
    """Return the address by which an SQLite database is read and no file is made.

    Without a log beside it, SQLite would make one to read a database whose writers use one. Through
    SQLite: closing the file otherwise takes this process's locks on it, and what it then writes to
    the log, which another process may delete, is lost.
    """
    logged = Path(f"{file}-wal").exists()
    query = {"mode": "ro", "uri": "true"} | ({} if logged else {"immutable": "1"})
    # Named with its driver: of a plain "sqlite:///" MLflow makes the folder, here "file:".
    return str(sqlalchemy.URL.create("sqlite+pysqlite", database=file.as_uri(), query=query))


def check_tables(connection: sqlalchemy.Connection, url: str, option: str) -> None:
    """Refuse a database with tables unless they are those of the option's installed library."""
    names = set(sqlalchemy.inspect(connection).get_table_names())
    if not (tables := names - {"alembic_version"}):
        return

    def columns(table: str) -> set[str]:
        return set(connection.exec_driver_sql(f"select * from {table} limit 0").keys())

    def value(query: str) -> Any:  # noqa: ANN401 - of any kind
        return connection.exec_driver_sql(query).scalar()

    wanted = next(library for library in LIBRARIES if library.option == option)
    shown, new = f"{option} {without_password(url)}", f"give {wanted.name} a new database"
    begun = wanted.name == "Optuna" and tables == {"studies"}  # it was killed after its first table
    if begun and columns("studies") == wanted.columns["studies"]:
        return
    for found in LIBRARIES:
        own = found.columns.items()
        if all(table in tables and had <= columns(table) for table, had in own):
            break
    else:
        some = ", ".join(sorted(tables)[:3])
        raise UserError(f"{shown} is a database of another program (tables: {some}); {new}")
    if found is not wanted:
        raise UserError(f"{shown} is a database of {found.name}, for {found.option}; {new}")
    version = value("select version_num from alembic_version") if names > tables else None
    maker, revisions = value(found.maker), _revisions(found.name, found.migrations)
    installed = importlib.metadata.version(found.name)
    # Optuna writes its version after its tables: another process makes them, or was killed then.
    unfinished = found.name == "Optuna" and version is None and maker in (None, installed)
    if version == revisions[0] or unfinished:
        return
    age, way = "a newer", f"`pip install -U {found.name.lower()}`"
    if version is None or version in revisions:
        address = shlex.quote(without_password(url))
        age, way = "an older", f"copy it, then migrate it with `{found.upgrade} {address}`"
    made = f" {maker}" if maker else ""
    raise UserError(
        f"{shown} is a database of {age} {found.name}{made}, schema {version} ({found.name} "
        f"{installed} is installed, schema {revisions[0]}); {way}, or {new}"
    )


@cache
def _revisions(library: str, migrations: str) -> list[str]:
    """Return the versions of a library's tables, latest first; the library is not imported."""
    spec = importlib.util.find_spec(library.lower())
    assert spec is not None
    assert spec.submodule_search_locations
    scripts = ScriptDirectory(str(Path(spec.submodule_search_locations[0]) / migrations))
    return [script.revision for script in scripts.walk_revisions()]
