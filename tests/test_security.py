"""No password in what is written or shown, no path out of a folder, no pickle, no open port."""

import json
import os
import pickle
import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pandas as pd
import pytest
import torch
from harness.login import signed_in
from harness.places import reason, storage_address, without_password
from studies.summary import Outcome

from analysis import frames, report
from harness import RunConfig, UserError, load_run, tracking
from harness.models.vae import build
from studies import kl_weight
from studies.runner import cli
from studies.runner.terminal import Terminal
from tests.real_servers import free_port
from tests.test_report import ATTACK, Page, write_folder

# --- passwords ----------------------------------------------------------------------------------

ADDRESSES = {
    "postgresql+psycopg://user:secret@host/db": "postgresql+psycopg://host/db",
    "http://user:secret@host:5000": "http://host:5000",
    "https://secret@host/path": "https://host/path",
    "postgresql://user:se/cret#1@host/db": "postgresql://host/db",
    "postgresql://user:secret@secret@host/db": "postgresql://host/db",
    "mysql://user:my secret@host/db": "mysql://host/db",
    "postgresql://host/db?user=me&password=secret": "postgresql://host/db?user=me&password=***",
    "http://host:5000/a@b": "http://host:5000/a@b",
    "sqlite:////home/me@work/mlflow.db": "sqlite:////home/me@work/mlflow.db",
}


@pytest.mark.parametrize(("address", "shown"), ADDRESSES.items())
def test_an_address_is_shown_without_its_password(address, shown):
    assert without_password(address) == shown
    said = without_password(f"API request to {address} failed")
    assert said == f"API request to {shown} failed"


def test_an_empty_storage_is_not_the_default_one():
    with pytest.raises(UserError, match="--storage is empty; give an address, or leave it out"):
        storage_address("")


def test_a_reason_is_one_line_without_password():
    error = RuntimeError("cannot open http://u:secret@h/x\nmore of secret")
    assert reason(error) == "cannot open http://h/x"
    assert reason(KeyError()) == "KeyError"


@pytest.fixture
def closed_port() -> int:
    """Return a local port that nothing listens on."""
    return free_port()


@pytest.fixture
def no_login(monkeypatch) -> None:
    """Forget after the test which user MLflow was told."""
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("no_proxy", "*")


HTTP = ("--storage", "http")


@pytest.mark.parametrize("option", ["--tracking-uri", "--storage"])
@pytest.mark.parametrize("scheme", ["http", "postgresql+psycopg", "postgresql"])
def test_a_server_that_is_not_there(option, scheme, closed_port, no_login, tmp_path, capfd):
    places = {"--tracking-uri": f"sqlite:///{tmp_path}/m.db"}
    places |= {"--storage": f"sqlite:///{tmp_path}/o.db"}
    places[option] = f"{scheme}://user:secret@127.0.0.1:{closed_port}/db"
    with pytest.raises(SystemExit) as stop:
        cli.main(kl_weight.STUDY, [word for pair in places.items() for word in pair])
    said = capfd.readouterr()
    assert stop.value.code == 2
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith(f"error: {option} {scheme}://127.0.0.1:{closed_port}/db")
    assert "secret" not in said.out + said.err
    refused = "kept in SQLite or PostgreSQL" if (option, scheme) == HTTP else "refused"
    assert refused in said.err
    assert not (tmp_path / "o.db").exists()


def test_a_tracking_server_that_is_not_there_leaves_the_storage_alone(
    closed_port, no_login, tmp_path, capfd
):
    (tmp_path / "o.db").touch()
    with pytest.raises(SystemExit):
        cli.main(
            kl_weight.STUDY,
            ["--tracking-uri", f"http://127.0.0.1:{closed_port}"]
            + ["--storage", f"sqlite:///{tmp_path}/o.db"],
        )
    assert "connection refused" in capfd.readouterr().err
    assert (tmp_path / "o.db").read_bytes() == b""


