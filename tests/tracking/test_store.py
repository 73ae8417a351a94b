"""Runs written to a real database file and read back."""

import json
import multiprocessing
import sqlite3
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy
import torch

from harness import RunConfig, UserError, load_run
from harness.models.files import load_model, save_model
from harness.models.vae import build
from harness.tracking import connect

TAGS = {"study": "s", "role": "run"}
CONFIG = RunConfig(hidden=(7,), latent_size=3, seed=4)


@pytest.fixture
def store(tracking_uri):
    return connect(tracking_uri)


@pytest.fixture
def begin(store):
    """Return a function that starts a run of one experiment."""
    experiment = store.experiment("s-digits", "Why?")

    def start(name="a run", params=(), **tags):
        return store.start(experiment, uuid.uuid4().hex, name, TAGS | tags, dict(params))

    return start


def id_of(store, log):
    return store.run(log.key).run_id


def names(store, **tags):
    return [run.name for run in store.runs("s-digits", **tags)]


def test_params_tags_and_last_metrics_come_back(store, begin):
    log = begin(params={"kl_weight": 0.5, "hidden": (3, 2)})
    log.metrics({"val/mse": 0.5}, step=1)
    log.metrics({"val/mse": 0.25}, step=2)
    log.end()
    (run,) = store.runs("s-digits")
    assert (run.run_id, run.key, run.status) == (id_of(store, log), log.key, "FINISHED")
    assert run.params == {"kl_weight": "0.5", "hidden": "(3, 2)"}
    assert run.metrics == {"val/mse": 0.25}
    assert TAGS.items() <= run.tags.items()
    assert {"host", "process"} <= run.tags.keys()
    assert [value[1:] for value in store.history(run.run_id)] == [(1, 0.5), (2, 0.25)]


def test_a_run_is_found_by_its_id_and_by_its_key(store, begin):
    log = begin()
    assert store.run(log.key) == store.run(id_of(store, log))
    with pytest.raises(UserError, match="is not in .*its page in MLflow shows the id"):
        store.run("0" * 32)


def test_runs_come_in_the_order_of_the_plan_and_then_of_their_start(store, begin):
    begin("tenth", place="10")
    begin("second", place="2")
    begin("early", group="it's")
    begin("late")
    begin("second again", place="2")
    assert names(store) == ["early", "late", "second", "second again", "tenth"]
    assert names(store, place="2", study="s") == ["second", "second again"]
    assert store.runs("none") == []


def test_every_value_of_a_long_history_is_kept_and_nothing_is_sent_before_a_batch_is_full(
    store, begin
):
    log = begin()
    for step in range(1, 400):
        log.metrics({"a": step, "b": -step}, step)
    assert store.history(id_of(store, log)) == []
    for step in range(400, 1201):
        log.metrics({"a": step, "b": -step}, step)
    log.end()
    history = [value for value in store.history(id_of(store, log)) if value.metric == "b"]
    assert history == [("b", step, -step) for step in range(1, 1201)]


def test_histories_hold_one_metric_of_each_run_in_the_order_of_runs_and_epochs(store, begin):
    logs = [begin() for _ in range(3)]
    for place, log in enumerate(logs[:2]):
        for epoch in (2, 1, 3)[: 3 - place]:  # runs of different lengths
            log.metrics({"a": 10 * place + epoch, "b": 0.0}, epoch)
    for log in logs:
        log.end()
    first, second, third = (id_of(store, log) for log in logs)
    found = store.histories([second, third, first], "a")
    assert found == [(second, 1, 11), (second, 2, 12), *((first, n, n) for n in (1, 2, 3))]
    assert store.histories([first], "none") == []


def test_the_dataset_is_an_input_with_its_digest(store, begin, data):
    log = begin()
    log.dataset(data)
    (entry,) = store.client.get_run(id_of(store, log)).inputs.dataset_inputs
    assert entry.dataset.name == "digits"
    assert data.digest.startswith(entry.dataset.digest)
    assert json.loads(entry.dataset.profile)["images"] == {"train": 1280, "val": 256, "test": 261}


def test_pictures_are_named_as_mlflow_names_them(store, begin):
    log = begin()
    picture = np.zeros((8, 20), dtype=np.uint8)
    log.picture("reconstructions", picture, 3)
    (ours, scaled) = sorted(
        a.path for a in store.client.list_artifacts(id_of(store, log), "images")
    )
    store.client.log_image(id_of(store, log), picture, key="reconstructions", step=3)
    every = [a.path for a in store.client.list_artifacts(id_of(store, log), "images")]
    parts = [path.replace("+compressed", "").split("+timestamp+")[0] for path in every]
    assert parts == ["images/reconstructions+step+3"] * 4
    ends = sorted(path[-len("+compressed.webp") :] for path in every if path not in (ours, scaled))
    assert ends == sorted(path[-len("+compressed.webp") :] for path in (ours, scaled)) or ends[0]
    assert store.run(log.key).tags["mlflow.loggedImages"] == "True"


def test_a_model_comes_back_bit_for_bit(store, begin, data, tracking_uri):
    model = build(CONFIG, data.image_shape, data.train.largest)
    log = begin()
    log.model(CONFIG, model)
    log.end()
    x = data.val.pixels(slice(5), torch.float32)
    for name in (id_of(store, log), log.key):
        back = load_run(name, tracking_uri)
        assert (back.run_id, back.config) == (id_of(store, log), CONFIG)
        assert back.model.largest == 16
        assert torch.equal(back.model(x), model(x))


