"""Local artifacts of a database: those beside it, wherever it was moved or copied to.

MLflow stores absolute places, `file:///D/mlruns/EXPERIMENT/RUN/artifacts`, in its database. After
`mv D E`, or in a copy E, the places beside E's database are used in their stead.
"""

import os
import shlex
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from harness.errors import UserError
from harness.tracking.addresses import sqlite_file, unusable, without_secrets
from harness.tracking.runs import NOTE

PLACES = {"experiments": "artifact_location", "runs": "artifact_uri"}  # columns of MLflow's tables


def moved(location: str, home: Path, experiment: str = "") -> tuple[Path, Path] | None:
    """Return the folder that a place of artifacts is in, and the same place beside `home`.

    None if that folder is `home`, or nothing is there, unless it is the place of `experiment`.
    """
    place = urlsplit(location)
    folder, found, name = url2pathname(place.path).rpartition("/mlruns/")
    before, here = Path(folder), home / "mlruns" / name
    if not found or place.scheme not in ("", "file"):
        return None
    if os.path.exists(before) and before.samefile(home):  # `Path.exists` may be refused
        return None
    return (before, here) if here.exists() or name == experiment else None


def rebase(uri: str, experiment: str = "") -> str:
    """Make a database name the artifacts beside it; return a line on it, "" if nothing changes.

    Those of `experiment`, too, where there are none yet: they will be written. The commands in the
    descriptions of runs then name this database.
    """
    database, left = sqlite_file(uri), set[Path]()
    if database is None or not database.exists():
        raise UserError(f"{without_secrets(uri)} is no database file that exists")
    home = database.parent
    try:
        with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
            for table, column in PLACES.items():
                elsewhere = f"select {column} from {table} where instr({column}, ?) != 1"
                for (place,) in connection.execute(elsewhere, (home.as_uri() + "/",)).fetchall():
                    if both := moved(place, home, experiment):
                        left.add(both[0])
                        new = f"update {table} set {column} = ? where {column} = ?"
                        connection.execute(new, (both[1].as_uri(), place))
            for before in left:
                for quoted in (repr, shlex.quote):  # in Python, and on a command line
                    names = [quoted(f"sqlite:///{at / database.name}") for at in (before, home)]
                    new = "update tags set value = replace(value, ?, ?) where key = ?"
                    connection.execute(new, (*names, NOTE))
    except sqlite3.Error as error:
        raise unusable(uri, "--tracking-uri", error) from error
    places = ", ".join(map(str, sorted(left)))
    it = "its database now names the artifacts beside it"
    return f"{home} was moved or copied from {places}; {it}" if left else ""
