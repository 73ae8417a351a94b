"""The loop that trains and logs runs: what is logged, true ends, resumption, and a toy."""

import math
import sys

import pytest
import torch
import toy

import harness
from harness import Checkpoints, RunConfig, UserError, load_run
from harness.metrics import evaluate
from harness.tracking import End, Planned, addresses, connect, record
from harness.tracking.record import log_in
from harness.training.engine import best_epoch

SMALL = RunConfig(hidden=(16,), latent_size=2, batch_size=16, epochs=5)
WILD = SMALL.replace(learning_rate=1e30, seed=1)
KEYS = ["a" * 32, "b" * 32, "c" * 32, "d" * 32]


def plan(*configs: RunConfig) -> list[Planned]:
    return [
        Planned(config, key, f"run {place}", {"point": place}, {"role": "run", "place": str(place)})
        for place, (config, key) in enumerate(zip(configs, KEYS, strict=False))
    ]


@pytest.fixture
def store(tracking_uri):
    return connect(tracking_uri)


def trained(store, data, *configs, **options):
    """Train runs in the experiment "e" of a store; return their metrics and the logged runs."""
    start = log_in(store, "e", "Why?")
    results = record.record(plan(*configs), data, "cpu", start, **options)
    return [result.metrics for result in results], store.runs("e")


def steps(store, run, metric):
    return [value.step for value in store.history(run.run_id) if value.metric == metric]


def files(store, run, folder=""):
    return {file.path for file in store.client.list_artifacts(run.run_id, folder)}


# --- what is logged ------------------------------------------------------------------------------


def test_a_run_is_logged_whole(store, tiny):
    config = SMALL.replace(epochs=10)
    finals, (run,) = trained(store, tiny, config)
    assert (run.status, run.name, run.key) == ("FINISHED", "run 0", KEYS[0])
    for name in ("train/loss", "val/neg_elbo", "val/active_units", "progress/epoch_seconds"):
        assert steps(store, run, name) == [*range(1, 11)]
    for name in ("train/kl/0", "val/kl/1", "train/mse_class/9", "val/mse_class/3"):
        assert steps(store, run, name) == [1, 2, 4, 8, 10]
    for name in ("test/mse", "test/frechet", "test/neg_log_likelihood", "linear/mse", "best/epoch"):
        assert steps(store, run, name) == [10]
    assert run.params["hidden"] == "(16,)"
    assert run.params["decoder_variance"] == "0.5"
    acts = "kl_weight 1 acts as a decoder standard deviation of 0.707 (180 grey levels of 255)"
    assert run.tags[record.ACTS] == acts
    assert run.tags["mlflow.loggedImages"] == "True"
    assert run.tags["mlflow.note.content"].endswith(acts)
    named = {"dataset": "digits", "dataset_digest": tiny.digest, "device": "cpu"}
    assert {**named, "stack_width": "1", "point": "0"}.items() <= run.params.items()
    made = record.tags_of(harness.provenance.provenance(tiny, "cpu"))
    assert {**made, "place": "0", "role": "run", "run_key": KEYS[0]}.items() <= run.tags.items()
    pictures = {name for name in files(store, run, "images") if name.endswith(".png")}
    shown = sorted(name.removeprefix("images/").split("+timestamp")[0] for name in pictures)
    drawn = [*(f"reconstructions+step+{epoch}" for epoch in (0, 1, 10, 2)), "prior_samples+step+10"]
    assert shown == sorted(drawn)
    (final,) = finals
    for name, value in run.metrics.items():
        assert name.startswith(("train/", "progress/")) or final[name] == value
    assert final["neg_elbo"] == final["test/neg_elbo"]
    assert final["val/neg_elbo"] == run.metrics["val/neg_elbo"]


def test_a_run_comes_back_by_id_and_by_key(store, tiny, tracking_uri):
    _, (run,) = trained(store, tiny, SMALL.replace(epochs=1))
    for name in (run.run_id, run.key):
        found = load_run(name, tracking_uri)
        assert (found.run_id, found.config) == (run.run_id, SMALL.replace(epochs=1))
        assert found.metrics == run.metrics
        assert isinstance(found.model, harness.VAE)


