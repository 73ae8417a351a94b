"""`studies.runs`: the studies of a store, what they found and what comes next; no training."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from real_servers import MlflowServer
from real_stores import copy_home
from test_json import document, printed

from analysis import frames
from harness import load_run
from harness.tracking import connect
from studies import runs
from studies.runner.database import has_study, process_name
from studies.runner.terminal import size

NAME = "kl_weight-digits"


@pytest.fixture(scope="module")
def unsummarized(finished, tmp_path_factory) -> str:
    """Return the address of a copy of the study's store without its summary."""
    folder = tmp_path_factory.mktemp("unsummarized")
    shutil.copy(finished.folder / "mlflow.db", folder)
    uri = f"sqlite:///{folder}/mlflow.db"
    client = connect(uri).client
    for run in connect(uri).runs(NAME, role="summary"):
        client.delete_run(run.run_id)
    return uri


def shown(words: list[str], capfd) -> tuple[int, str]:
    """Run the command; return its exit code and all that it printed."""
    code = 0
    try:
        runs.main(words)
    except SystemExit as end:
        code = end.code
    return code, "".join(capfd.readouterr())


def test_best_is_what_the_study_printed(finished, capfd):
    found = printed(runs.main, ["best", NAME, "--tracking-uri", finished.tracking_uri], capfd)
    frame = frames.load_study(NAME, tracking_uri=finished.tracking_uri)
    assert (found["study"], found["dataset"], found["status"]) == (NAME, "digits", "finished")
    assert found["run_ids"] == frame["run_id"].tolist()
    assert found["finished_runs"] == len(frame) == 6
    assert [row["kl_weight"] for row in found["table"]] == [0, 0.02, 1]
    for row, (_, part) in zip(found["table"], frame.groupby("kl_weight"), strict=True):
        assert row["mse"] == pytest.approx(part["mse"].mean())
    assert found["best"] in (0, 0.02, 1)
    assert found["best"] == found["table"][found["best_row"]]["kl_weight"]
    assert found["best"] not in found["not_distinguishable"]
    assert set(found["not_distinguishable"]) < {0, 0.02, 1}
    assert "Games-Howell" in found["procedure"]
    assert load_run(found["model_run_id"], finished.tracking_uri).config.kl_weight == found["best"]
    assert Path(found["report"]).read_text().startswith("<!doctype html>")
    assert found["command"].startswith("python -m studies.kl_weight ")


def test_best_shows_the_same_lines_as_the_study(finished, capfd):
    code, text = shown(["best", NAME, "--tracking-uri", finished.tracking_uri], capfd)
    assert code == 0
    # Lines with an address are of the place where the study ran.
    lines = [line for line in text.splitlines() if "sqlite" not in line]
    assert len(lines) > 15
    assert "\n".join(lines[2:]) in finished.printed


def test_the_list_has_every_study(finished, capfd):
    words = ["list", "--tracking-uri", finished.tracking_uri]
    (found,) = printed(runs.main, words, capfd)["studies"]
    assert (found["study"], found["status"], found["finished_runs"]) == (NAME, "finished", 6)
    code, text = shown(words, capfd)
    assert code == 0
    best, date, report = (found[field] for field in ("best", "date", "report"))
    assert text == (
        f"{NAME}: finished, best {best}, {date[:16]}\n  digits, 6 finished runs, {report}\n"
    )


def test_next_is_a_command_on_the_same_store(finished, capfd):
    words = ["next", NAME, "--tracking-uri", finished.tracking_uri]
    command = printed(runs.main, words, capfd)["next_command"]
    assert shlex.split(command)[:3] == ["python", "-m", "studies.kl_weight"]
    assert finished.tracking_uri in shlex.split(command)
    assert shown(words, capfd) == (0, f"{command}\n")
    moved = shlex.split(shown([*words, "--storage", "sqlite:///moved.db"], capfd)[1])
    place = moved.index("--storage") + 1
    assert moved[place] == "sqlite:///moved.db"
    assert [*moved[:place], *moved[place + 1 :]] == [
        word for at, word in enumerate(shlex.split(command)) if at != place
    ]


