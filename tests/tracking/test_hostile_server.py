"""A server that refuses a login, or whose artifacts have hostile paths."""

import json
import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from harness import UserError, load_run
from harness.tracking import connect

RUN = {
    "info": {
        "run_id": "a" * 32,
        "experiment_id": "1",
        "status": "FINISHED",
        "artifact_uri": "mlflow-artifacts:/1/a/artifacts",
    },
    "data": {},
}


class Server(BaseHTTPRequestHandler):
    """Answers as an MLflow server that holds one run."""

    login = ""
    path_of_artifact = ""

    def do_GET(self) -> None:
        """Answer for a run and its artifacts."""
        file = {"path": self.path_of_artifact, "is_dir": False, "file_size": 1}
        self.reply({"run": RUN} if "runs/get" in self.path else {"files": [file]})

    def do_POST(self) -> None:
        """Answer a search for experiments."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({})

    def reply(self, values: dict[str, object]) -> None:
        """Send JSON to those with the right login."""
        known = self.headers.get("Authorization", "") == self.login
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(json.dumps(values).encode() if known else b"You are not authenticated.")

    def log_message(self, *arguments: object) -> None:
        """Stay silent."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Start the server; returns its address."""
    monkeypatch.setattr("harness.tracking.addresses.project_root", lambda: tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    listening = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_a_login_comes_from_the_two_variables_and_401_names_them(server, monkeypatch):
    monkeypatch.setattr(Server, "login", f"Basic {b64encode(b'us@er:se/cret').decode()}")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        connect(server)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "us@er")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "se/cret")
    store = connect(server)
    assert store.uri == server
    assert "cret" not in repr(store)


@pytest.mark.parametrize("path", ["../evil", "/tmp/evil", "..%2fevil", "model/../../../evil"])
def test_artifacts_cannot_leave_the_folder_of_a_load(path, server, monkeypatch, tmp_path):
    monkeypatch.setattr(Server, "path_of_artifact", path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a" / "b"))
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(UserError, match="list_artifacts|cannot be (read|loaded)"):
        load_run("a" * 32, server)
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == []
    assert not Path("/tmp/evil").exists()