def test_float64_weights_keep_their_type(tmp_path, data):
    config = RunConfig(hidden=())
    save_model(config, build(config, data.image_shape).double(), tmp_path)
    assert load_model(tmp_path)[1].dtype == torch.float64


def test_a_run_without_a_model_is_one_clear_error(begin, tracking_uri):
    with pytest.raises(UserError, match="Failed to download artifacts"):
        load_run(begin().key, tracking_uri)


def test_the_record_of_a_finished_run(store, begin, data):
    log = begin("mine")
    log.metrics({"mse": 0.5}, 1)
    log.model(CONFIG, build(CONFIG, data.image_shape))
    made_with = {"device": {"kind": "cpu"}, "threads": {"blas": 1}}
    made_with["dataset"] = {"name": "digits", "digest": "0"}
    made_with |= {"code": {}, "versions": {}, "platform": "here"}
    log.text(json.dumps(made_with), "provenance.json")
    with pytest.raises(UserError, match="is RUNNING; only a FINISHED run"):
        store.record(log.key)
    log.end()
    values = [("mse", 1, 0.5)]
    assert store.record(log.key) == (id_of(store, log), "mine", CONFIG, made_with, values, 1)
    with pytest.raises(UserError, match="is a summary; give a run of a configuration"):
        store.record(begin(role="summary").key)


def test_a_record_without_its_provenance_is_one_clear_error(store, begin, data):
    log = begin()
    log.model(CONFIG, build(CONFIG, data.image_shape))
    log.end()
    with pytest.raises(UserError, match=r"provenance\.json of run .* cannot be read"):
        store.record(log.key)


def test_closing_ends_open_and_finished_runs_by_key_and_may_be_repeated(store, begin):
    logs = {name: begin(name) for name in ("open", "finished", "failed", "stopped", "other")}
    logs["finished"].end()
    logs["failed"].end("FAILED", "RuntimeError('CUDA error')")
    logs["stopped"].end("KILLED", "stopped by SIGINT")
    keys = [log.key for name, log in logs.items() if name != "other"]
    for _ in range(2):
        store.close("s-digits", [*keys, uuid.uuid4().hex], "its process ended")
        store.close("none", keys, "its process ended")
        store.close("s-digits", [], "its process ended")
        ends = {r.name: (r.status, r.tags.get("reason")) for r in store.runs("s-digits")}
        assert ends == {
            **dict.fromkeys(("open", "finished"), ("KILLED", "its process ended")),
            "failed": ("FAILED", "RuntimeError('CUDA error')"),
            "stopped": ("KILLED", "stopped by SIGINT"),
            "other": ("RUNNING", None),
        }


def test_a_file_has_everything_at_once(store, begin):
    log = begin()
    assert store.undelivered() == store.complete() == set()
    store.deliver([log.key])


def test_a_run_names_the_script_that_made_it_and_not_its_folder(store, begin, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/x/mine.py"])
    tags = store.run(begin().key).tags
    assert (tags["mlflow.source.type"], tags["mlflow.source.name"]) == ("LOCAL", "mine.py")


def test_an_experiment_is_made_once_with_its_question_and_artifacts_beside_the_database(
    store, tmp_path
):
    first = store.experiment("e", "Why?")
    assert store.experiment("e", "Why?") == first
    experiment = store.client.get_experiment(first)
    assert experiment.tags["mlflow.note.content"] == "Why?"
    assert experiment.artifact_location == (tmp_path / "mlruns" / "e").as_uri()


def test_other_databases_of_this_process_keep_their_settings(store, tmp_path):
    def settings(engine):
        with engine.connect() as connection:
            names = ("journal_mode", "synchronous", "wal_autocheckpoint")
            return [connection.exec_driver_sql(f"pragma {name}").scalar() for name in names]

    file = tmp_path / "other.db"
    sqlite3.connect(file).execute("pragma journal_mode=WAL").connection.close()
    assert settings(sqlalchemy.create_engine(f"sqlite:///{file}")) == ["wal", 2, 1000]
    assert settings(store.client._tracking_client.store.engine) == ["wal", 1, 2**14]


def test_a_deleted_experiment_is_one_clear_error(store):
    store.client.delete_experiment(store.experiment("e", "Why?"))
    with pytest.raises(UserError, match="restore it"):
        store.experiment("e", "Why?")


def test_a_home_that_cannot_be_written_is_one_clear_error(store, tmp_path):
    store.check_home()
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match="cache cannot be written .*is not a folder"):
        store.check_home()


@pytest.mark.parametrize("write", [True, False])
def test_what_is_written_after_another_process_has_left_is_kept(store, begin, tracking_uri, write):
    log = begin("a")
    connect(tracking_uri, write=write)  # a file that is read and closed loses its locks
    for value in ("before", "after"):
        log.tag("mine", value)
        assert _tag_read_by_another(tracking_uri, id_of(store, log)) == value


def _tag_read_by_another(uri: str, run_id: str) -> str:
    query = "select value from tags where run_uuid = ? and key = 'mine'"
    program = "import sqlite3, sys; file, query, run = sys.argv[1:]; "
    program += "print(*sqlite3.connect(file).execute(query, [run]).fetchone())"
    command = [sys.executable, "-c", program, uri.removeprefix("sqlite:///"), query, run_id]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _connect_and_open(uri: str) -> str:
    return connect(uri).experiment("e", "Why?")


@pytest.mark.slow
def test_processes_that_create_a_database_together_do_not_break_it(tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert len(set(pool.map(_connect_and_open, [uri] * 4))) == 1
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
        assert connection.execute("pragma journal_mode").fetchone() == ("wal",)
    connection.close()