def test_the_page_of_a_run_has_the_command_that_repeats_it(store, tiny, tracking_uri):
    _, (run,) = trained(store, tiny, SMALL.replace(epochs=1))
    command = f"python -m studies.replay {run.key} --tracking-uri {tracking_uri}"
    assert command in run.tags["mlflow.note.content"]


def test_the_command_names_no_password_and_no_default_store():
    text = record.description("abc", "https://me:secret@host:5000", "digits")
    assert text.endswith("python -m studies.replay abc --tracking-uri https://host:5000")
    default = record.description("abc", addresses.default_tracking(), "digits")
    assert default.endswith("python -m studies.replay abc")


def test_the_objective_chooses_the_best_epoch(store, tiny):
    _, (run,) = trained(store, tiny, SMALL, objective="val/mse")
    values = [v.value for v in store.history(run.run_id) if v.metric == "val/mse"]
    assert run.metrics["best/epoch"] == best_epoch(values)
    assert run.metrics["best/val/mse"] == min(values)


def test_the_best_epoch_is_the_first_of_the_lowest():
    assert best_epoch([3.0, 1.0, 2.0, 1.0]) == 2
    assert best_epoch([math.inf, 5.0]) == 2
    assert best_epoch([1.0]) == 1


def test_the_best_epoch_of_a_result_is_that_of_its_history(tiny):
    plain = SMALL.replace(kl_weight=0.0, latent="deterministic")
    configs = [SMALL, plain]
    for result in harness.train_and_evaluate(configs, tiny, device="cpu"):
        metric = "val/loss" if result.config == plain else "val/neg_elbo"
        course = [epoch[metric] for epoch in result.history]
        assert course[result.best_epoch - 1] == min(course)


def test_the_best_epoch_is_in_the_table_on_the_screen_and_in_the_report(finished):
    folder = finished.folder / "reports" / "kl_weight-digits"
    header = (folder / "table.csv").read_text().splitlines()[0].split(",")
    assert {"val/neg_elbo", "best/val/neg_elbo", "best/epoch"} <= set(header)
    assert "best/" in finished.printed
    page = (folder / "report.html").read_text()
    assert page.count("best/<wbr>epoch") == 2


def test_a_plain_autoencoder_has_no_best_elbo(store, tiny):
    plain = SMALL.replace(kl_weight=0.0, latent="deterministic", epochs=1)
    _, (run,) = trained(store, tiny, plain)
    assert run.status == "FINISHED"
    assert not any(name.startswith("best/") for name in run.metrics)


def test_workers_measure_runs_without_mlflow(store, tiny):
    torch.set_num_threads(2)

    def measure(runs, data):
        known = evaluate.as_measured(runs, data)
        found = evaluate.on_all_cores(lambda *_: "mlflow" in sys.modules, runs, known)
        assert found == [False, False]
        return [{}, {}]

    trained(store, tiny, SMALL, SMALL.replace(seed=1), measure=measure)


# --- true ends -----------------------------------------------------------------------------------


def test_a_run_that_diverges_fails_alone(store, tiny):
    finals, (first, second) = trained(store, tiny, SMALL, WILD)
    assert (first.status, second.status) == ("FINISHED", "FAILED")
    assert second.tags["reason"].startswith("diverged in epoch 1: ")
    assert steps(store, second, "progress/kl_warmup") == [1]
    assert finals[0]
    assert not finals[1]


