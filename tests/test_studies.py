"""A study from its command line to its summary, on real databases and in real processes."""

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import optuna
import pandas as pd
import pytest
import torch

from harness import RunConfig, evaluate, load_run, measure_quality, tracking
from harness.linear.vae import linear_metrics
from studies import kl_weight
from studies.runner import cli
from studies.runner.database import open_storage
from studies.runner.queue import open_queue
from studies.runner.study import make_plan

NAME = "kl_weight-digits"


def runs_of(uri, role="run"):
    return tracking.connect(uri).runs(NAME, role=role)


def test_every_configuration_and_seed_is_one_finished_run_beside_one_summary(finished):
    runs = runs_of(finished.tracking_uri)
    cells = [(r.params["kl_weight"], r.params["seed"]) for r in runs]
    assert sorted(cells) == sorted((w, s) for w in ("0.0", "0.02", "1.0") for s in ("0", "1"))
    assert {r.status for r in runs} == {"FINISHED"}
    assert [r.status for r in runs_of(finished.tracking_uri, "summary")] == ["FINISHED"]


def test_every_metric_of_a_run_is_described(finished):
    page = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
    rows = [line.split("|")[1] for line in page.read_text().splitlines() if line.startswith("| `")]
    described = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    families = {"kl", "mse_class", "linear", "neg_log_likelihood"}
    for run in runs_of(finished.tracking_uri):
        plain = {re.sub("^(best/)?(train|val|test)/", "", name) for name in run.metrics}
        assert {n for n in plain if n.split("/")[0] not in families} <= described


def test_runs_have_every_setting_metrics_of_every_epoch_and_pictures(finished):
    store = tracking.connect(finished.tracking_uri)
    for run in runs_of(finished.tracking_uri):
        assert RunConfig().named().keys() <= run.params.keys()
        assert {"beta", "decoder_variance", "dataset_digest"} <= run.params.keys()
        for metric in ("train/mse", "val/neg_elbo", "val/kl/9", "val/mse_class/8"):
            history = store.client.get_metric_history(run.run_id, metric)
            assert [m.step for m in history] == [1, 2, 3]
        images = [a.path for a in store.client.list_artifacts(run.run_id, "images")]
        assert sum("reconstructions+step" in i and i.endswith(".png") for i in images) == 3
        assert sum("prior_samples+step" in i and i.endswith(".png") for i in images) == 1


def test_a_loaded_run_reproduces_its_logged_test_metrics(finished, data, features):
    runs = runs_of(finished.tracking_uri)
    for run in [run for run in runs if run.params["seed"] == "0"]:
        loaded = load_run(run.run_id, finished.tracking_uri)
        pair = [(loaded.config, loaded.model)]
        (again,), (quality,) = evaluate(pair, data), measure_quality(pair, data, features)
        logged = {k: v for k, v in loaded.metrics.items() if k.startswith("test/")}
        assert not quality.keys() & again.keys()
        again |= {f"test/{name}": value for name, value in quality.items()}
        again |= linear_metrics(loaded.config, data)
        assert logged.keys() == {k for k in again if k.startswith("test/")}
        for name, value in logged.items():
            assert again[name] == pytest.approx(value, rel=1e-6, abs=1e-6)


def test_the_summary_holds_answer_table_figures_and_a_model_that_answers(finished, data):
    store = tracking.connect(finished.tracking_uri)
    (summary,) = runs_of(finished.tracking_uri, "summary")
    description = summary.tags["mlflow.note.content"]
    assert "is the lowest of 3 values" in description
    assert "| kl_weight |" in description
    beside = finished.folder / "reports" / NAME
    listed = json.loads((beside / "summary.json").read_text())
    files = {a.path for a in store.client.list_artifacts(summary.run_id)}
    for part in ("figures", "pictures"):
        files |= {a.path for a in store.client.list_artifacts(summary.run_id, part)}
    assert files - {"model"} == {str(p.relative_to(beside)) for p in beside.rglob("*")}
    assert {f["file"] for f in listed["figures"] + listed["pictures"] + listed["tables"]} <= files
    assert all(line in description for line in ("Best: kl_weight = ", "How sure: "))
    best = load_run(summary.run_id, finished.tracking_uri)
    images = data.test.pixels(slice(4), torch.float32)
    assert best.model(images).shape == (4, 1, 8, 8)
    assert best.metrics["val/neg_elbo"] == summary.metrics["val/neg_elbo"]


