"""Stores that were moved or copied, reports of two studies of one name, and damaged caches."""

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from harness import load_run
from harness.data.dataset import Dataset
from harness.errors import UserError
from harness.metrics import frechet
from harness.models.files import put_sealed, read_sealed
from harness.tracking import connect, store
from harness.tracking.artifacts import moved, rebase
from studies import kl_weight, replay
from studies.runner import cli

NAME = "kl_weight-digits"
SMALL = ["--values", "0.05", "--seeds", "1", "--epochs", "1"]


def rows(file: Path, query: str, *values: str) -> list[tuple]:
    with closing(sqlite3.connect(file)) as database, database:
        return database.execute(query, values).fetchall()


def places(folder: Path) -> set[str]:
    """Return the folders, below which a database has its artifacts."""
    queries = ("select artifact_uri from runs", "select artifact_location from experiments")
    found = [place for query in queries for (place,) in rows(folder / "mlflow.db", query)]
    return {place.partition("/mlruns/")[0] for place in found if place.startswith("file:")}


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- places -------------------------------------------------------------------------------------

E = "E with 100 %, ä"
PLACES = {  # place in the database of E -> what is there beside E, None where nothing is taken
    "file:///D/mlruns/x/1/artifacts": "x/1/artifacts",
    "/D/mlruns/x/1/artifacts": "x/1/artifacts",
    "file:///a/mlruns/b/mlruns/x/1/artifacts": "x/1/artifacts",
    "file:///D/mlruns/x%20y": "x y",
    "file:///D/mlruns/new": "new",  # which will be written
    "file:///D/mlruns/missing": None,
    "file:///D/elsewhere/x": None,
    "s3://bucket/mlruns/x": None,
    "mlflow-artifacts:/mlruns/x": None,
}


@pytest.mark.parametrize("location", PLACES)
def test_a_place_is_taken_from_beside_the_database_if_something_is_there(location, tmp_path):
    home = tmp_path / E
    for there in ("x/1/artifacts", "x y"):
        (home / "mlruns" / there).mkdir(parents=True)
    found = moved(location, home, "new")
    expected = PLACES[location]
    assert (found and found[1]) == (expected and home / "mlruns" / expected)


def test_a_database_at_its_place_under_another_name_is_not_moved(tmp_path):
    (tmp_path / "D" / "mlruns" / "x").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "D")
    location = (tmp_path / "D" / "mlruns" / "x").as_uri()
    assert moved(location, tmp_path / "link") is None
    assert moved(location, tmp_path / "D") is None


@pytest.mark.parametrize(
    "uri", ["sqlite:///nowhere/mlflow.db", "http://127.0.0.1:9", "postgresql://h/x"]
)
def test_what_is_no_database_file_is_not_rebased(uri):
    with pytest.raises(UserError, match="is no database file that exists"):
        rebase(uri)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="takes another user's folder")
def test_a_copy_is_read_where_the_original_is_forbidden():
    with tempfile.TemporaryDirectory() as base:  # pytest's folders are the user's alone
        there, home = Path(base) / "alice", Path(base) / E
        for folder in (there / "D", home):
            (folder / "mlruns" / "x").mkdir(parents=True)
        there.chmod(0o700)
        Path(base).chmod(0o755)
        location = (there / "D" / "mlruns" / "x").as_uri()
        code = "import os; from harness.tracking.artifacts import moved, Path; os.setuid(65534);"
        code += f"print(moved({location!r}, Path({str(home)!r}))[1])"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == str(home / "mlruns" / "x"), done.stderr


# --- a study that is moved, or copied -----------------------------------------------------------


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of a study's folder, whose database names the artifacts of the original."""
    shutil.copytree(finished.folder, tmp_path / E)
    return tmp_path / E


def test_a_copy_is_read_beside_its_database_which_stays_as_it_is(copied, finished, caplog):
    store._warn.cache_clear()
    before, uri = files(finished.folder), f"sqlite:///{copied}/mlflow.db"
    run = connect(uri).runs(NAME, role="run")[0]
    config = next(copied.glob(f"mlruns/*/{run.run_id}/artifacts/model/config.json"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"seed": 7}))
    assert load_run(run.run_id, uri).config.seed == 7
    assert connect(uri).record(run.run_id).config.seed == 7
    assert places(copied) == {finished.folder.as_uri()}
    assert f"moved or copied from {finished.folder}; its artifacts are read here" in caplog.text
    assert len(caplog.messages) == 1
    # The command, as it would be typed.
    code = shlex.split(caplog.messages[0].partition("after: ")[2])[-1]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code)
    assert printed.getvalue().endswith("; its database now names the artifacts beside it\n")
    assert places(copied) == {copied.as_uri()}
    assert rebase(uri) == ""
    (note,) = {text.split("--tracking-uri ")[1].split("\n")[0] for text in notes(copied)}
    assert shlex.split(note) == [uri]
    assert files(finished.folder) == before


def notes(folder: Path) -> list[str]:
    """Return the descriptions of a database's runs with the command that repeats them."""
    query = "select value from tags where key = 'mlflow.note.content' and value like '%replay%'"
    return [text for (text,) in rows(folder / "mlflow.db", query)]