def test_an_unfinished_study_has_the_command_that_finishes_it(unsummarized, capfd):
    where = ["--tracking-uri", unsummarized]
    found = printed(runs.main, ["next", NAME, *where], capfd)
    words = shlex.split(found["next_command"])
    assert found["status"] == "unfinished"
    assert words[:3] == ["python", "-m", "studies.kl_weight"]
    assert words[words.index("--values") + 1 :][:3] == ["0.0", "0.02", "1.0"]
    assert words[words.index("--tracking-uri") + 1] == unsummarized
    code, line = shown(["best", NAME, *where], capfd)
    assert (code, line.count("\n")) == (2, 1)
    assert f"study '{NAME}' is not finished: {found['next_command']}" in line
    assert printed(runs.main, ["best", NAME, *where], capfd)["best"] is None
    (listed,) = printed(runs.main, ["list", *where], capfd)["studies"]
    assert (listed["status"], listed["finished_runs"]) == ("unfinished", 6)


@pytest.mark.parametrize("command", ["best", "next"])
def test_an_unknown_study_is_one_line_with_those_that_there_are(command, finished, capfd):
    code, line = shown([command, "other", "--tracking-uri", finished.tracking_uri], capfd)
    assert (code, line.count("\n")) == (2, 1)
    assert f"no finished runs of study 'other' in {finished.tracking_uri}" in line
    assert f"which has {NAME};" in line


def test_an_empty_store_has_no_study(tracking_uri, capfd):
    found = printed(runs.main, ["list", "--tracking-uri", tracking_uri], capfd)
    assert found == {"studies": [], "exit_code": 0}


@pytest.mark.slow
def test_a_moved_store_answers_without_torch(finished, tmp_path):
    moved = shutil.copytree(finished.folder, tmp_path / "moved")
    uri = f"sqlite:///{moved}/mlflow.db"
    code = f"import sys; from studies import runs; runs.main(['best', '{NAME}', '--json', "
    code += f"'--tracking-uri', '{uri}']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = document(done.stdout)
    assert Path(found["report"]) == moved / "reports" / NAME / "report.html"
    assert json.dumps(found["table"])
    assert "its artifacts are read here" in done.stderr


