"""The wheel, installed outside the repository: complete, and it writes where it is started."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
UV = str(Path(sysconfig.get_path("scripts")) / "uv")
SMALL = ("--values", "0.01", "0.02", "--seeds", "1", "--epochs", "1")


def done(*command: object, folder: Path) -> str:
    """Run a command in a folder and return what it prints; it must succeed in silence."""
    words = [str(word) for word in command]
    # A study that another test ran in this process has left its address in the environment.
    env = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    ended = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=env, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def sources(packages: Path) -> set[Path]:
    """Return all files of installed packages but what importing them compiles."""
    found = {path for path in packages.rglob("*") if path.is_file()}
    return {path for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel of the sources as they are; the build backend comes from the index."""
    out = tmp_path_factory.mktemp("wheel")
    done(UV, "build", "--quiet", "--wheel", "--out-dir", out, ROOT, folder=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Install it into an environment of its own, beside this one's libraries."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    python = place / "bin" / "python"
    done(UV, "venv", "--quiet", "--python", sys.executable, place, folder=place.parent)
    done(UV, "pip", "install", "--quiet", "--no-deps", "--no-index", "--python", python, wheel,
         folder=place.parent)  # fmt: skip
    (packages,) = place.glob("lib/*/site-packages")
    # A path file's own path files are not read, so the editable install beside is out of sight.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_the_wheel_holds_every_file_of_its_packages(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(
        ["git", "ls-files", "harness", "studies", "analysis"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert set(listed.stdout.split()) <= held
    packages = {name.split("/")[0] for name in held if ".dist-info/" not in name}
    assert packages == {"harness", "studies", "analysis"}


def test_the_imported_packages_are_those_of_the_wheel(installed, tmp_path):
    printed = done(installed, "-c", "import harness; print(harness.__file__)", folder=tmp_path)
    assert Path(printed.strip()).is_relative_to(installed.parents[1])


def test_a_study_writes_into_the_folder_where_it_is_started(installed, tmp_path):
    (packages,) = installed.parents[1].glob("lib/*/site-packages")
    before = sources(packages)
    command = (installed, "-m", "studies.kl_weight", *SMALL)
    assert "2 runs of 1 epoch " in done(*command, "--dry-run", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    printed = " ".join(done(*command, folder=tmp_path).split())
    assert f"Report: {tmp_path}/reports/kl_weight-digits/report.html" in printed
    written = {path.name for path in tmp_path.iterdir() if path.suffix not in (".lock",)}
    expected = {"mlflow.db", "optuna.db", "mlruns", "reports"}
    assert expected <= written <= expected | {"mlflow.db-wal", "mlflow.db-shm"}
    assert sources(packages) == before


def test_an_own_study_runs_beside_the_wheel(installed, tmp_path):
    shutil.copy(ROOT / "examples" / "learning_rate.py", tmp_path)
    printed = done(installed, "learning_rate.py", "--dry-run", folder=tmp_path)
    assert "5 values of learning_rate (0.0001, 0.0003, 0.001, 0.003, 0.01)" in printed
    printed = done(installed, "learning_rate.py", "--help", folder=tmp_path)
    assert printed.startswith("usage: python learning_rate.py")