class Server(BaseHTTPRequestHandler):
    """Answers as an MLflow server that holds one run, whose artifacts have hostile paths."""

    seen: list[str] = []
    path_of_artifact = ""

    def do_GET(self) -> None:
        """Answer for a run and its artifacts."""
        self.reply({"run": RUN} if "runs/get" in self.path else {"files": [self.file()]})

    def do_POST(self) -> None:
        """Answer a search for experiments."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({})

    def file(self) -> dict[str, object]:
        """Return the one artifact."""
        return {"path": self.path_of_artifact, "is_dir": False, "file_size": 1}

    def reply(self, values: dict[str, object]) -> None:
        """Send JSON, and note who asked."""
        self.seen.append(self.headers.get("Authorization", ""))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(values).encode())

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


RUN = {
    "info": {
        "run_id": "a" * 32,
        "experiment_id": "1",
        "status": "FINISHED",
        "artifact_uri": "mlflow-artifacts:/1/a/artifacts",
    },
    "data": {},
}


@pytest.fixture
def server():
    """Start the server; returns its host and port."""
    Server.seen.clear()
    listening = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"127.0.0.1:{listening.server_port}"
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_a_password_reaches_the_server_and_nothing_else(server, no_login):
    store = tracking.connect(f"http://us%40er:se%2Fcret@{server}")
    assert Server.seen[-1] == f"Basic {b64encode(b'us@er:se/cret').decode()}"
    assert store.uri == f"http://{server}"
    assert "cret" not in repr(store)


@pytest.mark.parametrize("other", ["http://other", "http://v:word@other", "http://v:word@one:5"])
def test_a_password_is_for_one_server_and_one_user(other, no_login):
    assert signed_in("http://u:secret@one:5") == "http://one:5"
    assert signed_in("http://one:5/") == "http://one:5"  # one outbox for both
    with pytest.raises(UserError, match="http://one:5 was signed in to") as refusal:
        signed_in(other)
    assert "secret" not in str(refusal.value)
    assert "word@" not in str(refusal.value)
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "secret"


def test_who_sets_the_login_anew_decides_for_all_servers(no_login, monkeypatch):
    signed_in("http://u:secret@one")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "w")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "anew")
    assert signed_in("http://other") == "http://other"


@pytest.mark.parametrize(
    "uri", ["http://u:secret@host:5000/", "postgresql://u:secret@host/db", "sqlite:///a[/b].db"]
)
def test_the_terminal_shows_where_the_runs_are_without_password(uri, capsys, tmp_path):
    outcome = Outcome(pd.DataFrame(), "So.", tmp_path / "[/x]", "7")
    Terminal().outcome("x", outcome, uri)
    said = capsys.readouterr().out
    assert "secret" not in said
    assert without_password(uri).rstrip("/") in said
    assert f"{tmp_path}/[/x]/report.html" in said


# --- text and paths from a store ----------------------------------------------------------------


def test_names_and_tags_of_real_runs_are_escaped_in_the_report(tracking_uri, tmp_path):
    store = tracking.connect(tracking_uri)
    experiment = tracking.open_experiment(store, "e-digits", ATTACK)
    tags = {"study": "e", "role": "run", "configuration": ATTACK}
    metrics = {"test/neg_elbo": 1.0, "test/mse": 1.0, "test/rate": 1.0}
    log = tracking.RunLog(store, experiment, ATTACK, tags, {"seed": 0, "trial": ATTACK})
    log.metrics(metrics, step=1)
    log.end()
    folder = write_folder(tmp_path / "s", settings={"tags": tags}, question=ATTACK)
    frames.load_runs("e-digits", "e", tracking_uri).to_csv(folder / "runs.csv", index=False)
    page = Page(report.build(folder))
    assert "script" not in page.texts
    assert ATTACK in page.texts["td"]
    assert any(ATTACK in text for text in page.texts["dd"])


@pytest.mark.parametrize("path", ["../evil", "/tmp/evil", "..%2fevil", "model/../../../evil"])
def test_artifacts_cannot_leave_the_folder_of_a_load(path, server, monkeypatch, tmp_path):
    monkeypatch.setattr(Server, "path_of_artifact", path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a" / "b"))
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_run("a" * 32, f"http://{server}")
    left = [found for found in tmp_path.rglob("*") if found.is_file()]
    assert left == []
    assert not Path("/tmp/evil").exists()


def test_models_load_without_pickle(tracking_uri, data, monkeypatch):
    store = tracking.connect(tracking_uri)
    experiment = tracking.open_experiment(store, "e-digits", "Why?")
    log = tracking.RunLog(store, experiment, "a run", {}, {})
    config = RunConfig(hidden=(7,), latent_size=3)
    log.model(config, build(config, data.image_shape))
    log.end()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    assert load_run(log.run_id, tracking_uri).config.hidden == (7,)


# --- the network --------------------------------------------------------------------------------


def test_make_ui_listens_on_this_machine_alone():
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text()
    started = [line for line in makefile.splitlines() if "mlflow ui" in line]
    assert len(started) == 1
    assert "--host 127.0.0.1" in started[0]
    assert "127.0.0.1" in report.UI