def test_the_judge_ends_runs_of_a_stack(store, tiny):
    ends = {2: End("KILLED", "pruned at epoch 2", pruned=True), 3: End("FAILED", "tested")}
    seen = []

    def judge(current):
        return {len(current.rows) - 1: ends[current.epoch]} if current.epoch in ends else {}

    def on_epoch(current):
        seen.append((len(current.rows), len(current.dropped)))

    configs = [SMALL.replace(seed=seed) for seed in range(3)]
    finals, runs = trained(store, tiny, *configs, judge=judge, on_epoch=on_epoch)
    assert [run.status for run in runs] == ["FINISHED", "FAILED", "KILLED"]
    assert [run.tags.get("reason") for run in runs] == [None, "tested", "pruned at epoch 2"]
    assert [run.tags.get("pruned") for run in runs] == [None, None, "true"]
    assert [len(steps(store, run, "val/mse")) for run in runs] == [5, 3, 2]
    last = [[1, 2, 4, 5], [1, 2, 3], [1, 2]]
    assert [steps(store, run, "val/kl/1") for run in runs] == last
    assert [final == {} for final in finals] == [False, True, True]
    assert seen == [(3, 0), (3, 1), (2, 1), (1, 0), (1, 0)]
    (alone,) = record.record(plan(SMALL), tiny, "cpu", log_in(store, "alone", "Why?"))
    assert finals[0] == alone.metrics


def test_when_all_runs_are_dropped_training_ends(store, tiny):
    finals, runs = trained(store, tiny, WILD, WILD.replace(seed=2))
    assert finals == [{}, {}]
    assert [run.status for run in runs] == ["FAILED", "FAILED"]


ENDS = {
    "Ctrl-C": (KeyboardInterrupt(), "KILLED", "stopped by Ctrl-C"),
    "a signal": (KeyboardInterrupt("stopped by SIGTERM"), "KILLED", "stopped by SIGTERM"),
    "an exit": (SystemExit(3), "KILLED", "its process ended with exit code 3"),
    "a fault": (RuntimeError("tested"), "FAILED", "RuntimeError('tested')"),
}


@pytest.mark.parametrize(("error", "status", "reason"), ENDS.values(), ids=ENDS)
def test_whatever_interrupts_an_epoch_leaves_true_ends(store, tiny, error, status, reason):
    def on_epoch(current):
        if current.epoch == 3:
            raise error

    with pytest.raises(type(error)):
        trained(store, tiny, SMALL, WILD, on_epoch=on_epoch)
    first, second = store.runs("e")
    assert (first.status, first.tags["reason"]) == (status, reason)
    for name in ("val/mse", "val/kl/1"):
        assert steps(store, first, name) == [1, 2, 3]
    assert second.tags["reason"].startswith("diverged in epoch 1: ")


def test_an_error_before_training_ends_the_runs_that_were_started(store, tiny):
    start = log_in(store, "e", "Why?")

    def start_one(run):
        if run.key == KEYS[1]:
            raise RuntimeError("tested")
        return start(run)

    with pytest.raises(RuntimeError, match="tested"):
        record.record(plan(SMALL, SMALL), tiny, "cpu", start_one)
    (run,) = store.runs("e")
    assert (run.status, run.tags["reason"]) == ("FAILED", "RuntimeError('tested')")


def test_a_run_that_is_created_while_its_start_fails_is_closed(store, tiny):
    start = log_in(store, "e", "Why?")
    (run,) = plan(SMALL)
    with pytest.raises(Exception, match="exceeds"):
        start(run._replace(params={"x" * 10_000: "a name that MLflow refuses"}))
    (found,) = store.runs("e")
    assert found.status == "FAILED"
    assert found.tags["reason"]


# --- resumption ----------------------------------------------------------------------------------


def test_a_resumed_run_repeats_its_metrics_and_names_the_epoch(store, tiny, tmp_path):
    kept = Checkpoints(tmp_path / "checkpoints", every=2)

    def on_epoch(current):
        if current.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(store, tiny, SMALL, checkpoints=kept, on_epoch=on_epoch)
    again = [run._replace(key=KEYS[1]) for run in plan(SMALL)]
    (result,) = record.record(again, tiny, "cpu", log_in(store, "e", "Why?"), checkpoints=kept)
    stopped, run = store.runs("e")
    assert (stopped.status, run.status) == ("KILLED", "FINISHED")
    assert run.tags["resumed_from_epoch"] == "3"
    assert steps(store, run, "val/mse") == [1, 2, 3, 4, 5]
    assert steps(store, run, "train/kl/0") == [1, 2, 4, 5]
    (whole,) = record.record(plan(SMALL), tiny, "cpu", log_in(store, "whole", "Why?"))
    assert (result.metrics, result.history) == (whole.metrics, whole.history)
    pictures = {name.split("+timestamp")[0] for name in files(store, run, "images")}
    # Not of epoch 1, whose model is gone.
    drawn = {"reconstructions+step+0", "reconstructions+step+5", "prior_samples+step+5"}
    assert pictures == {f"images/{name}" for name in drawn}


