"""The MLflow edge, on real databases."""

import json
import multiprocessing
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import RunConfig, UserError, ledger, load_run, tracking
from harness.models.files import load_model, save_model
from harness.models.vae import build
from harness.tracking import RunLog

TAGS = {"study": "s", "role": "run", "trial": "0"}


@pytest.fixture
def store(tracking_uri):
    return tracking.connect(tracking_uri)


@pytest.fixture
def log(store):
    experiment = tracking.open_experiment(store, "s-digits", "Why?")
    return RunLog(store, experiment, "a run", TAGS, {"kl_weight": 0.5, "hidden": (3, 2)})


def read_one(store):
    (run,) = tracking.read_runs(store, "s-digits")
    return run


def test_params_tags_and_last_metrics_come_back(store, log):
    log.metrics({"val/mse": 0.5}, step=1)
    log.metrics({"val/mse": 0.25}, step=2)
    log.end()
    run = read_one(store)
    assert run["status"] == "FINISHED"
    assert run["params"] == {"kl_weight": "0.5", "hidden": "(3, 2)"}
    assert run["metrics"] == {"val/mse": 0.25}
    assert TAGS.items() <= run["tags"].items()
    assert {"host", "process"} <= run["tags"].keys()


def test_every_value_of_a_long_history_is_kept_and_nothing_is_sent_before_a_batch_is_full(
    store, log
):
    for step in range(1, 400):
        log.metrics({"a": step, "b": -step}, step)
    assert store.client.get_metric_history(log.run_id, "a") == []
    for step in range(400, 1201):
        log.metrics({"a": step, "b": -step}, step)
    log.end()
    history = store.client.get_metric_history(log.run_id, "b")
    assert [(m.step, m.value) for m in history] == [(s, -s) for s in range(1, 1201)]


def test_the_dataset_is_an_input_with_its_digest(store, log, data):
    log.dataset(data)
    (entry,) = store.client.get_run(log.run_id).inputs.dataset_inputs
    assert entry.dataset.name == "digits"
    assert data.digest.startswith(entry.dataset.digest)
    assert json.loads(entry.dataset.profile)["images"] == {"train": 1280, "val": 256, "test": 261}


def test_pictures_of_one_key_have_their_steps(store, log):
    for step in (1, 5):
        log.picture("reconstructions", np.full((4, 4), step, dtype=np.uint8), step)
    paths = [a.path for a in store.client.list_artifacts(log.run_id, "images")]
    for step in (1, 5):
        assert any(f"reconstructions+step+{step}+" in p for p in paths), paths


def test_a_model_comes_back_bit_for_bit(store, log, data, tracking_uri):
    config = RunConfig(hidden=(7,), latent_size=3, seed=4)
    model = build(config, data.image_shape, data.train.largest)
    log.model(config, model)
    log.end()
    back = load_run(log.run_id, tracking_uri)
    assert (back.config, back.model.largest) == (config, 16)
    x = data.val.pixels(slice(5), torch.float32)
    assert torch.equal(back.model(x), model(x))


def test_float64_weights_keep_their_type(tmp_path, data):
    config = RunConfig(hidden=())
    save_model(config, build(config, data.image_shape).double(), tmp_path)
    assert load_model(tmp_path)[1].dtype == torch.float64


def test_a_run_that_is_not_there_is_one_clear_error(store, tracking_uri):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_run("0" * 32, tracking_uri)


def test_burying_closes_the_runs_of_dead_trials_only(store, log):
    experiment = tracking.open_experiment(store, "s-digits", "Why?")
    RunLog(store, experiment, "kept", TAGS | {"trial": "1"}, {})
    RunLog(store, experiment, "summary", {"study": "s", "role": "summary"}, {})
    RunLog(store, experiment, "other", TAGS | {"study": "t"}, {})
    log.end()
    ledger.bury_runs(store, "s-digits", "s", [0])
    status = {r["name"]: r["status"] for r in tracking.read_runs(store, "s-digits")}
    assert status == {
        "a run": "KILLED",
        "kept": "RUNNING",
        "summary": "RUNNING",
        "other": "RUNNING",
    }


def test_an_experiment_is_made_once_with_its_question_and_artifacts_beside_the_database(
    store, tmp_path
):
    first = tracking.open_experiment(store, "e", "Why?")
    assert tracking.open_experiment(store, "e", "Why?") == first
    experiment = store.client.get_experiment(first)
    assert experiment.tags["mlflow.note.content"] == "Why?"
    assert experiment.artifact_location == (tmp_path / "mlruns" / "e").as_uri()


def test_a_deleted_experiment_is_one_clear_error(store):
    store.client.delete_experiment(tracking.open_experiment(store, "e", "Why?"))
    with pytest.raises(UserError, match="restore it"):
        tracking.open_experiment(store, "e", "Why?")


def _connect_and_open(uri: str) -> str:
    return tracking.open_experiment(tracking.connect(uri), "e", "Why?")


@pytest.mark.slow
def test_processes_that_create_a_database_together_do_not_break_it(tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert len(set(pool.map(_connect_and_open, [uri] * 4))) == 1
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
        assert connection.execute("pragma journal_mode").fetchone() == ("wal",)
    connection.close()
