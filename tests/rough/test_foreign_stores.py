"""Databases that are old, new, broken off, another library's or another program's; and reading.

What is refused is not changed by a byte, and reading leaves a folder as it is.
"""

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from alembic import command
from mlflow.store.db.utils import InitialBase, _get_alembic_config
from optuna.storages._rdb.models import BaseModel
from real_stores import copy_home

from analysis.frames import load_study
from harness import RunConfig, UserError, load_run
from harness.models.vae import build
from harness.tracking import connect
from harness.tracking.addresses import sqlite_file
from harness.tracking.schema import check_database
from studies import kl_weight, replay
from studies.runner import cli
from studies.runner.database import has_study, open_storage, read_storage
from studies.runner.options import Places
from studies.runner.run import open_stores

KEY = "1" * 32
TRACKING, STORAGE = "--tracking-uri", "--storage"


def run_sql(file: Path, script: str) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(script)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of all that is in a folder.

    Without the time of "-shm", which is memory that the processes of a database share.
    """
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")}
    return {
        name: (found.st_size, 0 if name.endswith("-shm") else found.st_mtime_ns)
        for name, found in stats.items()
    }


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
    "MLflow's without a table": (
        *("mlflow", "drop table tags; drop table latest_metrics", TRACKING),
        "has lost its tables latest_metrics, tags; restore it from a copy",
    ),
    "Optuna's without a table": (
        *("optuna", "drop table trial_values", STORAGE),
        "has lost its tables trial_values; restore it from a copy",
    ),
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
        assert line.startswith(f"{option} {places[option]} ")
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


def test_a_database_that_was_killed_in_a_commit_is_opened(made, tmp_path):
    file, killed = tmp_path / "optuna.db", tmp_path / "killed.db"
    shutil.copy(made / "optuna.db", file)
    with closing(sqlite3.connect(file)) as writer:
        writer.execute("pragma cache_size = 1")  # pages are written before the commit
        for i in range(3000):
            writer.execute("insert into studies(study_name) values (?)", [f"{i:0100}"])
        shutil.copy(f"{file}-journal", f"{killed}-journal")  # a copy has no process
        shutil.copy(file, killed)
    assert killed.stat().st_size > (made / "optuna.db").stat().st_size
    storage = open_storage(f"sqlite:///{killed}")
    assert [study.study_name for study in storage.get_all_studies()] == ["other"]
    assert killed.read_bytes() == (made / "optuna.db").read_bytes()


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
    folder = tmp_path_factory.mktemp("home")
    first = tmp_path_factory.mktemp("first")
    shutil.copy(made / "mlflow.db", first)
    shutil.copy(made / "optuna.db", first)
    store = connect(f"sqlite:///{first}/mlflow.db")
    tags = {"study": "s", "role": "run", "host": "here"}
    log = store.start(store.experiment("e", "Why?"), KEY, "a run", tags, {"seed": 0})
    config = RunConfig(hidden=(7,), latent_size=3)
    log.model(config, build(config, data.image_shape))
    log.end()
    move(first, folder)
    return folder


def move(there: Path, here: Path) -> None:
    """Copy a folder with databases; the processes that made them have ended."""
    copy_home(there, here)
    for lock in here.glob("*.lock"):
        lock.unlink()
    run_sql(here / "mlflow.db", "pragma journal_mode=WAL")
    names = [path.name for path in sorted(here.iterdir())]
    assert names == ["mlflow.db", "mlruns", "optuna.db"]


def places(folder: Path, name: str = "") -> list[str]:
    words = [TRACKING, f"sqlite:///{folder}/{name or 'mlflow'}.db"]
    return [*words, STORAGE, f"sqlite:///{folder}/{name or 'optuna'}.db"]


def read_all(folder: Path, name: str = "a run") -> None:
    """Read a store in every way there is."""
    uri = f"sqlite:///{folder}/mlflow.db"
    assert load_run(KEY, uri).config.hidden == (7,)
    assert load_study("s", tracking_uri=uri)["name"].tolist() == [name]
    with pytest.raises(UserError, match="provenance.json of run"):
        replay.replay(KEY, tracking_uri=uri)


def test_reading_leaves_a_folder_as_it_is(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = listing(home)
    read_all(home)
    cli.main(kl_weight.STUDY, ["--dry-run", "--study-name", "other", *places(home)])
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
    file, url = tmp_path / "a b?#ä.db", f"sqlite:///{tmp_path}/a b%3F#ä.db"
    shutil.copy(home / "mlflow.db", file)
    with closing(sqlite3.connect(file)) as writer:
        writer.execute("update experiments set name = 'renamed' where name = 'e'")
        writer.commit()
        client = connect(url, write=False).client
        assert client.get_experiment_by_name("renamed")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert connect(url, write=False).client.get_experiment_by_name("renamed")


@pytest.mark.slow
@pytest.mark.parametrize("log", ["no log", "a log in use", "the log of a killed process"])
def test_a_folder_of_another_user_is_read_without_a_right_to_write(log, home):
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    read_all(home)  # Python itself may lie where only root can read
    with tempfile.TemporaryDirectory() as above, contextlib.ExitStack() as open_:
        folder = Path(above) / "home"
        folder.mkdir()
        move(home, folder)
        for path in (Path(above), folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if log != "no log":
            writer = open_.enter_context(closing(sqlite3.connect(folder / "mlflow.db")))
            writer.execute("update runs set name = 'of the log'")
            writer.commit()
        if log.endswith("killed process"):  # a copy has no process
            folder = Path(shutil.copytree(folder, Path(above) / "copy"))
        before = listing(folder)
        failure = as_nobody(lambda: read_all(folder, "a run" if log == "no log" else "of the log"))
        assert not failure
        assert listing(folder) == before


def as_nobody(work: Callable[[], None]) -> str:
    """Return the traceback of a function in a process of another user, "" if it is done."""
    with tempfile.TemporaryFile() as file:
        if (child := os.fork()) == 0:
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                os.chdir("/")
                work()
            except BaseException:
                file.write(traceback.format_exc().encode())
                file.flush()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        file.seek(0)
        return file.read().decode()


# --- migration ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("library", ["MLflow", "Optuna"])
def test_an_older_database_is_migrated_by_the_command_that_the_line_has(library, tmp_path):
    url, way = f"sqlite:///{tmp_path}/it's old.db", connect if library == "MLflow" else open_storage
    make_older(library, url)
    with pytest.raises(UserError, match=f"an older {library}") as refusal:
        way(url)
    (typed,) = re.findall("`(.*)`", str(refusal.value))
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(typed, shell=True, check=True, env=os.environ | path, capture_output=True)
    way(url)


def make_older(library: str, url: str) -> None:
    """Make a database as an older release did, by the library's own migrations."""
    if library == "MLflow":
        engine = sqlalchemy.create_engine(url)
        InitialBase.metadata.create_all(engine)
        config = _get_alembic_config(url)
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "acf3f17fdcc7")  # of MLflow 2.13
        engine.dispose()
    else:
        optuna.storages.RDBStorage(url).engine.dispose()
        run_sql(sqlite_file(url), f"{VERSION} 'v3.0.0.d'")  # which lacks an index alone