@pytest.mark.slow
def test_a_server_answers(finished, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("harness.tracking.addresses.project_root", lambda: tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    server = MlflowServer(tmp_path, finished.folder / "mlflow.db")
    server.start()
    try:
        found = printed(runs.main, ["best", NAME, "--tracking-uri", server.uri], capfd)
    finally:
        server.kill()
    there = printed(runs.main, ["best", NAME, "--tracking-uri", finished.tracking_uri], capfd)
    here = {"report": None, "tracking_uri": server.uri}  # the report lies beside the database
    here["next_command"] = there["next_command"].replace(finished.tracking_uri, server.uri)
    assert found == there | here


@pytest.fixture
def two(finished, tmp_path) -> Path:
    """Return a home with the finished study and another in the same experiment and store."""
    copy_home(finished.folder, tmp_path)
    client = connect(f"sqlite:///{tmp_path}/mlflow.db").client
    number = client.get_experiment_by_name(NAME).experiment_id
    other = client.create_run(number, tags={"study": "other", "role": "run"}, run_name="other")
    client.log_param(other.info.run_id, "dataset", "digits")
    client.log_text(other.info.run_id, "text", "file.txt")
    client.set_terminated(other.info.run_id)
    optuna.create_study(study_name="other", storage=f"sqlite:///{tmp_path}/optuna.db")
    (tmp_path / "reports" / f"{NAME}-2").mkdir()
    summary = json.dumps({"run_ids": [other.info.run_id]})
    (tmp_path / "reports" / f"{NAME}-2" / "summary.json").write_text(summary)
    (tmp_path / "cache" / "checkpoints" / NAME).mkdir(parents=True)
    return tmp_path


def removing(home: Path, name: str = NAME) -> list[str]:
    """Return the words that remove a study of a home."""
    where = ["--tracking-uri", f"sqlite:///{home}/mlflow.db"]
    return ["remove", name, *where, "--storage", f"sqlite:///{home}/optuna.db"]


def files(home: Path) -> set[str]:
    """Return the folders and files of a home, without SQLite's and locks."""
    every = (str(path.relative_to(home)) for path in home.rglob("*"))
    return {name for name in every if ".db" not in name and not name.endswith(".lock")}


def rows(database: Path) -> dict[str, int]:
    """Return how many rows each table of a database has."""
    with closing(sqlite3.connect(database)) as connection:
        names = connection.execute("select name from sqlite_master where type = 'table'")
        return {
            name: connection.execute(f"select count(*) from {name}").fetchone()[0]
            for (name,) in names.fetchall()
        }


def test_the_answer_y_alone_removes_a_study_and_leaves_the_others(two, capfd, monkeypatch):
    before = files(two), rows(two / "mlflow.db"), rows(two / "optuna.db")
    for given in ("yes\n", ""):
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        code, text = shown(removing(two), capfd)
        assert code == 2
        assert f"nothing was removed: the answer is {given.strip()!r}, not 'y'" in text
        assert f"artifacts in sqlite:///{two}/mlflow.db, trials in sqlite:///{two}/opt" in text
        assert f"{two}/reports/{NAME} (" in text
        assert (files(two), rows(two / "mlflow.db"), rows(two / "optuna.db")) == before
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    code, text = shown(removing(two), capfd)
    assert (code, text.splitlines()[-1].endswith("Removed.")) == (0, True)
    assert not {name for name in files(two) if name.startswith(f"reports/{NAME}/")}
    assert not (two / "cache" / "checkpoints" / NAME).exists()
    store = connect(f"sqlite:///{two}/mlflow.db")
    (left,) = store.runs(NAME, deleted=True)
    assert left.tags["study"] == "other"
    assert [path.name for path in (two / "mlruns" / NAME).iterdir()] == [left.run_id]
    assert not [tag for tag in store.find(NAME).tags if "sharedViewState" in tag]
    with closing(sqlite3.connect(two / "mlflow.db")) as database:
        assert database.execute("pragma freelist_count").fetchone() == (0,)
    tables = rows(two / "mlflow.db")
    of_runs = {"metrics": 0, "latest_metrics": 0, "params": 1, "runs": 1, "experiments": 2}
    assert {name: tables[name] for name in of_runs} == of_runs
    assert optuna.get_all_study_names(f"sqlite:///{two}/optuna.db") == ["other"]
    assert rows(two / "optuna.db")["trials"] == 0
    assert (two / "reports" / f"{NAME}-2" / "summary.json").exists()
    # The last study of an experiment takes it along.
    found = printed(runs.main, [*removing(two, "other"), "--yes"], capfd)
    expected = {"study": "other", "dataset": "digits", "status": "removed", "exit_code": 0}
    assert found == expected
    assert store.find(NAME) is None
    assert not (two / "mlruns" / NAME).exists()
    code, line = shown(removing(two), capfd)
    assert (code, line.count("\n")) == (2, 1)
    assert f"no finished runs of study '{NAME}'" in line


@pytest.mark.slow
def test_a_study_that_is_run_is_not_removed(two, capfd):
    storage = f"sqlite:///{two}/optuna.db"
    study = optuna.load_study(study_name=f"{NAME}/after", storage=storage)
    trial = study.ask()
    trial.set_user_attr("process", process_name())
    code, line = shown([*removing(two), "--yes"], capfd)
    assert (code, line.count("\n")) == (2, 1)
    assert f"study '{NAME}' is being run by process {os.getpid()} on " in line
    assert has_study(storage, NAME)
    # Without its storage the run in MLflow names the process.
    client = connect(f"sqlite:///{two}/mlflow.db").client
    first = connect(f"sqlite:///{two}/mlflow.db").runs(NAME, study=NAME)[0].run_id
    client.set_tag(first, "process", str(os.getpid()))
    client.update_run(first, "RUNNING")
    words = [*removing(two)[:-1], f"sqlite:///{two}/elsewhere.db", "--yes"]
    code, line = shown(words, capfd)
    assert (code, line.count("\n")) == (2, 1)
    assert f"run {first} of study '{NAME}' is RUNNING; end it" in line
    assert not (two / "elsewhere.db").exists()
    # A process that was killed has left both as they are.
    trial.set_user_attr("process", f"{process_name()}0")
    assert shown([*removing(two), "--yes"], capfd)[0] == 0
    assert not has_study(storage, NAME)


def test_a_study_ends_with_what_it_wrote(finished):
    written = re.search(
        r"\nWritten: (.+) of artifacts of 7 runs, (.+) of the report; .+ has .+B\n",
        finished.printed,
    )
    places = (finished.folder / part for part in ("mlruns", f"reports/{NAME}"))
    assert written.groups() == tuple(map(size, places))


# Kills the process at a file or folder that it removes, by number from the first removed tree on.
KILLED = """
import os, signal, sys
left, begun = [int(sys.argv[2])], []
def count(event, arguments):
    if event == "shutil.rmtree" and sys.argv[1] in str(arguments[0]):
        begun.append(True)
    if event in ("os.remove", "os.rmdir") and begun:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
from studies.runs import main
main(sys.argv[3:])
"""


@pytest.mark.slow
def test_a_removal_that_was_killed_is_completed_by_the_same_command(two):
    def remove(kill_at: int) -> int:
        words = [sys.executable, "-c", KILLED, NAME, str(kill_at), *removing(two), "--yes"]
        return subprocess.run(words, capture_output=True, check=False).returncode

    for number in (2, 12, 30, 45):
        assert remove(number) == -signal.SIGKILL
    assert remove(0) == 0
    (left,) = connect(f"sqlite:///{two}/mlflow.db").runs(NAME, deleted=True)
    assert left.tags["study"] == "other"
    assert [path.name for path in (two / "mlruns" / NAME).iterdir()] == [left.run_id]
    assert {path.name for path in (two / "reports").iterdir()} == {f"{NAME}-2"}
    assert not (two / "cache" / "checkpoints" / NAME).exists()
    assert optuna.get_all_study_names(f"sqlite:///{two}/optuna.db") == ["other"]


@pytest.mark.parametrize("name", ["other", "../x"])
def test_what_is_no_study_is_not_removed(name, finished, capfd):
    code, line = shown([*removing(finished.folder, name), "--yes"], capfd)
    assert (code, line.count("\n")) == (2, 1)


@pytest.mark.slow
def test_a_copy_of_a_database_removes_no_artifacts_of_the_original(finished, tmp_path, capfd):
    before = files(finished.folder)
    shutil.copy(finished.folder / "mlflow.db", tmp_path)
    code, text = shown([*removing(tmp_path), "--yes"], capfd)
    assert code == 0
    assert f"7 runs with 0.0 kB of artifacts in sqlite:///{tmp_path}/mlflow.db\n" in text
    assert files(finished.folder) == before


@pytest.mark.slow
def test_logged_models_of_a_removed_study_go_too(two, capfd):
    store = connect(f"sqlite:///{two}/mlflow.db")
    number = store.find(NAME).experiment_id
    kept, gone = (
        store.client.create_logged_model(number, source_run_id=store.runs(NAME, study=s)[0].run_id)
        for s in ("other", NAME)
    )
    for model in (kept, gone):
        store.client.log_model_artifact(model.model_id, __file__)
    assert shown([*removing(two), "--yes"], capfd)[0] == 0
    left = store.client.search_logged_models([number])
    assert [model.model_id for model in left] == [kept.model_id]
    assert [f.name for f in (two / "mlruns" / NAME / "models").iterdir()] == [kept.model_id]


@pytest.mark.slow
def test_a_server_marks_runs_and_names_what_removes_them(finished, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("harness.tracking.addresses.project_root", lambda: tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    server = MlflowServer(tmp_path, finished.folder / "mlflow.db")
    server.start()
    try:
        storage = f"sqlite:///{tmp_path}/optuna.db"
        words = ["--tracking-uri", server.uri, "--storage", storage]
        code, text = shown(["remove", NAME, *words, "--yes"], capfd)
        store = connect(server.uri)
        assert code == 0
        assert not store.runs(NAME)
        assert len(store.runs(NAME, deleted=True)) == 7
        command = text.partition(", by: ")[2].replace("DATABASE", f"sqlite:///{tmp_path}/server.db")
        command = command.replace(" mlflow ", f" {sys.executable} -m mlflow ").strip()
        subprocess.run(command, shell=True, check=True, capture_output=True)
        assert not store.runs(NAME, deleted=True)
        code, line = shown(["remove", NAME, *words, "--yes"], capfd)
        assert (code, line.count("\n")) == (2, 1)
    finally:
        server.kill()
