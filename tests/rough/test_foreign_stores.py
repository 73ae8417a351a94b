"""Databases that are old, new, broken off, another library's or another program's; and reading.

What is refused is not changed by a byte, and reading leaves a folder as it is.
"""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.storages._rdb.models import BaseModel

from analysis.frames import load_study
from harness import RunConfig, UserError, load_run
from harness.models.vae import build
from harness.tracking import connect
from harness.tracking.schema import check_database
from studies import kl_weight, replay
from studies.runner import cli
from studies.runner.database import has_study, open_storage
from studies.runner.options import Places
from studies.runner.run import open_stores

KEY = "1" * 32
TRACKING, STORAGE = "--tracking-uri", "--storage"


def run_sql(file: Path, script: str) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(script)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of all that is in a folder."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")}
    return {name: (found.st_size, found.st_mtime_ns) for name, found in stats.items()}


@pytest.fixture(scope="module")
def made(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an empty database of each library, and one without tables."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(empty_database, folder / "mlflow.db")
    (folder / "none.db").touch()
    storage = optuna.storages.RDBStorage("sqlite://")  # in memory: a commit for each table is slow
    optuna.create_study(storage=storage, study_name="other")
    memory = storage.engine.raw_connection()
    with closing(sqlite3.connect(folder / "optuna.db")) as file:
        memory.driver_connection.backup(file)
    memory.close()
    storage.engine.dispose()
    return folder


# --- known or foreign ---------------------------------------------------------------------------

VERSION = "update alembic_version set version_num = "
FOREIGN = "is a database of another program"

REFUSED = {
    # made of, by a script, given as, what the line contains
    "experiments of another program": (
        *("none", "create table experiments(id, name); create table users(id)", TRACKING),
        f"{FOREIGN} (tables: experiments, users); give MLflow a new database",
    ),
    "one that has migrations": (
        *("none", "create table experiments(id); create table alembic_version(version_num)"),
        *(TRACKING, FOREIGN),
    ),
    "no such table": ("none", "create table songs(id)", TRACKING, FOREIGN),
    "studies of another program": (
        *("none", "create table studies(id, title)", STORAGE),
        f"{FOREIGN} (tables: studies); give Optuna a new database",
    ),
    "studies of a hospital": (
        *("none", "create table studies(study_id, study_name, doctor)", STORAGE, FOREIGN),
    ),
    "a hospital with Optuna's columns": (
        "none",
        "create table studies(study_id, study_name); create table patients(id)",
        *(STORAGE, FOREIGN),
    ),
    "tables with odd names": ("none", 'create table "a b"(x)', STORAGE, "(tables: a b)"),
    "Optuna's as MLflow's": ("optuna", "", TRACKING, "is a database of Optuna, to be given as --s"),
    "MLflow's as Optuna's": ("mlflow", "", STORAGE, "is a database of MLflow, to be given as --t"),
    "an older MLflow": ("mlflow", f"{VERSION} 'bf29a5ff90ea'", TRACKING, "copy it, then migrate"),
    "an older Optuna": ("optuna", f"{VERSION} 'v3.0.0.d'", STORAGE, "copy it, then migrate"),
    "an MLflow without a version": (
        *("mlflow", "drop table alembic_version", TRACKING),
        "is a database of an older MLflow, schema None (MLflow 3.",
    ),
    "a newer MLflow": (
        *("mlflow", f"{VERSION} 'later'", TRACKING),
        "is a database of a newer MLflow, schema later (MLflow 3.",
    ),
    "a newer Optuna": (
        *("optuna", f"{VERSION} 'v9.0.0.a'", STORAGE),
        "is a database of a newer Optuna, schema v9.0.0.a (Optuna 5.",
    ),
}


@pytest.mark.parametrize(("base", "script", "option", "why"), REFUSED.values(), ids=[*REFUSED])
def test_a_database_that_is_not_ours_is_refused_and_left_as_it_is(
    base, script, option, why, made, tmp_path
):
    file = tmp_path / "given.db"
    shutil.copy(made / f"{base}.db", file)
    run_sql(file, script)
    before, bytes_before = listing(tmp_path), file.read_bytes()
    places = {TRACKING: f"sqlite:///{tmp_path}/m.db", STORAGE: f"sqlite:///{tmp_path}/o.db"}
    places[option] = f"sqlite:///{file}"
    ways: list[Callable[[], object]] = [
        lambda: open_stores(Places(tracking_uri=places[TRACKING], storage=places[STORAGE]), "s")
    ]
    if option == TRACKING:
        ways += [lambda: connect(places[option]), lambda: load_run(KEY, places[option])]
    else:
        ways.append(lambda: open_storage(places[option]))
    for way in ways:
        with pytest.raises(UserError) as refusal:
            way()
        line = str(refusal.value)
        assert why in line
        assert line.startswith(f"{option} {places[option]} is a database of ")
        assert "\n" not in line
        assert (listing(tmp_path), file.read_bytes()) == (before, bytes_before)


def test_a_foreign_database_in_use_is_recognised_by_what_is_in_its_log(tmp_path):
    file = tmp_path / "app.db"
    with closing(sqlite3.connect(file)) as user:
        user.execute("pragma journal_mode=WAL")
        user.execute("create table experiments(id)")
        before = listing(tmp_path)
        with pytest.raises(UserError, match="another program"):
            connect(f"sqlite:///{file}")
        assert listing(tmp_path) == before


def test_an_empty_file_is_a_new_database(tmp_path):
    for name in ("mlflow.db", "optuna.db"):
        (tmp_path / name).touch()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(UserError, match=r"mlflow.db does not exist, or is empty"):
        load_run(KEY, uri)
    check_database(f"sqlite:///{tmp_path}/optuna.db", STORAGE)
    assert connect(uri).runs("none") == []


@pytest.mark.parametrize("tables", [1, 2, 7, None])
def test_a_database_whose_making_was_killed_is_not_foreign(tables, tmp_path):
    unfinished(f"sqlite:///{tmp_path}/optuna.db", tables)
    check_database(f"sqlite:///{tmp_path}/optuna.db", STORAGE)
    with pytest.raises(UserError, match="another program|of Optuna"):
        check_database(f"sqlite:///{tmp_path}/optuna.db", TRACKING)


@pytest.mark.slow
@pytest.mark.parametrize("tables", [1, 2, 7, None])
def test_a_database_whose_making_was_killed_is_made_to_the_end(tables, tmp_path):
    unfinished(f"sqlite:///{tmp_path}/optuna.db", tables)
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db")
    optuna.create_study(storage=storage, study_name="mine")
    assert has_study(storage.url, "mine")


def unfinished(url: str, tables: int | None) -> None:
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("begin")
        for table in BaseModel.metadata.sorted_tables[:tables]:
            table.create(connection)
    engine.dispose()


# --- reading ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(made: Path, data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run in MLflow and a study in Optuna, whose processes have ended."""
    folder, first = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("first")
    shutil.copy(made / "mlflow.db", first)
    store = connect(f"sqlite:///{first}/mlflow.db")
    tags = {"study": "s", "role": "run", "host": "here"}
    log = store.start(store.experiment("e", "Why?"), KEY, "a run", tags, {"seed": 0})
    config = RunConfig(hidden=(7,), latent_size=3)
    log.model(config, build(config, data.image_shape))
    log.end()
    with closing(sqlite3.connect(first / "mlflow.db")) as old:
        with closing(sqlite3.connect(folder / "mlflow.db")) as new:
            new.execute("pragma journal_mode=WAL")
            old.backup(new)
    shutil.copy(made / "optuna.db", folder)
    assert [path.name for path in sorted(folder.iterdir())] == ["mlflow.db", "optuna.db"]
    return folder


def places(folder: Path, name: str = "") -> list[str]:
    words = [TRACKING, f"sqlite:///{folder}/{name or 'mlflow'}.db"]
    return [*words, STORAGE, f"sqlite:///{folder}/{name or 'optuna'}.db"]


def read_all(folder: Path) -> None:
    """Read a store in every way there is."""
    uri = f"sqlite:///{folder}/mlflow.db"
    assert load_run(KEY, uri).config.hidden == (7,)
    assert load_study("s", tracking_uri=uri)["name"].tolist() == ["a run"]
    with pytest.raises(UserError, match="provenance.json of run"):
        replay.replay(KEY, tracking_uri=uri)
    cli.main(kl_weight.STUDY, ["--dry-run", "--study-name", "other", *places(folder)])


def test_reading_leaves_a_folder_as_it_is(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = listing(home)
    read_all(home)
    assert listing(home) == before
    assert not listing(tmp_path)


def test_a_mistyped_address_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlfow.db"
    for read in (
        lambda: load_run(KEY, uri),
        lambda: load_study("s", tracking_uri=uri),
        lambda: replay.replay(KEY, tracking_uri=uri),
        lambda: connect("sqlite:///no/such/folder/mlflow.db", write=False),
    ):
        with pytest.raises(UserError, match=r"mlf.*\.db does not exist") as error:
            read()
        assert str(tmp_path) in str(error.value)
    assert not listing(tmp_path)


def test_a_reader_sees_what_a_writer_has_in_its_log_and_does_not_keep_it(home, tmp_path):
    file = tmp_path / "a b%3F#ä.db"
    shutil.copy(home / "mlflow.db", file)
    with closing(sqlite3.connect(file)) as writer:
        writer.execute("update experiments set name = 'renamed' where name = 'e'")
        writer.commit()
        client = connect(f"sqlite:///{file}", write=False).client
        assert client.get_experiment_by_name("renamed")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert connect(f"sqlite:///{file}", write=False).client.get_experiment_by_name("renamed")


@pytest.fixture
def readable(home: Path) -> Iterator[Path]:
    """Return a copy that another user can read, in a folder that pytest does not close to him."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    folder = Path("/tmp") / f"readable-{os.getpid()}"
    shutil.copytree(home, folder)
    artifacts = connect(f"sqlite:///{home}/mlflow.db", write=False).run(KEY)
    yield folder
    shutil.rmtree(folder)
