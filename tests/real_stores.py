"""Fixtures with real databases, and a study run once in a process of its own."""

import importlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import tracking
from studies import cli


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the tables of an MLflow database once, which takes seconds."""
    database = tmp_path_factory.mktemp("empty") / "mlflow.db"
    tracking.connect(f"sqlite:///{database}")
    return database


@pytest.fixture
def tracking_uri(empty_database: Path, tmp_path: Path) -> str:
    """Return the address of an own, empty MLflow database."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@dataclass(frozen=True)
class Finished:
    """A study that ran through: its addresses and what it printed."""

    folder: Path
    tracking_uri: str
    storage: str
    arguments: list[str]
    printed: str


@pytest.fixture(scope="session")
def finished(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Run a small KL-weight study once, through its command line; tests only read it."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copy(empty_database, folder / "mlflow.db")
    tracking_uri, storage = f"sqlite:///{folder}/mlflow.db", f"sqlite:///{folder}/optuna.db"
    arguments = ["--values", "0", "0.02", "1", "--seeds", "2", "--epochs", "3"]
    arguments += ["--tracking-uri", tracking_uri, "--storage", storage]
    done = study_command(arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return Finished(folder, tracking_uri, storage, arguments, done.stdout)


def study_command(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `python -m studies.kl_weight` in a process of its own."""
    command = [sys.executable, "-m", "studies.kl_weight", *arguments]
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)


def small_study(name: str, arguments: list[str], folder: Path) -> None:
    """Run a study in this process, tracked in a folder."""
    study = importlib.import_module(f"studies.{name}").STUDY
    places = ["--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    places += ["--storage", f"sqlite:///{folder}/optuna.db"]
    cli.main(study, [*arguments, *places])
