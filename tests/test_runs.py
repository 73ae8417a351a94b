"""`studies.runs`: the studies of a store, what they found and what comes next; no training."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from real_servers import MlflowServer
from test_json import document, printed

from analysis import frames
from harness import load_run
from harness.tracking import connect
from studies import runs

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