# --- harness.tracking.train_and_evaluate ---------------------------------------------------------


def test_results_are_those_without_tracking_and_every_run_is_logged(tiny, tracking_uri):
    configs = [SMALL, SMALL.replace(epochs=2, seed=1), SMALL.replace(kl_weight=0.1)]
    options = {"experiment": "mine", "tracking_uri": tracking_uri, "device": "cpu"}
    found = harness.tracking.train_and_evaluate(configs, tiny, **options)
    plain = harness.train_and_evaluate(configs, tiny, device="cpu")
    for result, expected in zip(found, plain, strict=True):
        assert result.config == expected.config
        assert result.history == expected.history
        assert expected.metrics.items() <= result.metrics.items()
        weights = (r.model.state_dict().values() for r in (result, expected))
        assert all(map(torch.equal, *weights))
    runs = connect(tracking_uri).runs("mine", study="mine", role="run")
    assert [run.name for run in runs] == [
        "hidden=(16,), latent_size=2, batch_size=16, epochs=5 seed=0",
        "hidden=(16,), latent_size=2, batch_size=16, epochs=2 seed=1",
        "hidden=(16,), latent_size=2, kl_weight=0.1, batch_size=16, epochs=5 seed=0",
    ]
    assert [run.status for run in runs] == ["FINISHED"] * 3
    assert len({run.key for run in runs}) == 3
    assert runs[1].metrics["test/frechet"] == found[1].metrics["frechet"]


def test_one_configuration_gives_one_result(tiny, tracking_uri):
    options = {"experiment": "one", "tracking_uri": tracking_uri, "device": "cpu"}
    result = harness.tracking.train_and_evaluate(RunConfig(epochs=1), tiny, **options)
    assert result.config == RunConfig(epochs=1)
    (run,) = connect(tracking_uri).runs("one")
    assert run.name == "epochs=1 seed=0"
    assert run.metrics["test/frechet"] == result.metrics["frechet"]


def test_a_diverged_run_has_a_result_without_metrics(tiny, tracking_uri):
    options = {"experiment": "mine", "tracking_uri": tracking_uri, "device": "cpu"}
    first, second = harness.tracking.train_and_evaluate([SMALL, WILD], tiny, **options)
    assert first.metrics
    assert second.metrics == {}
    assert len(second.history) == 1


def test_what_cannot_be_trained_is_refused_before_anything_is_written(tiny, tmp_path):
    uri = f"sqlite:///{tmp_path}/new.db"
    large = SMALL.replace(batch_size=97)
    for configs, name in (([SMALL, large], "mine"), ([SMALL], "../mine")):
        with pytest.raises(UserError):
            harness.tracking.train_and_evaluate(configs, tiny, experiment=name, tracking_uri=uri)
    assert not (tmp_path / "new.db").exists()


# --- a toy that is no VAE ------------------------------------------------------------------------


def test_a_toy_is_trained_and_logged(store, tiny):
    slow, fast = (SMALL.replace(learning_rate=rate) for rate in (0.1, 0.9))
    parts = {**toy.PARTS, "objective": "val/mse"}
    finals, runs = trained(store, tiny, slow, fast, **parts)
    assert finals[0]["mse"] > finals[1]["mse"]
    assert [run.metrics["test/mse"] for run in runs] == [final["mse"] for final in finals]
    assert runs[0].metrics["best/epoch"] == 5
    assert [run.status for run in runs] == ["FINISHED"] * 2
    assert "model/weights.safetensors" in files(store, runs[0], "model")
