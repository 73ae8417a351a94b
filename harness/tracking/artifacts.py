"""Local artifacts of a database: those beside it, wherever it was moved or copied to.

MLflow stores absolute places, `file:///D/mlruns/EXPERIMENT/RUN/artifacts`, in its database. After
`mv D E`, or in a copy E, the place beside E's database is used in its stead.
"""

import shlex
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from harness.tracking.runs import NOTE

ROOT = "mlruns"
# Where MLflow has places: table, column, and the parts of a place below ROOT.
EXPERIMENTS, RUNS = ("experiments", "artifact_location", 1), ("runs", "artifact_uri", 3)
PLACES = (EXPERIMENTS, RUNS, ("logged_models", "artifact_location", 4))


def beside(location: str, home: Path, parts: int = RUNS[2]) -> Path | None:
    """Return where a local place of artifacts in a folder moved to `home` is now.

    None if it is there already, or is of another kind: a place that the user chose.
    """
    place = urlsplit(location)
    folders = Path(url2pathname(place.path)).parents
    if place.scheme not in ("", "file") or len(folders) <= parts or folders[parts - 1].name != ROOT:
        return None
    before = folders[parts]
    if before == home or (before.is_dir() and before.samefile(home)):
        return None
    return home / Path(url2pathname(place.path)).relative_to(before)


def rebase(database: Path, experiment: str = "") -> list[Path]:
    """Make a database name the artifacts beside it, and return the folders named before.

    Also those of `experiment`, which will be written, where there are none yet. The commands in
    the descriptions of runs then name this database too.
    """
    home, left = database.parent, set[Path]()
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for table, column, parts in PLACES:
            for row, location in connection.execute(f"select rowid, {column} from {table}"):
                here = beside(location, home, parts)
                if here and (here.exists() or here == home / ROOT / experiment):
                    new = (here.as_uri(), row)
                    connection.execute(f"update {table} set {column} = ? where rowid = ?", new)
                    left.add(Path(url2pathname(urlsplit(location).path)).parents[parts])
        for before in left:
            for quoted in (repr, shlex.quote):  # in Python, and on a command line
                names = [quoted(f"sqlite:///{at / database.name}") for at in (before, home)]
                replaced = "update tags set value = replace(value, ?, ?) where key = ?"
                connection.execute(replaced, (*names, NOTE))
    return sorted(left)