# --- PostgreSQL ---------------------------------------------------------------------------------

SERVED = {
    "another program": (*("create table studies(id int)", f"{FOREIGN} (tables: studies)"),),
    "MLflow": (
        "create table experiments(experiment_id int, artifact_location int, lifecycle_stage int)",
        "is a database of MLflow, to be given as --tracking-uri",
    ),
    "newer": (
        "create table studies(study_id int, study_name int);"
        "create table version_info(schema_version int);"
        "create table alembic_version(version_num text);"
        "insert into alembic_version values ('v9.0.0.a')",
        "is a database of a newer Optuna, schema v9.0.0.a",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("script", "why"), SERVED.values(), ids=[*SERVED])
def test_a_served_database_that_is_not_ours_gets_no_tables(script, why, postgres, request):
    url = postgres.create(re.sub(r"\W", "_", request.node.callspec.id).lower())
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(script)
        before = sqlalchemy.inspect(connection).get_table_names()
    with pytest.raises(UserError) as refusal:
        open_storage(url)
    assert why in str(refusal.value)
    assert "secret" not in str(refusal.value)
    with engine.connect() as connection:
        assert sqlalchemy.inspect(connection).get_table_names() == before
    engine.dispose()


@pytest.mark.slow
def test_a_served_database_is_opened_again(postgres):
    url = postgres.create("twice")
    opened = [open_storage(url), open_storage(url), read_storage(url)]
    optuna.create_study(storage=opened[0], study_name="mine")
    for storage in opened:
        assert [study.study_name for study in storage.get_all_studies()] == ["mine"]
        storage.remove_session()
        storage.engine.dispose()
