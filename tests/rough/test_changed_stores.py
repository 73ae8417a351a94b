"""Stores that are changed from outside, and errors of a local store: one line, and a way out."""

import errno
import logging
import os
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from benchmarks import children
from harness import RunConfig, UserError, processes, tracking
from harness.data.dataset import Dataset
from harness.models.files import save_model
from harness.models.vae import build
from harness.tracking import addresses
from studies import kl_weight
from studies.runner import cli, stopping
from studies.runner.options import Options
from studies.runner.run import run
from studies.runner.study import make_plan

STUDY = replace(kl_weight.STUDY, figures={}, base=RunConfig(hidden=(16,), latent_size=2))


@dataclass
class Place:
    """A small study in a folder, and a second client of its MLflow database."""

    folder: Path
    data: Dataset
    capsys: pytest.CaptureFixture[str]
    caplog: pytest.LogCaptureFixture
    monkeypatch: pytest.MonkeyPatch

    @property
    def database(self) -> Path:
        """MLflow's database."""
        return self.folder / "mlflow.db"

    @property
    def client(self) -> MlflowClient:
        """Client of a user who changes the store."""
        return MlflowClient(f"sqlite:///{self.database}")

    @property
    def experiment(self) -> Any:
        """The study's experiment, whatever its name and state."""
        every = self.client.search_experiments(ViewType.ALL)
        return next(one for one in every if one.name != "Default")

    def run_id(self, name: str) -> str:
        """Return the id of the latest run of a name that was not deleted."""
        every = self.client.search_runs([self.experiment.experiment_id])
        return next(one.info.run_id for one in every if one.info.run_name == name)

    def command(self, **given: Any) -> None:
        """Run the study as its command does."""
        options = Options(
            values=given.pop("values", (0.02, 1.0)),
            seeds=1,
            settings={"epochs": 2, "batch_size": 16},
            storage=f"sqlite:///{self.folder}/optuna.db",
            tracking_uri=f"sqlite:///{self.database}",
            **given,
        )
        with cli.clear_errors([]) as shown:
            run(make_plan(STUDY, options), self.data, options, shown)

    def start(self, code: int = 0, then: Callable[[], object] | None = None, **given: Any) -> str:
        """Run the study's command; return its warnings and what it printed.

        `then` is called between the first two epochs, as by another process.
        """
        real = stopping.check

        def check() -> None:
            nonlocal then
            if then is not None:
                then, do = None, then
                do()
            real()

        self.capsys.readouterr()
        self.caplog.clear()
        with self.monkeypatch.context() as patch:
            patch.setattr(stopping, "check", check)
            patch.setattr(processes, "available", lambda: 1)
            ended = 0
            try:
                self.command(**given)
            except SystemExit as end:
                ended = int(end.code or 0)
        out, err = self.capsys.readouterr()
        assert ended == code, out + err
        assert "Traceback" not in out + err
        warnings = [one.getMessage() for one in self.caplog.records if one.levelno > logging.INFO]
        return "\n".join([*warnings, out, err.rstrip()])

    def finished(self) -> list[str]:
        """Return the names of the finished runs, after a check of Optuna against MLflow."""
        storage = f"sqlite:///{self.folder}/optuna.db"
        store = tracking.connect(f"sqlite:///{self.database}")
        done = []
        for name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=name, storage=storage)
            lost = study.user_attrs.get("lost", [])
            done += [t for t in study.trials if t.state.name == "COMPLETE" and t.number not in lost]
        runs = [r for r in store.runs("kl_weight-digits") if r.status == "FINISHED"]
        held = {key for trial in done for key in trial.user_attrs["keys"]}
        assert {run.key for run in runs} <= held
        return sorted(run.name for run in runs)


NAMES = ["kl_weight=0.02 seed=0", "kl_weight=1 seed=0", "summary"]


