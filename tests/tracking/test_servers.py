"""Runs tracked on a real MLflow server that is away, slow or loses answers: nothing is lost."""

import json
import re
import time
from collections import Counter

import numpy as np
import pytest
import torch
from mlflow.entities import ViewType

from harness import RunConfig, UserError, ledger, load_run, tracking
from harness.models.vae import build
from harness.tracking import RunLog
from tests.real_servers import MlflowServer, Proxy

CONFIG = RunConfig(hidden=(5,), latent_size=2, seed=4)
TAGS = {"study": "s", "role": "run", "trial": "0", "configuration": "c"}
EPOCHS = 3


@pytest.fixture(scope="module")
def server(empty_database, tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("server"), empty_database)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server, monkeypatch, tmp_path):
    """A new address of the server, whose outbox lies in the test's folder."""
    monkeypatch.setattr("harness.stores.project_root", lambda: tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def model(data):
    return build(CONFIG, data.image_shape)


def value(epoch: int) -> float:
    return 1 / (epoch + 3)


def write_run(store, experiment: str, data, model) -> RunLog:
    """Write all that a study writes of a run."""
    log = RunLog(store, experiment, "a run", TAGS, {"seed": 0}, "replay {}".format)
    log.dataset(data)
    log.text('{"a": 1}', "provenance.json")
    log.text("+", "provenance/diff.patch")
    for epoch in range(1, EPOCHS + 1):
        log.metrics({"mse": value(epoch), "nan": float("nan"), "big": float("inf")}, epoch)
        log.flush()
        log.picture("reconstructions", np.full((8, 8), epoch, dtype=np.uint8), epoch)
    log.model(CONFIG, model)
    log.end()
    return log


def contents(store, run) -> dict:
    """Return all that a store has of a run but times, ids and what says where it was written."""
    client, run_id = store.client, run.info.run_id
    history = {k: client.get_metric_history(run_id, k) for k in run.data.metrics}
    own = {"mlflow.note.content", "mlflow.user", "run_key", "host", "process"}
    inputs = [entry.dataset for entry in client.get_run(run_id).inputs.dataset_inputs]
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "ended": run.info.end_time >= run.info.start_time,
        "params": run.data.params,
        "tags": {k: v for k, v in run.data.tags.items() if k not in own},
        "note": run.data.tags["mlflow.note.content"].replace(run_id, "ID"),
        "metrics": {k: [(m.step, repr(m.value)) for m in ms] for k, ms in history.items()},
        "inputs": [(d.name, d.digest, json.loads(d.profile)) for d in inputs],
        "files": files(client, run_id),
    }


def files(client, run_id: str, path: str | None = None) -> list[str]:
    """Return the names of a run's artifacts, pictures without their time and number."""
    found = []
    for entry in client.list_artifacts(run_id, path):
        if entry.is_dir:
            found += files(client, run_id, entry.path)
        else:
            found.append(re.sub(r"timestamp\+\d+\+[0-9a-f-]{36}", "WHEN", entry.path))
    return sorted(found)