def arguments(folder: Path, *more: str) -> list[str]:
    at = ["--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    return [*SMALL, *at, "--storage", f"sqlite:///{folder}/optuna.db", *more]


def same_command(folder: Path, capfd: pytest.CaptureFixture[str], *more: str) -> str:
    cli.main(kl_weight.STUDY, arguments(folder, *more))
    return "".join(capfd.readouterr())


@pytest.mark.slow
def test_a_moved_study_goes_on_and_is_replayed_where_it_is(tmp_path, capfd, caplog):
    old, new = tmp_path / "D", tmp_path / E
    same_command(old, capfd)
    old.rename(new)
    for _ in range(2):
        assert "1 run is finished; 0 are left" in same_command(new, capfd)
    assert caplog.text.count(f"{new} was moved or copied from {old}") == 1
    new.rename(old)  # back, and it grows
    assert "1 run is finished; 1 is left" in same_command(old, capfd, "--seeds", "2")
    assert f"{old} was moved or copied from {new}" in caplog.text
    assert places(old) == {old.as_uri()}
    assert not new.exists()
    run = connect(f"sqlite:///{old}/mlflow.db").runs(NAME, role="run")[0]
    assert replay.replay(run.run_id, tracking_uri=f"sqlite:///{old}/mlflow.db")
    assert [path.name for path in (old / "reports").iterdir() if path.is_dir()] == [NAME]


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was_moved_to(empty_database, tmp_path, capfd, caplog):
    old, new = tmp_path / "D", tmp_path / E
    old.mkdir()
    shutil.copy(empty_database, old / "mlflow.db")
    long = ["--epochs", "100000", "--seeds", "2"]
    command = [sys.executable, "-m", "studies.kl_weight", *arguments(old, *long)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as study:
        for line in study.stdout:
            if b"epoch" in line and b"runs," in line and b"%" in line:
                break
        study.send_signal(signal.SIGKILL)
    old.rename(new)
    with closing(sqlite3.connect(new / "optuna.db")) as storage, storage:  # the same, but shorter
        storage.execute(
            "update study_user_attributes set value_json = replace(value_json, '100000', '1')"
        )
    same_command(new, capfd, "--seeds", "2")
    assert f"{new} was moved or copied from {old}" in caplog.text
    assert places(new) == {new.as_uri()}
    assert not old.exists()


@pytest.mark.slow
def test_a_copy_grows_without_a_trace_in_the_original(tmp_path, capfd, caplog):
    old, new = tmp_path / "D", tmp_path / E
    same_command(old, capfd)
    shutil.copytree(old, new)
    before = files(old)
    same_command(new, capfd, "--seeds", "2")
    assert f"{new} was moved or copied from {old}" in caplog.text
    assert files(old) == before
    bare = tmp_path / "F"  # without artifacts, which are then those of the original
    shutil.copytree(old, bare, ignore=shutil.ignore_patterns("mlruns"))
    same_command(bare, capfd, "--seeds", "2")
    assert places(bare) == {old.as_uri(), bare.as_uri()}
    assert files(old) == before


# --- two studies of one name --------------------------------------------------------------------


@pytest.mark.slow
def test_reports_of_stores_beside_each_other_are_not_overwritten(tmp_path, capfd):
    def study(stores: str, *more: str) -> str:
        at = ["--tracking-uri", f"sqlite:///{tmp_path}/{stores[0]}.db"]
        at += ["--storage", f"sqlite:///{tmp_path}/{stores[1]}.db", *more]
        return same_command(tmp_path, capfd, *at)

    study("ab")
    first, second = tmp_path / "reports" / NAME, tmp_path / "reports" / f"{NAME}.2"
    before = files(first)
    for _ in range(2):
        assert f"Report: {second}/report.html" in study("cd")
        assert files(first) == before
    before = files(second)
    assert f"Report: {first}/report.html" in study("ab", "--seeds", "2")
    assert files(second) == before


# --- caches -------------------------------------------------------------------------------------


def damaged(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 1])
    return {
        "a bit": content[:middle] + flipped + content[middle + 1 :],
        "the end": content[:-1],
        "half": content[:middle],
        "empty": b"",
        "no digest": content[:-32],
        "text": b"not found\n" * 100,
        "longer": content + b"\0",
    }


@pytest.mark.parametrize("kind", damaged(bytes(100)))
def test_a_damaged_file_is_not_read(kind, tmp_path):
    put_sealed(tmp_path / "file", bytes(range(100)))
    assert read_sealed(tmp_path / "file") == bytes(range(100))
    (tmp_path / "file").write_bytes(damaged((tmp_path / "file").read_bytes())[kind])
    with pytest.raises(ValueError, match="contents have changed"):
        read_sealed(tmp_path / "file")


def test_a_damaged_classifier_is_trained_anew_and_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(frechet, "STEPS", 3)
    images = torch.randint(0, 255, (40, 1, 4, 4), dtype=torch.uint8)
    data = Dataset.from_tensors("tiny", images, torch.arange(40) % 2)
    weights = frechet.classifier(data, tmp_path).state_dict()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    state = load(read_sealed(file))
    other = save({name: value + 1 for name, value in state.items()})  # whole, but another's
    for changed in (damaged(content)["a bit"], other + content[-32:], content[:-32]):
        file.write_bytes(changed)
        again = frechet.classifier(data, tmp_path).state_dict()
        assert all(torch.equal(again[name], weights[name]) for name in weights)
        assert file.read_bytes() == content
    assert [*tmp_path.iterdir()] == [file]