@pytest.fixture
def place(
    empty_database: Path,
    tmp_path: Path,
    tiny: Dataset,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return Place(tmp_path, tiny, capsys, caplog, monkeypatch)


def error_in(printed: str) -> str:
    """Return a command's error, its last line and only one."""
    assert printed.count("error: ") == 1, printed
    return printed.splitlines()[-1]


def typed(error: str, after: str) -> None:
    """Type the command that an error names after some words."""
    command = error.partition(f"{after} `")[2].partition("`")[0]
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def everything(folder: Path) -> tuple[list[str], list[str]]:
    """Return the files of a folder and the contents of its databases."""
    texts = []
    for file in sorted(folder.glob("*.db")):
        with closing(sqlite3.connect(file)) as connection:
            texts += list(connection.iterdump())
    beside = ("-wal", "-shm", ".lock")
    return sorted(str(f) for f in folder.rglob("*") if not f.name.endswith(beside)), texts


# --- changed from outside -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_deleted_run_costs_that_run(place):
    place.start()
    assert place.finished() == NAMES
    for name in NAMES:
        run_id = place.run_id(name)
        place.client.delete_run(run_id)
        printed = place.start()
        assert printed.count(f"Run {name} was deleted or changed in MLflow; another is made") == 1
        assert place.finished() == NAMES
        place.client.restore_run(run_id)
        place.start()
        assert place.finished() == NAMES
        tags = place.client.get_run(run_id).data.tags
        assert tags["reason"] == "deleted in MLflow, made again, and restored"


@pytest.mark.slow
def test_runs_that_are_deleted_meanwhile_are_made_again_by_the_same_command(place):
    printed = place.start(then=lambda: place.client.delete_run(place.run_id(NAMES[0])))
    assert f"Run {NAMES[0]} was deleted in MLflow; its further records are dropped" in printed
    assert f"Run {NAMES[0]} was deleted or changed in MLflow; another is made" in printed
    assert place.finished() == NAMES


@pytest.mark.slow
def test_all_runs_deleted_for_good_are_no_reason_to_train_in_another_store(place):
    place.start()
    for name in NAMES:
        place.client.delete_run(place.run_id(name))
    gc = f"MLFLOW_TRACKING_URI=sqlite:///{place.database} {sys.executable} -m mlflow gc "
    typed(f"by `{gc} --backend-store-uri sqlite:///{place.database}`", "by")
    before = everything(place.folder)
    error = error_in(place.start(2))
    assert "has 2 runs of study 'kl_weight-digits', and --tracking-uri" in error
    assert "has none of them" in error
    assert everything(place.folder) == before
    assert "--fresh" in error
    place.start(fresh=True)
    assert place.finished() == NAMES


@pytest.mark.slow
def test_a_renamed_experiment_and_a_renamed_run_are_followed(place):
    def rename() -> None:
        place.client.rename_experiment(place.experiment.experiment_id, "mine")
        place.client.set_tag(place.run_id(NAMES[1]), "mlflow.runName", "foo")

    place.start(then=rename)
    assert place.finished() == sorted([NAMES[0], "foo", "summary"])
    printed = place.start()
    assert printed.count("Experiment 'kl_weight-digits' is called 'mine' in MLflow") == 1
    assert "foo" not in printed
    place.client.rename_experiment(place.experiment.experiment_id, "kl_weight-digits")
    place.start()
    names = [one.name for one in place.client.search_experiments(ViewType.ALL)]
    assert sorted(names) == ["Default", "kl_weight-digits"]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after", "meanwhile"])
def test_a_deleted_experiment_is_restored_by_the_command_that_is_named(place, when):
    def delete() -> None:
        place.client.delete_experiment(place.experiment.experiment_id)

    if when == "meanwhile":
        error = error_in(place.start(2, then=delete))
    else:
        if when == "before":
            place.client.create_experiment("kl_weight-digits")
        else:
            place.start()
        delete()
        before = everything(place.folder)
        error = error_in(place.start(2))
        assert everything(place.folder) == before
    assert error.startswith("error: experiment 'kl_weight-digits' was deleted in MLflow; restore")
    typed(error, "restore it by")
    place.start()
    assert place.finished() == NAMES


@pytest.mark.slow
def test_a_deleted_experiment_is_removed_by_the_other_command_that_is_named(place):
    place.start()
    place.client.delete_experiment(place.experiment.experiment_id)
    typed(error_in(place.start(2)), "remove it by")
    assert "--fresh" in error_in(place.start(2))
    place.start(fresh=True)
    assert place.finished() == NAMES


# --- errors of a local store --------------------------------------------------------------------


def rename(database: str, table: str) -> Callable[[Path], Callable[[], None]]:
    """Return what takes a table of a database away, and returns what gives it back."""

    def alter(file: Path, old: str, new: str) -> None:
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute("pragma legacy_alter_table = on")  # references stay
            connection.execute(f"alter table {old} rename to {new}")

    def away(folder: Path) -> Callable[[], None]:
        alter(folder / database, table, "elsewhere")
        return lambda: alter(folder / database, "elsewhere", table)

    return away


def tear(database: str, table: str) -> Callable[[Path], Callable[[], None]]:
    """Return what overwrites the first page of a table, and returns what restores it."""

    def torn(folder: Path) -> Callable[[], None]:
        file = folder / database
        with closing(sqlite3.connect(file, isolation_level=None)) as connection:
            connection.execute("pragma wal_checkpoint(truncate)")
            page = connection.execute(
                "select rootpage from sqlite_master where name = ?", [table]
            ).fetchone()[0]
            (size,) = connection.execute("pragma page_size").fetchone()
        with file.open("r+b") as opened:
            opened.seek((page - 1) * size)
            before = opened.read(size)
            opened.seek((page - 1) * size)
            opened.write(b"\xff" * size)

        def mend() -> None:
            with file.open("r+b") as opened:
                opened.seek((page - 1) * size)
                opened.write(before)

        return mend

    return torn


def lock(database: str) -> Callable[[Path], Callable[[], None]]:
    """Return what takes the lock of a database, and returns what frees it."""

    def locked(folder: Path) -> Callable[[], None]:
        connection = sqlite3.connect(
            folder / database, isolation_level=None, check_same_thread=False
        )
        connection.execute("begin exclusive")
        return connection.close

    return locked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (rename("mlflow.db", "metrics"), "a file is no intact database (--tracking-uri"),
        (rename("optuna.db", "trials"), "a file is no intact database (--storage"),
        (tear("mlflow.db", "metrics"), "a file is no intact database (--tracking-uri"),
        (lock("mlflow.db"), "another process holds a database (--tracking-uri"),
    ],
    ids=["metrics", "trials", "torn", "locked"],
)
def test_a_broken_store_is_one_line_and_the_same_command_goes_on(place, harm, why, monkeypatch):
    mends = []
    with monkeypatch.context() as patch:
        patch.setattr(addresses, "DATABASE_PATIENCE", 0)
        error = error_in(place.start(2, then=lambda: mends.append(harm(place.folder))))
    assert why in error
    assert "and the same command goes on" in error
    mends[0]()
    place.start()
    assert place.finished() == NAMES


