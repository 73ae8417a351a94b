"""Fixtures with real databases, and a study run once in a process of its own."""

import importlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from real_servers import MlflowServer, Proxy

from harness import tracking
from harness.metrics import frechet


def once(name: str, make: Callable[[Path], None], temporary: pytest.TempPathFactory) -> Path:
    """Return a folder of a name that the first process to ask for it makes, for all that test."""
    base = temporary.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, made = shared / name, shared / f"{name}.made"
    with FileLock(shared / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a failure left
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


def copy_home(there: Path, here: Path) -> None:
    """Copy a folder with databases that name it, in which they then name the copy."""
    shutil.copytree(there, here, ignore=shutil.ignore_patterns("*.db*"), dirs_exist_ok=True)
    for file in there.glob("*.db"):
        with (
            closing(sqlite3.connect(file)) as old,
            closing(sqlite3.connect(here / file.name)) as new,
        ):
            new.executescript("\n".join(old.iterdump()).replace(str(there), str(here)))


@pytest.fixture(scope="session", autouse=True)
def features(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return where studies in tests keep classifiers: not in the cache of the user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))

    def make(folder: Path) -> None:  # other programs keep theirs: a list of fonts takes seconds
        for kept in {"matplotlib", "uv"}.intersection(path.name for path in cache.glob("*")):
            (folder / kept).symlink_to(cache / kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(once("cache", make, tmp_path_factory)))
        yield frechet.user_cache()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the tables of an MLflow database once, which takes seconds."""

    def make(folder: Path) -> None:
        tracking.connect(f"sqlite:///{folder}/mlflow.db")

    return once("empty", make, tmp_path_factory) / "mlflow.db"


@pytest.fixture
def server(empty_database: Path, tmp_path: Path) -> Iterator[MlflowServer]:
    """Start an MLflow server."""
    server = MlflowServer(tmp_path, empty_database)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: MlflowServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """Return a new address of the server, whose spool lies in the test's folder."""
    monkeypatch.setattr("harness.tracking.addresses.project_root", lambda: tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def tracking_uri(empty_database: Path, tmp_path: Path) -> str:
    """Return the address of an own, empty MLflow database."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@dataclass(frozen=True)
class Finished:
    """A study that ran through: its addresses and what it printed."""

    folder: Path
    arguments: list[str]
    printed: str

    @property
    def tracking_uri(self) -> str:
        """Address of the MLflow database."""
        return f"sqlite:///{self.folder}/mlflow.db"

    @property
    def storage(self) -> str:
        """Address of Optuna's database."""
        return f"sqlite:///{self.folder}/optuna.db"


@pytest.fixture(scope="session")
def finished(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Run a small KL-weight study once, through its command line; tests only read it."""

    def make(folder: Path) -> None:
        shutil.copy(empty_database, folder / "mlflow.db")
        done = study_command(arguments(folder))
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        (folder / "printed").write_text(done.stdout)

    def arguments(folder: Path) -> list[str]:
        words = ["--values", "0", "0.02", "1", "--seeds", "2", "--epochs", "3"]
        words += ["--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
        return [*words, "--storage", f"sqlite:///{folder}/optuna.db"]

    # A copy for this process: tests that give the command again write what they found already.
    there, here = once("study", make, tmp_path_factory), tmp_path_factory.mktemp("study")
    copy_home(there, here)
    printed = (here / "printed").read_text().replace(str(there), str(here))
    return Finished(here, arguments(here), printed)


def study_command(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `python -m studies.kl_weight` in a process of its own, which has two cores."""
    command = [sys.executable, "-m", "studies.kl_weight", *arguments]
    root, two = Path(__file__).resolve().parents[1], {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=two, check=False)


def small_study(name: str, arguments: list[str], folder: Path) -> None:
    """Run a study in this process, tracked in a folder."""
    from studies.runner import cli

    study = importlib.import_module(f"studies.{name}").STUDY
    places = ["--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    places += ["--storage", f"sqlite:///{folder}/optuna.db"]
    cli.main(study, [*arguments, *places])
