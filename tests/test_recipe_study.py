"""Recipes in studies and MLflow: axes, kept weights, early stops, and their replay."""

from dataclasses import replace

import pytest
import torch
from textbook import flat

import harness
from harness import RunConfig, load_run
from harness.metrics.evaluate import evaluate
from harness.tracking import Planned, connect, record
from studies import Axis, Study, replay, run
from studies.runner import cli
from studies.runner.study import make_plan

WILD = {"learning_rate": 0.1, "kl_weight": 0.1}
"""Settings of runs whose best epoch is not the last."""

STUDY = Study(
    name="patience",
    question="How long is it worth to wait?",
    base=RunConfig(hidden=(16, 12), latent_size=4, batch_size=8, keep="best", **WILD),
    axis=Axis("patience", [0, 2]),
    figures={},
    answer=lambda runs: "Not long.",
)


def test_every_field_of_a_recipe_is_an_axis():
    values = {
        **{"optimizer": ("adam", "sgd"), "weight_decay": (0.0, 0.1), "clip_norm": (0.0, 1.0)},
        **{"adam_betas": ((0.9, 0.95), (0.5, 0.999)), "activation": ("relu", "elu")},
    }
    for name, pair in values.items():
        study = replace(STUDY, axis=Axis(name, pair))
        text = [",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in pair]
        options = cli.parse(study, ["--values", *text, "--seeds", "1", "--lr-schedule", "cosine"])
        configs = make_plan(study, options).configs
        assert [getattr(config, name) for config in configs] == [*pair]
        assert {config.lr_schedule for config in configs} == {"cosine"}


def test_mlflow_has_the_weights_and_values_of_the_best_epoch_and_where_a_run_stopped(
    tracking_uri, tiny
):
    config = STUDY.base.replace(epochs=12, patience=2)
    planned = [Planned(config, "a" * 32, "run", {}, {"role": "run"})]
    store = connect(tracking_uri)
    start = record.log_in(store, "e", "Why?")
    # The metrics of quality take longest and are those of other runs.
    (result,) = record.record(planned, tiny, "cpu", start, measure=evaluate)
    (logged,) = store.runs("e")
    check_logged(store, logged, tiny)
    assert torch.equal(flat(result.model), flat(load_run(logged.run_id, tracking_uri).model))


def check_logged(store, logged, data):
    """Assert that a run was stopped by its patience, if any, and is that of its best epoch."""
    patience, best = int(logged.params["patience"]), int(logged.metrics["best/epoch"])
    last = best + patience if patience else 12
    assert best < last
    why = f"stopped at epoch {last}: {patience} epochs without a better val/neg_elbo"
    assert logged.tags.get("reason", "") == (why if patience else "")
    assert logged.status == "FINISHED"
    # The last values, at the step after the last epoch, are those of the best one.
    values = [v for v in store.history(logged.run_id) if v.metric == "val/mse"]
    assert [v.step for v in values] == [*range(1, last + 2)]
    steps = {v.step for v in store.history(logged.run_id) if v.metric == "val/kl/1"}
    assert steps == {1, 2, 4, 8, last, last + 1} - {*range(last + 2, 10)}
    assert values[-1].value == values[best - 1].value == logged.metrics["val/mse"]
    assert logged.metrics["val/neg_elbo"] == logged.metrics["best/val/neg_elbo"]
    loaded = load_run(logged.run_id, store.uri)
    short = loaded.config.replace(epochs=best, patience=0, keep="last")
    assert torch.equal(
        flat(loaded.model), flat(harness.train_and_evaluate(short, data, "cpu").model)
    )
    pictures = {f.path for f in store.client.list_artifacts(logged.run_id, "images")}
    for key in ("reconstructions", "prior_samples"):
        assert any(name.startswith(f"images/{key}+step+{last}+") for name in pictures)


@pytest.mark.slow
def test_a_study_sweeps_a_recipe_and_its_runs_are_replayed(
    tracking_uri, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(harness, "load_dataset", lambda name, root: tiny)
    places = {"tracking_uri": tracking_uri, "storage": f"sqlite:///{tmp_path}/optuna.db"}
    outcome = run(STUDY, seeds=1, epochs=12, device="cpu", adam_betas=(0.9, 0.9991), **places)
    assert outcome.table["patience"].tolist() == [0, 2]
    store = connect(tracking_uri)
    for logged in store.runs("patience-digits", role="run"):
        assert logged.params["adam_betas"] == "(0.9, 0.9991)"
        check_logged(store, logged, tiny)
        replay.main([logged.run_id, "--tracking-uri", tracking_uri])
        assert "values are equal to the last bit" in capsys.readouterr().out