def test_the_setting_is_that_of_the_best_mean_and_its_model_that_of_the_median_seed(finished):
    folder = finished.folder / "reports" / NAME
    found, runs = (
        json.loads((folder / "summary.json").read_text()),
        pd.read_csv(folder / "runs.csv"),
    )
    means = runs.groupby("kl_weight")["val/neg_elbo"].mean()
    assert found["best"] == means.idxmin() == means.index[found["best_row"]]
    assert {found["best"], *found["not_distinguishable"]} <= {0.0, 0.02, 1.0}
    seeds = runs[runs["kl_weight"] == found["best"]].sort_values("val/neg_elbo")
    assert found["model_run_id"] == seeds["run_id"].iloc[0]  # the lower one of two
    captions = " ".join(picture["caption"] for picture in found["pictures"])
    assert f"{seeds['name'].iloc[0]}, the median seed of 2: a latent a row" in captions
    assert any("Two seeds" in warning for warning in found["warnings"])
    assert any("fell by" in warning for warning in found["warnings"])
    assert found["next_command"].startswith("python -m studies.kl_weight --dataset digits --epochs")
    assert found["next_command"].endswith(" --fresh")


def test_the_same_command_again_trains_nothing_and_says_the_same(finished, capsys):
    before = [r.run_id for r in runs_of(finished.tracking_uri)]
    cli.main(kl_weight.STUDY, finished.arguments)
    printed = capsys.readouterr().out
    assert "are finished; 0 are left" in printed
    said = finished.printed.split("kl_weight = ")[-1]
    assert said.partition("; the database")[0] in printed
    assert [r.run_id for r in runs_of(finished.tracking_uri)] == before
    assert len(runs_of(finished.tracking_uri, "summary")) == 1


