"""Evidence: the runs that it finds, and their measures."""

from dataclasses import asdict, replace

import numpy as np
import pytest

import harness
from harness import RunConfig
from harness.linear.pca import pca
from harness.linear.vae import LinearOptimum
from harness.tracking.store import Run
from studies.ledger.evidence import Evidence
from studies.ledger.references import (
    Claim,
    Runs,
    batch_range,
    best_ratio,
    gain,
    loss,
    relative_error,
)

SMALL = RunConfig(hidden=(16,), epochs=2)
WIDE = Runs("weight 0.1", SMALL.replace(kl_weight=0.1), 2)
NARROW = Runs("weight 0.01", SMALL.replace(kl_weight=0.01), 2)
BINARY = Runs(
    "binary", SMALL.replace(likelihood="bernoulli", binarization="stochastic", epochs=1), 1
)
ABSENT = Runs("absent", SMALL.replace(learning_rate=0.5), 1)


def seeds(runs: Runs) -> list[RunConfig]:
    return [runs.config.replace(seed=seed) for seed in range(runs.seeds)]


@pytest.fixture(scope="module")
def evidence(tiny) -> Evidence:
    """Train runs of three configurations, and record them as text, as MLflow does."""
    labels = [runs.label for runs in (WIDE, NARROW, BINARY) for _ in range(runs.seeds)]
    configs = [config for runs in (WIDE, NARROW, BINARY) for config in seeds(runs)]
    results = harness.train_and_evaluate(configs, tiny, device="cpu")
    trained = {f"id{i}": result for i, result in enumerate(results)}
    runs = [
        run(f"id{i}", label, result.config.seed, result)
        for i, (label, result) in enumerate(zip(labels, results, strict=True))
    ]
    return Evidence(tiny, runs, trained.get)


def run(run_id, label, seed=0, result=None, status="FINISHED") -> Run:
    every = {} if result is None else result.metrics
    metrics = {k: v for k, v in every.items() if k.startswith(("val/", "test/"))}
    settings = {} if result is None else asdict(result.config)
    params = {name: str(value) for name, value in (settings | {"seed": seed}).items()}
    return Run(run_id, f"run {run_id}", status, params, metrics, {"configuration": label})


def test_the_runs_of_a_configuration_are_found_by_its_label_in_the_order_of_their_seeds(evidence):
    backwards = replace(evidence, runs=evidence.runs[::-1])
    assert [run.run_id for run in backwards.found(NARROW)] == ["id2", "id3"]
    assert [run.run_id for run in evidence.found(replace(NARROW, seeds=1))] == ["id2"]
    assert evidence.found(ABSENT) == []


def test_runs_are_missing_unless_every_seed_has_finished(evidence):
    pair = replace(ABSENT, seeds=2)
    done, lost = run("a", "absent"), run("b", "absent", 1, status="FAILED")
    for runs, missing in [
        ((), "'absent' did not finish"),
        ((done,), "'absent' did not finish"),
        ((done, lost), "'absent' diverged"),
        ((done, run("c", "absent", 1)), ""),
    ]:
        assert replace(evidence, runs=runs).missing((pair,)) == missing


def test_a_claim_without_runs_is_not_run_and_a_large_one_needs_a_gpu(evidence):
    large = replace(ABSENT, gpu=True)
    claims = [
        Claim("here", "x", "1", 1e9, "none", loss, (WIDE,)),
        Claim("nowhere", "x", "1", 1.0, "none", loss, (ABSENT,)),
        Claim("far", "x", "1", 1.0, "none", gain, (WIDE, large)),
    ]
    rows = evidence.judge({"x": claims})
    assert rows["verdict"].tolist() == [
        *("pass", "not run: 'absent' did not finish", "not run: needs --full on a GPU")
    ]
    assert rows["obtained"].tolist()[1:] == ["", ""]


def test_means_and_gains_are_over_seeds(evidence):
    wide, narrow = (
        np.array([run.metrics["test/neg_elbo"] for run in evidence.found(runs)])
        for runs in (WIDE, NARROW)
    )
    assert evidence.mean(WIDE, "neg_elbo") == pytest.approx(wide.mean(), rel=1e-12)
    assert gain(evidence, NARROW, WIDE) == pytest.approx((wide - narrow).mean(), rel=1e-9)
    better = min((WIDE, NARROW), key=lambda runs: evidence.mean(runs, "val/neg_elbo"))
    expected = evidence.mean(better, "calibration_ratio")
    assert best_ratio(evidence, WIDE, NARROW) == expected


def test_the_gap_is_that_of_the_mean_batch_loss_to_the_exact_linear_model(evidence, tiny):
    batches = evidence.batches(WIDE)
    assert batches.loss.shape == batches.kl_term.shape == (2, len(tiny.train) // 32)
    variance = 0.1 / 2  # of the decoder, at weight 0.1 per pixel
    linear = LinearOptimum(pca(tiny), SMALL.latent_size, variance).loss
    gaps = evidence.gaps_to_linear(WIDE)
    assert gaps == pytest.approx(100 * (1 - batches.loss.mean(1) / linear), rel=1e-9)
    assert loss(evidence, WIDE) == pytest.approx(batches.loss.mean(), rel=1e-12)
    low, high = batch_range(evidence, WIDE, "loss")
    assert batches.loss.min() <= low < loss(evidence, WIDE) < high <= batches.loss.max()


def test_a_likelihood_is_measured_on_binary_pixels(evidence):
    found = evidence.neg_log_likelihood(BINARY, samples=9)
    assert found == pytest.approx(64 * np.log(2), abs=4)  # almost untrained: 44.4 nats


def test_a_class_is_compared_with_the_mean_over_all(evidence):
    runs = evidence.found(WIDE)
    errors = [
        np.mean([run.metrics[f"test/mse_class/{label}"] for run in runs]) for label in range(10)
    ]
    assert relative_error(evidence, WIDE) == pytest.approx(errors[8] / np.mean(errors), rel=1e-12)