@pytest.mark.slow
def test_a_lock_that_is_held_for_longer_than_mlflow_waits_is_waited_for(place):
    timers = []

    def hold() -> None:
        free = lock("mlflow.db")(place.folder)
        timers.append(threading.Timer(25, free))  # MLflow waits for 20 seconds
        timers[0].start()

    place.start(then=hold)
    timers[0].join()
    assert place.finished() == NAMES


@pytest.fixture
def public() -> Iterator[Path]:
    """Return a folder that every user can write."""
    if os.getuid():
        pytest.skip("only root can be another user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def as_nobody(
    place: Place, then: Callable[[], object] | None = None, **given: Any
) -> children.Ended:
    """Run the study in a process of a user without rights."""

    def command() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        os.umask(0o002)
        processes.available = lambda: 1
        real = stopping.check

        def check() -> None:
            stopping.check = real
            if then is not None:
                then()

        stopping.check = check
        place.command(**given)

    return children.start(command, place.folder).wait()


@pytest.mark.slow
def test_a_store_without_permission_is_one_line_and_files_follow_the_umask(
    place, empty_database, public
):
    children.import_all()
    place = replace(place, folder=public)
    shutil.copy(empty_database, place.database)
    os.chown(place.database, 65534, 65534)
    ended = as_nobody(place, lambda: (public / "mlruns/kl_weight-digits").chmod(0o555))
    assert ended.code == 2, ended.printed
    denied = "a file or folder cannot be used (--tracking-uri"
    assert denied in error_in(ended.printed)
    (public / "mlruns/kl_weight-digits").chmod(0o775)
    ended = as_nobody(place)
    assert ended.code == 0, ended.printed
    for path in public.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        mine = path == place.database or path.name.startswith(("child", "mlflow.db-"))
        assert mine or mode == (0o775 if path.is_dir() else 0o664), path
    for name, why in (
        ("mlflow.db", denied),
        ("optuna.db", "a file or folder cannot be used (--storage"),
        ("mlruns", "mlruns cannot be written ("),
        ("reports", "reports cannot be written ("),
    ):
        path, mode = public / name, stat.S_IMODE((public / name).stat().st_mode)
        os.chown(path, 0, 0)
        path.chmod(0o755 if path.is_dir() else 0o644)
        ended = as_nobody(place, values=(0.02, 0.5, 1.0))
        assert ended.code == 2, ended.printed
        assert why in error_in(ended.printed)
        os.chown(path, 65534, 65534)
        path.chmod(mode)
    ended = as_nobody(place, values=(0.02, 0.5, 1.0))
    assert ended.code == 0, ended.printed


