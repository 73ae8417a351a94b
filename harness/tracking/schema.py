"""Whose a database is, MLflow's or Optuna's, and of which version; finding out writes nothing."""

import shlex
import sqlite3
from functools import cache
from importlib import metadata, resources
from pathlib import Path

import sqlalchemy
from alembic.script import ScriptDirectory

from harness.errors import UserError
from harness.tracking.addresses import is_new, sqlite_file, try_folder, unusable, without_secrets

# By option: the library, its migrations, how to migrate, and columns of its own tables.
LIBRARIES = {
    "--tracking-uri": (
        *("MLflow", "store/db_migrations", "mlflow db upgrade"),
        {"experiments": {"experiment_id", "artifact_location", "lifecycle_stage"}},
    ),
    "--storage": (
        *("Optuna", "storages/_rdb/alembic", "optuna storage upgrade --storage"),
        {"studies": {"study_id", "study_name"}, "version_info": {"schema_version"}},
    ),
}


# Tables that a study reads; the libraries make those again, empty, that somebody has dropped.
NEEDED = {
    "--tracking-uri": "datasets experiment_tags inputs latest_metrics metrics params runs tags",
    "--storage": "trials study_directions study_user_attributes trial_heartbeats trial_params "
    "trial_intermediate_values trial_system_attributes trial_user_attributes trial_values",
}


def check_database(url: str, option: str, *, write: bool = True) -> None:
    """Refuse an SQLite URL that cannot be used, or read; nothing is written, others pass."""
    file = sqlite_file(url)
    try:
        if url in ("sqlite://", "sqlite:///") or url.startswith("sqlite:///:memory:"):
            raise OSError("a database in memory ends with the process")
        path, question, options = url.removeprefix("sqlite:///").partition("?")
        if file is not None and question and "=" not in options:
            raise OSError("? ends the file's name; write %3F for one in it")
        if file is not None and not file.parent.exists() and Path(path).parent.exists():
            raise OSError(f"it means {file}; write %25 for a % in a name")
        if is_new(url) and not write:
            raise UserError(f"{file} does not exist, or is empty; name the store with {option}")
        if file is not None and not file.exists():
            try_folder(file.parent)
        elif file is not None and not file.is_file():
            raise OSError(f"{file} is not a file")
        elif file is not None:
            engine = sqlalchemy.create_engine(read_only(file), poolclass=sqlalchemy.NullPool)
            with engine.connect() as connection:
                check_tables(connection, url, option)
    except (OSError, sqlalchemy.exc.DBAPIError) as error:
        # Read without locks and without its log, a database that is in use may look corrupt.
        code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
        if code != sqlite3.SQLITE_CORRUPT:
            raise unusable(url, option, error) from error


def read_only(file: Path) -> str:
    """Return the address by which an SQLite database is read and no file is made.

    Without a log beside it, SQLite would make one to read a database whose writers use one. Through
    SQLite: closing the file otherwise takes this process's locks on it, and what it then writes to
    the log, which another process may delete, is lost.
    """
    log = Path(f"{file}-wal")
    query = {"mode": "ro", "uri": "true"} | ({} if log.exists() else {"immutable": "1"})
    # Named with its driver: of a plain "sqlite:///" MLflow makes the folder, here "file:".
    return str(sqlalchemy.URL.create("sqlite+pysqlite", database=file.as_uri(), query=query))


def check_tables(connection: sqlalchemy.Connection, url: str, option: str) -> None:
    """Refuse a database with tables unless they are those of the option's installed library."""
    names = set(sqlalchemy.inspect(connection).get_table_names())
    if not (tables := names - {"alembic_version"}):
        return

    def columns(table: str) -> set[str]:
        return set(connection.exec_driver_sql(f"select * from {table} limit 0").keys())

    library, migrations, upgrade, _ = LIBRARIES[option]
    shown, new = f"{option} {without_secrets(url)}", f"give {library} a new database"
    begun = library == "Optuna" and tables == {"studies"}  # it was killed after its first table
    if begun and columns("studies") == {"study_id", "study_name"}:
        return
    for of, (name, *_, own) in LIBRARIES.items():
        if all(table in tables and had <= columns(table) for table, had in own.items()):
            if of == option:
                break
            raise UserError(f"{shown} is a database of {name}, to be given as {of}; {new}")
    else:
        some = ", ".join(sorted(tables)[:3])
        raise UserError(f"{shown} is a database of another program (tables: {some}); {new}")
    version = None
    if "alembic_version" in names:
        version = connection.exec_driver_sql("select version_num from alembic_version").scalar()
    revisions = _revisions(library.lower(), migrations)
    if version == revisions[0]:
        if lost := ", ".join(sorted({*NEEDED[option].split()} - names)):
            raise UserError(f"{shown} has lost its tables {lost}; restore it from a copy, or {new}")
        return
    if library == "Optuna" and version is None:
        return  # it is written last: another process makes the tables, or was killed then
    age, way = "a newer", f"`pip install -U {library.lower()}`"
    if version is None or version in revisions:
        address = shlex.quote(without_secrets(url))
        age, way = "an older", f"copy it, then migrate it with `{upgrade} {address}`"
    raise UserError(
        f"{shown} is a database of {age} {library}, schema {version} ({library} "
        f"{metadata.version(library)} is installed, schema {revisions[0]}); {way}, or {new}"
    )


@cache
def _revisions(package: str, migrations: str) -> list[str]:  # latest first
    scripts = ScriptDirectory(str(resources.files(package) / migrations))
    return [script.revision for script in scripts.walk_revisions()]
