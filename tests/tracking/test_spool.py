"""Runs that wait on disk for a real MLflow server: killed writers, lost answers, full disks."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import ViewType
from real_servers import MlflowServer

from harness import RunConfig, UserError, load_run
from harness.models.vae import build
from harness.tracking.runs import RunLog
from harness.tracking.spool import WRITES, Spool
from harness.tracking.store import connect
from tests.tracking.writer import EPOCHS, key_of, write_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(empty_database, tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("server"), empty_database)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def store(proxy):
    return connect(proxy.uri)


@pytest.fixture
def experiment(store, proxy):
    return store.experiment(proxy.uri, "Why?")


def new_key() -> str:
    return uuid.uuid4().hex


def start(store, experiment: str, key: str) -> RunLog:
    return store.start(experiment, key, "a run", {"study": "s"}, {})


def history(store, run_id: str) -> dict:
    found = {}
    for metric, step, value in store.history(run_id):
        found.setdefault(metric, []).append((step, repr(value)))
    return found


HISTORY = {
    "mse": [(epoch, repr(1 / (epoch + 3))) for epoch in range(1, EPOCHS + 1)],
    "nan": [(epoch, "nan") for epoch in range(1, EPOCHS + 1)],
    "big": [(epoch, repr(sys.float_info.max)) for epoch in range(1, EPOCHS + 1)],
}
FILES = ["provenance.json", "sub/weights"]


def files(client, run_id: str, path: str | None = None) -> list[str]:
    found = []
    for entry in client.list_artifacts(run_id, path):
        found += files(client, run_id, entry.path) if entry.is_dir else [entry.path]
    return sorted(found)


def check_whole(store, run) -> None:
    """Check that a run holds all that `write_run` wrote, once."""
    assert (run.status, run.params) == ("FINISHED", {"seed": "0"})
    assert run.tags["mlflow.note.content"] == "replay it"
    assert history(store, run.run_id) == HISTORY
    artifacts = files(store.client, run.run_id)
    assert [file for file in artifacts if not file.startswith("images")] == FILES
    assert len(artifacts) == 4, artifacts
    info = store.client.get_run(run.run_id).info
    assert info.start_time <= info.end_time <= time.time() * 1000


def folders(tmp_path: Path) -> list[str]:
    """Return what is left in the spool."""
    found = (path.relative_to(tmp_path) for path in tmp_path.rglob(f"spool/*/*/*/{WRITES}"))
    return [path.parent.name for path in found]


def run_writers(store, experiment: str, among: str, numbers, uri: str | None = None) -> list[int]:
    """Let processes write a run each and be killed; return their exit codes."""
    command = [sys.executable, "-m", "tests.tracking.writer", str(store.spool.folder)]
    command += [uri or store.uri, experiment, among, *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def kept(store, experiment_id: str) -> dict:
    """Return the runs of an experiment by key, deleted ones and twins left out."""
    name = store.client.get_experiment(experiment_id).name
    runs = store.runs(name)
    assert len({run.key for run in runs}) == len(runs), "a run is there twice"
    return {run.key: run for run in runs}


def test_what_is_written_is_on_the_server_and_live_before_the_end(store, experiment, tmp_path):
    log = start(store, experiment, new_key())
    log.metrics({"mse": 0.5}, 1)
    store.deliver()
    assert history(store, store.run(log.key).run_id) == {"mse": [(1, "0.5")]}
    assert store.undelivered() == {log.key}
    assert store.complete() == set()
    whole = write_run(store.spool.put, experiment, new_key())
    log.end()
    store.deliver([whole.key, log.key])
    assert (store.undelivered(), folders(tmp_path)) == (set(), [])
    check_whole(store, store.run(whole.key))
    run = store.run(whole.key)
    assert store.run(run.run_id).key == whole.key


def contents(store, run) -> dict:
    """Return all that a store has of a run but times, ids and what names the process."""
    own = {"mlflow.note.content", "mlflow.user", "run_key", "host", "process"}
    inputs = [one.dataset for one in store.client.get_run(run.run_id).inputs.dataset_inputs]
    artifacts = files(store.client, run.run_id)
    return {
        "run": (run.name, run.status, run.params, sorted(run.metrics)),
        "tags": {name: value for name, value in run.tags.items() if name not in own},
        "note": run.tags["mlflow.note.content"],
        "history": history(store, run.run_id),
        "inputs": [(one.name, one.digest, json.loads(one.profile)) for one in inputs],
        "files": [name.split("+timestamp+")[0] for name in artifacts],
    }


def test_a_server_holds_what_a_file_holds(store, experiment, tracking_uri, data):
    found = []
    config = RunConfig(hidden=(5,), latent_size=2)
    model = build(config, data.image_shape)
    file = connect(tracking_uri)
    for place, home in ((store, experiment), (file, file.experiment("e", "Why?"))):
        put = place.spool.put if place.spool else place.writer(home, "a run")
        log = write_run(put, home, new_key(), end=False)
        log.dataset(data)
        log.model(config, model)
        log.end("FAILED", "diverged")
        place.deliver()
        found.append(contents(place, place.run(log.key)))
        back = load_run(log.key, place.uri).model
        weights = zip(back.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in weights)
    assert found[0] == found[1]
    assert found[0]["run"][:2] == ("a run", "FAILED")


@pytest.mark.slow
def test_a_writer_that_is_killed_between_any_two_writes(store, experiment, proxy, tmp_path):
    down = "http://127.0.0.1:9"
    numbers = range(1, 11)
    assert run_writers(store, experiment, "writes", numbers, down) == [-signal.SIGKILL] * 9 + [3]
    assert store.complete() == {key_of(10)}
    assert store.undelivered() == set(map(key_of, range(2, 11)))
    found = kept(store, experiment)
    assert found.keys() == set(map(key_of, range(2, 11)))
    assert store.complete() == {key_of(10)}, "the trial of a delivered run can be adopted"
    assert store.undelivered() == set()
    check_whole(store, found.pop(key_of(10)))
    for run in found.values():
        assert (run.status, run.tags["reason"]) == ("KILLED", "its process ended")
        logged = history(store, run.run_id)
        assert all(values == HISTORY[metric][: len(values)] for metric, values in logged.items())
    assert folders(tmp_path) == []
    while list(store.spool.folder.iterdir()):  # locks and folders of the dead are removed
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("among", ["begun", "answered"])
def test_a_deliverer_that_is_killed_at_any_request(among, store, experiment, proxy, tmp_path):
    ends = run_writers(store, experiment, among, range(1, 40))
    assert ends[:15] == [-signal.SIGKILL] * 15
    assert ends[-1] == 3
    found = kept(store, experiment)
    for number, end in enumerate(ends, 1):
        run = found.get(key_of(number))
        if end == 3 or run is not None and run.status == "FINISHED":
            check_whole(store, run)
        elif run is not None:
            assert run.tags["reason"] == "its process ended"
    assert folders(tmp_path) == []


def test_runs_of_living_processes_are_left_alone(store, experiment, tmp_path, monkeypatch):
    folder = tmp_path / "shared"
    one = Spool(folder, "http://127.0.0.1:9", MlflowClient("http://127.0.0.1:9"))
    two = Spool(folder, store.uri, store.client)
    ours, theirs = (write_run(spool.put, experiment, new_key()) for spool in (one, two))
    two.deliver(None)
    assert kept(store, experiment).keys() == {theirs.key}
    assert two.undelivered() == {ours.key} == two.complete()
    with monkeypatch.context() as patch:
        patch.setattr("harness.tracking.spool.PATIENCE", 0)
        with pytest.raises(UserError, match="records of 1 run wait in"):
            two.deliver({ours.key})
    one._locks[one._home].release()  # as the death of its process does
    two.deliver({ours.key})
    assert kept(store, experiment).keys() == {ours.key, theirs.key}


LOST = ["runs/create", "runs/log-batch", "PUT /api/2.0/mlflow-artifacts", "runs/update"]
LOST += ["runs/set-tag", "experiments/create", "runs/search"]


@pytest.mark.slow
def test_lost_answers_leave_no_trace(proxy, store, tmp_path):
    proxy.lose = dict.fromkeys(LOST, 1)
    experiment = store.experiment(proxy.uri, "Why?")
    log = write_run(store.spool.put, experiment, new_key())
    store.deliver()
    assert set(proxy.lose.values()) == {0}
    check_whole(store, kept(store, experiment)[log.key])
    deleted = store.client.search_runs([experiment], run_view_type=ViewType.DELETED_ONLY)
    assert (deleted, folders(tmp_path)) == ([], [])


def test_a_creation_that_comes_late_leaves_no_twin(proxy, store, experiment):
    proxy.hold["runs/create"] = 1
    log = start(store, experiment, new_key())
    store.deliver()
    proxy.release()
    assert len(store.client.search_runs([experiment])) == 2
    log.end()
    store.deliver()
    (run,) = store.client.search_runs([experiment])
    assert (run.info.run_id, run.info.status) == (store.run(log.key).run_id, "FINISHED")


requests = [7, *(pytest.param(n, marks=pytest.mark.slow) for n in range(12) if n != 7)]


@pytest.mark.parametrize("number", requests)
def test_a_server_that_goes_and_returns(number, proxy, store, experiment, tmp_path, caplog):
    proxy.fall_after, proxy.rise_after = number, 2
    log = write_run(store.spool.put, experiment, new_key())
    store.deliver()
    check_whole(store, kept(store, experiment)[log.key])
    assert folders(tmp_path) == []
    printed = [record.getMessage() for record in caplog.records]
    assert sum("does not answer" in text for text in printed) == 1
    assert sum("is back" in text for text in printed) == 1


def test_epochs_that_waited_are_sent_in_few_requests(proxy, store, experiment):
    log = start(store, experiment, new_key())
    store.deliver()
    proxy.down = True
    for epoch in range(1, 601):
        log.metrics({"a": epoch, "b": -epoch, "c": 0.5}, epoch)
    proxy.down, before = False, len(proxy.seen)
    store.deliver()
    assert sum("log-batch" in line for line in proxy.seen[before:]) <= 4
    found = history(store, store.run(log.key).run_id)
    assert found["b"] == [(epoch, repr(-float(epoch))) for epoch in range(1, 601)]
    assert len(found["a"]) == len(found["c"]) == 600


def test_a_server_that_is_away_at_the_end_gets_all_at_the_next_start(
    proxy, store, experiment, tmp_path, monkeypatch
):
    proxy.down = True
    logs = [write_run(store.spool.put, experiment, new_key()) for i in range(2)]
    assert store.complete() == {log.key for log in logs}
    for name in ("spool", "store"):
        monkeypatch.setattr(f"harness.tracking.{name}.PATIENCE", 0.1)
    with pytest.raises(UserError, match="records of 2 runs wait in .* the same command delivers"):
        store.deliver()
    store.deliver(wait_while_answering=True)
    assert store.undelivered() == {log.key for log in logs}
    with pytest.raises(UserError, match="does not answer"):
        store.experiment(proxy.uri, "Why?")
    back = time.time() * 1000
    monkeypatch.undo()
    proxy.down = False
    store.deliver([log.key for log in logs])
    for run in kept(store, experiment).values():
        check_whole(store, run)
        assert store.client.get_run(run.run_id).info.end_time <= back, "times are of the writing"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_server_that_is_stopped_or_killed_and_restarted(
    how, empty_database, tmp_path, monkeypatch
):
    monkeypatch.setattr("harness.tracking.addresses.project_root", lambda: tmp_path)
    server = MlflowServer(tmp_path, empty_database)
    server.start()
    try:
        store = connect(server.uri)
        experiment = store.experiment("e", "Why?")
        logs = [write_run(store.spool.put, experiment, new_key())]
        if how == "stopped":
            server.send(signal.SIGSTOP)
        else:
            server.kill()
        logs += [write_run(store.spool.put, experiment, new_key()) for i in range(1, 4)]
        back = server.start if how == "killed" else lambda: server.send(signal.SIGCONT)
        threading.Timer(20, back).start()
        store.deliver()
        found = kept(store, experiment)
        assert found.keys() == {log.key for log in logs}
        for run in found.values():
            check_whole(store, run)
    finally:
        server.kill()


@pytest.mark.parametrize("code", [429, 503])
def test_codes_that_may_pass_are_tried_again(code, proxy, store, experiment):
    proxy.answer["runs/log-batch"] = code
    log = write_run(store.spool.put, experiment, new_key())
    store.deliver([log.key], wait_while_answering=True)
    assert store.undelivered() == {log.key}
    proxy.answer.clear()
    store.deliver()
    check_whole(store, kept(store, experiment)[log.key])


@pytest.mark.parametrize(
    ("code", "hint"),
    [(400, "rights"), (401, "set MLFLOW_TRACKING_USERNAME"), (403, "rights"), (404, "rights")],
)
def test_a_refusal_is_one_clear_error_and_keeps_the_records(
    code, hint, proxy, store, experiment, tmp_path
):
    proxy.answer["runs/log-batch"] = 500  # not refused while the run is written
    log = write_run(store.spool.put, experiment, new_key())
    proxy.answer["runs/log-batch"] = code
    with pytest.raises(UserError, match=f"refuses to write run {log.key} .*{hint}"):
        store.deliver()
    with pytest.raises(UserError, match="refuses"):
        log.tag("a", "b")
    assert folders(tmp_path) == [log.key]
    proxy.answer.clear()
    other = write_run(store.spool.put, experiment, new_key())
    store.deliver([other.key])  # another run is not held up


def test_a_run_that_was_deleted_on_the_way_costs_that_run(store, experiment, tmp_path, caplog):
    logs = [start(store, experiment, new_key()) for _ in range(2)]
    store.deliver()
    store.client.delete_run(store.run(logs[0].key).run_id)
    for log in logs:
        log.tag("a", "b")
        log.end()
    store.deliver([log.key for log in logs])
    assert "was deleted in MLflow; its further records are dropped" in caplog.text
    assert folders(tmp_path) == []
    assert [run.key for run in store.runs(store.uri)] == [logs[1].key]


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_last_line_is_no_write(cut, store, experiment, tmp_path):
    folder = tmp_path / "shared"
    dead = Spool(folder, "http://127.0.0.1:9", MlflowClient("http://127.0.0.1:9"))
    log = write_run(dead.put, experiment, new_key())
    file = dead._home / log.key / WRITES
    os.truncate(file, file.stat().st_size - cut)
    dead._locks[dead._home].release()
    alive = Spool(folder, store.uri, store.client)
    alive.deliver(None)
    run = kept(store, experiment)[log.key]
    assert (run.status, run.tags["reason"]) == ("KILLED", "its process ended")
    assert alive.complete() == set()


@pytest.mark.parametrize("broken", [b'{"kind": batch}\n', b"\xff\xfe\n", b"[1]\n", b"{}\n"])
def test_a_folder_that_cannot_be_read_is_one_line_and_holds_nothing_up(
    broken, store, experiment, tmp_path, caplog
):
    folder = tmp_path / "shared"
    dead = Spool(folder, "http://127.0.0.1:9", MlflowClient("http://127.0.0.1:9"))
    logs = [write_run(dead.put, experiment, new_key()) for i in range(2)]
    file = dead._home / logs[0].key / WRITES
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], broken, *lines[3:]]))
    dead._locks[dead._home].release()
    alive = Spool(folder, store.uri, store.client)
    alive.deliver(None)
    assert alive.undelivered() == {logs[0].key}
    printed = [r.getMessage() for r in caplog.records if "cannot be read" in r.getMessage()]
    assert len(printed) == 1
    assert str(file.parent) in printed[0]
    assert "delete it to give" in printed[0]
    assert kept(store, experiment)[logs[1].key].status == "FINISHED"


def test_a_full_disk_is_one_clear_error_and_leaves_whole_lines(store, experiment, tmp_path):
    spool = Spool(tmp_path / "shared", "http://127.0.0.1:9", MlflowClient("http://127.0.0.1:9"))
    log = RunLog(
        spool.put,
        new_key(),
        {"experiment": experiment, "name": "a run", "tags": {}, "params": {}},
    )
    file = spool._home / log.key / WRITES
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written .*make room"):
            log.tag("a", "b" * 99)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    log.tag("a", "b")
    assert [json.loads(line)["kind"] for line in file.read_text().splitlines()] == ["create", "tag"]


@pytest.mark.slow
def test_a_server_that_leaves_artifacts_to_its_clients(empty_database, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.tracking.addresses.project_root", lambda: tmp_path / "here")
    there = tmp_path / "there" / "artifacts"
    there.parent.mkdir()
    options = ("--no-serve-artifacts", "--default-artifact-root", str(there))
    server = MlflowServer(tmp_path, empty_database, *options)
    server.start()
    try:
        store = connect(server.uri)
        experiment = store.experiment("e", "Why?")
        log = write_run(store.spool.put, experiment, new_key())
        store.deliver()
        check_whole(store, kept(store, experiment)[log.key])
        shutil.rmtree(there.parent)  # as on another machine
        with pytest.raises(UserError, match="leaves artifacts to its clients.*--serve-artifacts"):
            store.experiment("f", "Why?")
    finally:
        server.kill()