# --- without a study ----------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Refuse larger files in this process, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_weights_follow_the_umask_and_a_full_disk_has_its_number(tmp_path):
    config = RunConfig(hidden=(64,), latent_size=2)
    model = build(config, (1, 8, 8))
    before = os.umask(0o002)
    try:
        save_model(config, model, tmp_path)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {0o664}
    with largest_file(4096), pytest.raises(OSError, match="File too large") as caught:
        save_model(config, model, tmp_path)
    assert caught.value.errno == errno.EFBIG
    assert addresses.trouble(caught.value).startswith("the disk is full (")


def sqlite_error(work: Callable[[], object]) -> sqlite3.Error:
    """Return the error of SQLite that a function raises."""
    with pytest.raises(sqlite3.Error) as caught:
        work()
    return caught.value


def test_errors_of_sqlite_and_of_the_system_are_recognised_behind_others(tmp_path):
    file = tmp_path / "x.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as one:
        one.execute("create table a (b)")
        with closing(sqlite3.connect(file, isolation_level=None, timeout=0)) as two:
            one.execute("begin exclusive")
            locked = sqlite_error(lambda: two.execute("select * from a"))
            one.execute("rollback")
            lost = sqlite_error(lambda: two.execute("select * from c"))
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as two:
            denied = sqlite_error(lambda: two.execute("insert into a values (1)"))
        one.execute("pragma max_page_count = 2")
        full = sqlite_error(lambda: one.execute("insert into a values (zeroblob(9999))"))
    file.write_bytes(b"no database" * 1000)
    with closing(sqlite3.connect(file)) as one:
        foreign = sqlite_error(lambda: one.execute("select * from a"))
    for error, what in (
        (locked, "another process holds a database (--storage u: database is locked); end it"),
        (lost, "a file is no intact database (--storage u: no such table: c); restore it"),
        (foreign, "a file is no intact database (--storage u: file is not a database); restore"),
        (denied, "a file or folder cannot be used (--storage u: attempt to write a readonly"),
        (full, "the disk is full (--storage u: database or disk is full); free some"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full ("),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full ("),
        (PermissionError(errno.EACCES, "Permission denied"), "a file or folder cannot be used ("),
    ):
        wrapped = ValueError("while writing")
        wrapped.__cause__ = error
        line = addresses.trouble(wrapped, "--storage u")
        assert line.startswith(what), line
        assert line.endswith(", and the same command goes on")
        assert addresses.is_locked(wrapped) == (error is locked)


def test_an_experiment_is_found_after_it_was_renamed_and_refused_once_deleted(tracking_uri):
    store = tracking.connect(tracking_uri)
    made = store.experiment("a", "Why?")
    store.client.rename_experiment(made, "b")
    assert store.find("a").experiment_id == store.experiment("a", "Why?") == made
    store.client.delete_experiment(made)
    for look in (lambda: store.find("a"), lambda: store.runs("a"), lambda: store.runs("b")):
        with pytest.raises(UserError, match="experiment 'b' was deleted in MLflow; restore it by"):
            look()
    store.client.restore_experiment(made)
    assert store.runs("a") == []


def test_records_of_a_deleted_run_are_dropped_and_those_of_others_kept(tracking_uri, caplog):
    store = tracking.connect(tracking_uri)
    home = store.experiment("a", "Why?")
    logs = [store.start(home, f"key{i}", f"run {i}", {"study": "s"}, {}) for i in range(2)]
    store.client.delete_run(store.run("key0").run_id)
    for log in logs:
        log.tag("mine", "1")
        log.end()
    assert caplog.messages == ["Run run 0 was deleted in MLflow; its further records are dropped"]
    assert [(run.name, run.status) for run in store.runs("a")] == [("run 1", "FINISHED")]
    assert len(store.runs("a", deleted=True)) == 2