def test_a_dry_run_counts_what_is_finished_and_missing(finished, capsys):
    for more, done, missing in ((["--seeds", "3"], 6, 3), (["--fresh"], 0, 6)):
        cli.main(kl_weight.STUDY, [*finished.arguments, "--dry-run", *more])
        printed = capsys.readouterr().out
        assert f"Runs: {done} are finished, {missing} are missing; nothing is refused." in printed
        assert "(from 6 finished runs and the database here), and a report" in printed


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(kl_weight.STUDY, arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


def test_other_settings_are_refused_with_the_differences(finished, capsys):
    printed = refusal([*finished.arguments, "--epochs", "4", "--latent-size", "3"], capsys)
    assert "epochs: 3 there, 4 here; latent_size: 10 there, 3 here" in printed


def test_a_lost_tracking_store_is_named(finished, tracking_uri, capsys):
    for more in ([], ["--dry-run"]):
        printed = refusal([*finished.arguments, "--tracking-uri", tracking_uri, *more], capsys)
    assert "has 6 runs of study 'kl_weight-digits', and --tracking-uri" in printed


def test_a_study_whose_storage_is_another_is_refused(finished, tmp_path, capsys):
    other = f"sqlite:///{tmp_path}/optuna.db"
    arguments = [*finished.arguments, "--storage", other]
    for more in (["--dry-run"], [], []):  # also once the storage is there
        printed = refusal([*arguments, *more], capsys)
        assert f"has 7 runs of study '{NAME}', and --storage {other} has none of them" in printed


def test_the_objective_of_a_trial_is_the_validation_neg_elbo_of_its_run(finished):
    study = optuna.load_study(study_name=NAME, storage=open_storage(finished.storage))
    runs = {run.key: run for run in runs_of(finished.tracking_uri)}
    assert len(study.trials) == len(runs) == 6
    for trial in study.trials:
        run = runs[trial.user_attrs["keys"][0]]
        cell = trial.user_attrs["cell"]
        assert trial.value == run.metrics["val/neg_elbo"]
        assert (cell["value"], cell["seed"]) == (
            float(run.params["kl_weight"]),
            int(run.params["seed"]),
        )


def test_a_study_grows_by_values_and_by_seeds(tracking_uri, tmp_path, capsys):
    places = ["--tracking-uri", tracking_uri, "--storage", f"sqlite:///{tmp_path}/optuna.db"]
    common = ["--epochs", "1", "--batch-size", "128", "--latent-size", "2", *places]
    cli.main(kl_weight.STUDY, ["--values", "0.02", "1", "--seeds", "1", *common])
    before = {run.name: run.run_id for run in runs_of(tracking_uri)}
    capsys.readouterr()
    cli.main(kl_weight.STUDY, ["--values", "0.02", "0.5", "1", "--seeds", "2", *common])
    assert "2 runs are finished; 4 are left" in capsys.readouterr().out
    runs = runs_of(tracking_uri)
    assert before.items() <= {run.name: run.run_id for run in runs}.items()
    order = [(run.params["kl_weight"], run.params["seed"]) for run in runs]
    assert order == [(weight, seed) for weight in ("0.02", "0.5", "1.0") for seed in "01"]
    summaries = runs_of(tracking_uri, "summary")
    assert sorted(run.status for run in summaries) == ["FINISHED", "KILLED"]
    (former,) = (run for run in summaries if run.status == "KILLED")
    assert former.tags["reason"] == "superseded by a later summary"
    table = pd.read_csv(tmp_path / "reports" / NAME / "runs.csv")
    assert list(zip(table["kl_weight"], table["seed"], strict=True)) == [
        (float(weight), int(seed)) for weight, seed in order
    ]


@pytest.mark.slow
def test_a_process_may_leave_what_others_train(tracking_uri, tmp_path, capsys):
    storage = f"sqlite:///{tmp_path}/optuna.db"
    arguments = ["--values", "0.02", "1", "--seeds", "1", "--epochs", "1", "--batch-size", "128"]
    plan = make_plan(kl_weight.STUDY, cli.parse(kl_weight.STUDY, arguments))
    other = open_queue(open_storage(storage), plan.name, plan.proposer, set)
    other.me = "elsewhere:1:1"
    other.take(1)
    arguments += ["--tracking-uri", tracking_uri, "--storage", storage]
    cli.main(kl_weight.STUDY, [*arguments, "--leave"])
    assert "other processes train the last 1 run" in capsys.readouterr().out
    assert [run.status for run in runs_of(tracking_uri)] == ["FINISHED"]
    assert runs_of(tracking_uri, "summary") == []
    other.give_back()
    other.storage.engine.dispose()
    cli.main(kl_weight.STUDY, [*arguments, "--leave"])  # the last one answers
    assert [run.status for run in runs_of(tracking_uri)] == ["FINISHED"] * 2
    assert [run.status for run in runs_of(tracking_uri, "summary")] == ["FINISHED"]


@pytest.mark.slow
def test_a_stopped_command_is_finished_by_the_same_command(tracking_uri, tmp_path, capsys):
    # Four values of eight seeds are two stacks: one is told before the stop, one is open.
    arguments = ["--values", "0.01", "0.02", "0.03", "0.04", "--seeds", "8", "--epochs", "6"]
    arguments += ["--tracking-uri", tracking_uri, "--storage", f"sqlite:///{tmp_path}/optuna.db"]
    with started_study(arguments) as process:
        wait_for_runs(tmp_path / "mlflow.db", 17)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate()[1]
    assert process.returncode == 75
    assert {r.status for r in runs_of(tracking_uri)} == {"FINISHED", "KILLED"}
    assert "the same command continues from here" in printed
    cli.main(kl_weight.STUDY, arguments)
    assert "16 runs are finished; 16 are left" in capsys.readouterr().out
    ended = pd.DataFrame([r.params | {"status": r.status} for r in runs_of(tracking_uri)])
    done = ended[ended.status == "FINISHED"]
    assert len(done) == 32
    assert not done.duplicated(["kl_weight", "seed"]).any()
    assert set(ended.status) == {"FINISHED", "KILLED"}
    assert len(runs_of(tracking_uri, "summary")) == 1


@contextmanager
def started_study(arguments):
    """Start a study in the background, and leave no process behind."""
    process = subprocess.Popen(
        [sys.executable, "-m", "studies.kl_weight", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_runs(database: Path, count: int) -> None:
    """Wait until so many runs were started; a study that dies instead fails the test."""
    for _ in range(2400):
        time.sleep(0.05)
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            (started,) = connection.execute("select count(*) from runs").fetchone()
        connection.close()
        if started >= count:
            return
    pytest.fail(f"no {count} runs were started")


def test_the_default_grid_has_zero_thirteen_weights_a_log_grid_and_the_blogs_weight():
    weights = kl_weight.WEIGHTS
    assert len(weights) == 14
    assert weights[0] == 0.0
    assert (weights[1], weights[-1]) == (pytest.approx(1e-3), pytest.approx(10.0))
    assert 1.0 in weights
    ratios = [b / a for a, b in zip(weights[1:], weights[2:], strict=False)]
    assert max(ratios) == pytest.approx(min(ratios))


def test_options_reach_the_plan():
    options = cli.parse(
        kl_weight.STUDY,
        ["--values", "0.5", "2", "--seeds", "4", "--epochs", "7", "--batch-size", "8"]
        + ["--latent-size", "3", "--kl-normalization", "sum"],
    )
    plan = make_plan(kl_weight.STUDY, options)
    assert [(c.kl_weight, c.seed) for c in plan.configs] == [
        (w, s) for w in (0.5, 2) for s in range(4)
    ]
    assert {(c.epochs, c.batch_size, c.latent_size, c.kl_normalization) for c in plan.configs} == {
        (7, 8, 3, "sum")
    }
