"""No password in what is shown, no script in a report, no open port."""

import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from analysis import frames, report
from analysis.report import page as report_page
from harness.tracking import connect
from harness.tracking.addresses import without_password
from studies import kl_weight
from studies.runner import cli
from studies.runner.summary import Outcome
from studies.runner.terminal import Terminal
from tests.runner.test_terminal import planned
from tests.test_report import ATTACK, Page, write_folder

# --- passwords ----------------------------------------------------------------------------------


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Yield a local port that refuses connections, and that no server of another test can take."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and no listen
        yield taken.getsockname()[1]


@pytest.fixture
def no_login(monkeypatch) -> None:
    """Forget after the test which user MLflow was told."""
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("no_proxy", "*")


REFUSALS = {
    ("--storage", "http"): "kept in SQLite or PostgreSQL",
    ("--tracking-uri", "postgresql+psycopg"): "neither an SQLite file nor a server",
    ("--tracking-uri", "postgresql"): "neither an SQLite file nor a server",
}


@pytest.mark.parametrize("option", ["--tracking-uri", "--storage"])
@pytest.mark.parametrize("scheme", ["http", "postgresql+psycopg", "postgresql"])
def test_a_server_that_is_not_there(option, scheme, closed_port, no_login, tmp_path, capfd):
    places = {"--tracking-uri": f"sqlite:///{tmp_path}/m.db"}
    places |= {"--storage": f"sqlite:///{tmp_path}/o.db"}
    user = "" if scheme == "http" else "user:secret@"
    places[option] = f"{scheme}://{user}127.0.0.1:{closed_port}/db"
    with pytest.raises(SystemExit) as stop:
        cli.main(kl_weight.STUDY, [word for pair in places.items() for word in pair])
    printed = capfd.readouterr()
    assert stop.value.code == 2
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith(f"error: {option} {scheme}://127.0.0.1:{closed_port}/db")
    assert "secret" not in printed.out + printed.err
    assert REFUSALS.get((option, scheme), "refused") in printed.err
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
    assert "Connection refused" in capfd.readouterr().err
    assert (tmp_path / "o.db").read_bytes() == b""


@pytest.mark.parametrize("uri", ["sqlite:///b.db?password=secret", "sqlite:///a[/b].db"])
def test_the_terminal_shows_where_the_runs_are_without_password(uri, capsys, tmp_path):
    outcome = Outcome(planned("x"), pd.DataFrame(), "So.", tmp_path / "[/x]", "7")
    Terminal().outcome(outcome, uri)
    printed = capsys.readouterr().out
    assert "secret" not in printed
    assert without_password(uri).rstrip("/") in printed
    assert f"{tmp_path}/[/x]/report.html" in printed


# --- text from a store ---------------------------------------------------------------------------


def test_names_and_tags_of_real_runs_are_escaped_in_the_report(tracking_uri, tmp_path):
    store = connect(tracking_uri)
    experiment = store.experiment("e-digits", ATTACK)
    tags = {"study": "e", "role": "run", "configuration": ATTACK}
    metrics = {"test/neg_elbo": 1.0, "test/mse": 1.0, "test/rate": 1.0}
    params = {"seed": 0, "trial": ATTACK}
    log = store.start(experiment, uuid.uuid4().hex, ATTACK, tags, params)
    log.metrics(metrics, step=1)
    log.end()
    folder = write_folder(tmp_path / "s", settings={"tags": tags}, question=ATTACK)
    frames.load_study("e", tracking_uri=tracking_uri).to_csv(folder / "runs.csv", index=False)
    page = Page(report.build(folder))
    assert "script" not in page.texts
    assert ATTACK in page.texts["td"]
    assert any(ATTACK in text for text in page.texts["dd"])


# --- the network --------------------------------------------------------------------------------


def test_make_ui_listens_on_this_machine_alone():
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text()
    started = [line for line in makefile.splitlines() if "mlflow ui" in line]
    assert len(started) == 1
    assert "--host 127.0.0.1" in started[0]
    assert "127.0.0.1" in report_page.UI