@pytest.fixture(scope="module")
def reference(empty_database, tmp_path_factory, data, model):
    """What a database file holds of the run."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    store = tracking.connect(f"sqlite:///{folder}/mlflow.db")
    experiment = tracking.open_experiment(store, "s-digits", "Why?")
    write_run(store, experiment, data, model)
    (run,) = store.client.search_runs([experiment])
    return contents(store, run)


@pytest.fixture
def opened(proxy):
    """A store and a new experiment on the server."""
    store = tracking.connect(proxy.uri)
    return store, tracking.open_experiment(store, proxy.uri, "Why?")


def check(store, experiment: str, reference: dict, model, runs: int = 1) -> None:
    """Check that the server holds what a file would hold, once, and that nothing waits."""
    found = store.client.search_runs([experiment])
    assert len(found) == runs
    assert store.client.search_runs([experiment], run_view_type=ViewType.DELETED_ONLY) == []
    for run in found:
        assert contents(store, run) == reference
        back = load_run(run.info.run_id, store.uri).model
        weights = zip(back.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in weights)
    assert not any((store.home / "cache" / "outbox").rglob("*.jsonl"))


def test_a_server_holds_what_a_file_holds(opened, data, model, reference):
    store, experiment = opened
    log = write_run(store, experiment, data, model)
    check(store, experiment, reference, model)
    assert re.fullmatch("[0-9a-f]{32}", log.run_id)
    assert not (store.home / "cache").exists(), "a journal, though the server was there"


def test_pictures_are_named_as_mlflow_names_them(opened):
    store, experiment = opened
    log = RunLog(store, experiment, "a run", TAGS, {})
    picture = np.zeros((8, 20), dtype=np.uint8)
    log.picture("reconstructions", picture, 3)
    ours = files(store.client, log.run_id)
    store.client.log_image(log.run_id, picture, key="reconstructions", step=3)
    assert Counter(files(store.client, log.run_id)) == Counter(2 * ours)
    assert store.client.get_run(log.run_id).data.tags["mlflow.loggedImages"] == "True"


LOST = ["runs/create", "runs/log-batch", "runs/log-inputs", "PUT /api/2.0/mlflow-artifacts"]
LOST += ["runs/update", "experiments/create"]


@pytest.mark.parametrize("lost", [LOST, *(pytest.param([n], marks=pytest.mark.slow) for n in LOST)])
def test_a_lost_answer_leaves_no_trace(lost, proxy, data, model, reference):
    proxy.lose = dict.fromkeys(lost, 1)
    store = tracking.connect(proxy.uri)
    experiment = tracking.open_experiment(store, proxy.uri, "Why?")
    write_run(store, experiment, data, model)
    store.writer.settle()
    assert set(proxy.lose.values()) == {0}
    check(store, experiment, reference, model)


def test_a_creation_that_comes_late_leaves_no_ghost(proxy, opened, data, model):
    store, experiment = opened
    proxy.hold["runs/create"] = 1
    log = RunLog(store, experiment, "a run", TAGS, {})
    store.writer.settle()
    proxy.release()
    assert len(store.client.search_runs([experiment])) == 2
    log.end()
    (run,) = store.client.search_runs([experiment])
    assert (run.info.run_id, run.info.status) == (log.run_id, "FINISHED")


numbers = [9, *(pytest.param(n, marks=pytest.mark.slow) for n in range(20) if n != 9)]


@pytest.mark.parametrize("request_number", numbers)
def test_a_server_that_goes_and_returns(
    request_number, proxy, opened, data, model, reference, capfd
):
    store, experiment = opened
    proxy.fall_after = request_number
    proxy.rise_after = 2
    write_run(store, experiment, data, model)
    store.writer.settle()
    check(store, experiment, reference, model)
    said = capfd.readouterr().err
    assert "does not answer" in said
    assert "is back; all records are delivered" in said


def test_a_server_that_is_gone_at_the_end_gets_everything_at_the_next_start(
    proxy, opened, data, model, reference, monkeypatch
):
    store, experiment = opened
    monkeypatch.setattr("harness.outbox.PATIENCE", 0)
    proxy.down = True
    runs = [write_run(store, experiment, data, model) for _ in range(2)]
    with pytest.raises(UserError, match="records of 2 runs wait in .*the same command delivers"):
        tracking.read_runs(store, proxy.uri)
    with pytest.raises(UserError, match="does not answer"):
        _ = runs[0].run_id
    back = time.time() * 1000
    proxy.down = False
    assert tracking.open_experiment(store, proxy.uri, "Why?") == experiment
    check(store, experiment, reference, model, runs=2)
    for run in store.client.search_runs([experiment]):
        assert run.info.start_time <= run.info.end_time <= back, "the times are of the writing"


def test_what_the_server_refuses_is_one_clear_error(proxy, opened):
    store, experiment = opened
    log = RunLog(store, experiment, "a run", TAGS, {})
    store.client.delete_run(log.run_id)
    with pytest.raises(UserError, match=r"refuses to write run .* must be in the 'active' state"):
        log.tag("a", "b")
    assert not any((store.home / "cache" / "outbox").rglob("*.jsonl"))


def test_interrupted_runs_are_closed_once_the_server_is_back(proxy, opened):
    store, experiment = opened
    logs = [RunLog(store, experiment, f"run {i}", TAGS, {}) for i in range(3)]
    logs[0].end()
    proxy.down = True
    logs[1].end()
    ledger.end_own_runs(store, experiment, "KILLED", "KeyboardInterrupt()")
    proxy.down = False
    store.writer.settle()
    found = store.client.search_runs([experiment])
    assert {r.info.run_name: r.info.status for r in found} == {
        "run 0": "FINISHED",
        "run 1": "FINISHED",
        "run 2": "KILLED",
    }
    assert [r.data.tags.get("reason") for r in found if r.info.run_name != "run 2"] == [None, None]
