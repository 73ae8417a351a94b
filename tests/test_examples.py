"""The examples, as a user runs them, and the bar of `progress=True`."""

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from textbook import SMALL

import harness
from harness import RunConfig, registry, tracking
from studies import run
from studies.kl_weight import STUDY

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


NAMES = ("residual", "total_correlation", "table_study", "grid_on_tensors")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 40


@pytest.mark.slow
def test_the_residual_network_is_trained_by_a_study_and_reloaded(
    tracking_uri, tiny, tmp_path, monkeypatch, registered
):
    monkeypatch.setattr(harness, "load_dataset", lambda name, root: tiny)
    name = registry.load(f"{EXAMPLES / 'residual.py'}:residual", "network")
    options = {"width": 8, "depth": 1}
    study = replace(STUDY, base=RunConfig(model=name, model_options=options, latent_size=2))
    places = {"tracking_uri": tracking_uri, "storage": f"sqlite:///{tmp_path}/optuna.db"}
    run(study, values=(0.01,), seeds=1, epochs=1, **places)
    (one,) = tracking.connect(tracking_uri).runs("kl_weight-digits", role="run")
    assert (one.params["model"], one.params["width"], one.params["depth"]) == ("residual", "8", "1")
    del registry.NETWORKS[name]
    with pytest.raises(harness.UserError, match="trust"):
        harness.load_run(one.run_id, tracking_uri, trust=False)
    assert harness.load_run(one.run_id, tracking_uri, trust=True).model.sample(2).shape[0] == 2


@pytest.mark.slow
def test_the_study_of_total_correlation_answers(
    tracking_uri, tiny, tmp_path, monkeypatch, capsys, registered
):
    monkeypatch.setattr(harness, "load_dataset", lambda name, root: tiny)
    file = str(EXAMPLES / "total_correlation.py")
    places = ["--tracking-uri", tracking_uri, "--storage", f"sqlite:///{tmp_path}/optuna.db"]
    options = ["--values", "0", "4", "--seeds", "1", "--epochs", "1", "--batch-size", "32"]
    monkeypatch.setattr(sys, "argv", [file, *options, *places])
    runpy.run_path(file, run_name="__main__")
    printed = " ".join(capsys.readouterr().out.split())
    assert "Weight 0: neg_elbo" in printed
    assert "Weight 4: neg_elbo" in printed
    runs = tracking.connect(tracking_uri).runs("total_correlation-digits", role="run")
    assert {float(one.params["total_correlation"]) for one in runs} == {0.0, 4.0}


@pytest.mark.slow
def test_the_study_of_a_table_answers(tracking_uri, tmp_path, monkeypatch, capsys):
    pytest.importorskip("harness.data.table")
    file = str(EXAMPLES / "table_study.py")
    places = ["--tracking-uri", tracking_uri, "--storage", f"sqlite:///{tmp_path}/optuna.db"]
    options = ["--values", "1", "2", "--seeds", "1", "--epochs", "1", *places]
    monkeypatch.setattr(sys, "argv", [file, *options])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(file, run_name="__main__")
    printed = " ".join(capsys.readouterr().out.split())
    assert "on table-tumours (30 columns)" in printed
    assert re.search(r"Latents keep -?\d+% with 1, -?\d+% with 2; neg_elbo is lowest", printed)
    page = (tmp_path / "reports" / "table_study-table-tumours" / "report.html").read_text()
    assert "--dataset table:tumours.csv --label target" in page


@pytest.mark.slow
def test_the_grid_on_tensors_has_a_heat_map(tracking_uri, tmp_path):
    pytest.importorskip("studies.sweep")
    found = runpy.run_path(str(EXAMPLES / "grid_on_tensors.py"))
    places = {"tracking_uri": tracking_uri, "storage": f"sqlite:///{tmp_path}/optuna.db"}
    outcome = run(found["STUDY"], data=found["waves"](80), seeds=1, epochs=1, **places)
    assert outcome.folder.name == "sweep-learning_rate-kl_weight-waves"
    assert (outcome.folder / "figures" / "heat_map.png").exists()
    assert len(outcome.table) == 6
    command = json.loads((outcome.folder / "summary.json").read_text())["command"]
    assert command.startswith("run(STUDY, data=DATA, ")


@pytest.mark.parametrize("tracked", [False, True])
def test_a_bar_counts_the_epochs_of_all_runs(tracked, tiny, tracking_uri, capsys):
    configs = [SMALL.replace(epochs=2), SMALL.replace(epochs=1, seed=1)]
    train = harness.tracking.train_and_evaluate if tracked else harness.train_and_evaluate
    more = {"experiment": "bar", "tracking_uri": tracking_uri} if tracked else {}
    train(configs, tiny, device="cpu", **more)
    assert "epoch" not in capsys.readouterr().err
    train(configs, tiny, device="cpu", progress=True, **more)
    assert "3/3" in capsys.readouterr().err


def test_the_exact_linear_vae_is_measured_as_any_model(capsys):
    runpy.run_path(str(EXAMPLES / "linear_vae.py"), run_name="__main__")
    assert re.fullmatch(r"-?\d+\.\d+ nats / image\n", capsys.readouterr().out)
