"""Evidence on runs that are trained here: which runs it finds, and what it measures on them."""

from dataclasses import asdict, replace

import numpy as np
import pytest

import harness
from harness import RunConfig
from harness.linear.pca import pca
from harness.linear.vae import LinearOptimum
from harness.tracking.store import Run
from studies.ledger.claims import Runs, about, judge
from studies.ledger.evidence import Evidence
from studies.ledger.trained import batch_range, best_ratio, gain, loss, mean

SMALL = RunConfig(hidden=(16,), epochs=2)
WIDE = Runs("weight 0.1", SMALL.replace(kl_weight=0.1), 2)
NARROW = Runs("weight 0.01", SMALL.replace(kl_weight=0.01), 2)
BINARY = Runs(
    "binary", SMALL.replace(likelihood="bernoulli", binarization="stochastic", epochs=1), 1
)
ABSENT = Runs("absent", SMALL.replace(learning_rate=0.5), 1)


@pytest.fixture(scope="module")
def evidence(tiny) -> Evidence:
    """Train runs of three configurations, and record them as text, as MLflow does."""
    configs = [config for runs in (WIDE, NARROW, BINARY) for config in runs.configs]
    results = harness.train_and_evaluate(configs, tiny, device="cpu")
    trained = {f"id{i}": (result.config, result.model) for i, result in enumerate(results)}
    runs = [run(f"id{i}", r.config, tiny, r) for i, r in enumerate(results)]
    return Evidence(tiny, runs, trained.get)


def run(run_id, config, data, result=None, status="FINISHED", reason="") -> Run:
    settings = asdict(config) | {"dataset": data.name, "dataset_digest": data.digest}
    params = {name: str(value) for name, value in settings.items()}
    every = {} if result is None else result.metrics
    metrics = {k: v for k, v in every.items() if k.startswith(("val/", "test/"))}
    tags = {"reason": reason} if reason else {}
    return Run(run_id, f"run {run_id}", status, params, metrics, tags)


def test_a_run_is_found_by_its_settings_on_these_very_images(evidence, tiny):
    assert [run.run_id for run in evidence.finished(NARROW)] == ["id2", "id3"]
    assert evidence.find(ABSENT.config) is None
    elsewhere = replace(evidence, data=replace(tiny, digest="other"))
    assert elsewhere.find(NARROW.config) is None


def test_settings_that_a_stored_run_lacks_take_their_defaults(evidence):
    def without(run: Run, *names: str) -> Run:
        return run._replace(params={k: v for k, v in run.params.items() if k not in names})

    old = [without(run, "terms", "precision", "kl_cycles") for run in evidence.runs]
    old = [run._replace(params=run.params | {"padding": "none"}) for run in old]
    assert not replace(evidence, runs=old).missing((WIDE, NARROW, BINARY))
    other = [without(run, "hidden") for run in evidence.runs]  # the default is not 16
    assert replace(evidence, runs=other).missing((WIDE,))


def test_a_finished_run_counts_before_one_that_diverged_and_interrupted_ones_never(evidence, tiny):
    config = ABSENT.config
    lost = run("a", config, tiny, status="FAILED", reason="diverged in epoch 1")
    stopped = run("b", config, tiny, status="KILLED", reason="process ended")
    failed = run("c", config, tiny, status="FAILED", reason="RuntimeError()")
    done = run("d", config, tiny)
    for runs, missing in [
        ((stopped, failed), "'absent' did not finish"),
        ((stopped, lost), "'absent' diverged"),
        ((lost, done, run("e", config, tiny)), ""),
    ]:
        assert replace(evidence, runs=runs).missing((ABSENT,)) == missing
    assert replace(evidence, runs=(lost, done)).find(config) == done


def test_a_claim_without_runs_is_not_run_and_a_large_one_asks_for_a_gpu(evidence):
    claims = [
        about("here", "x", "1", 1e9, "none", loss, WIDE),
        about("nowhere", "x", "1", 1.0, "none", loss, ABSENT),
        about("far", "x", "1", 1.0, "none", gain, WIDE, replace(ABSENT, gpu=True)),
    ]
    here, nowhere, far = judge({"x": claims}, evidence)
    assert (here.verdict, here.note) == ("pass", "")
    assert (nowhere.obtained, nowhere.verdict) == ("", "not run")
    assert (far.verdict, far.note) == ("not run", "needs --full on a GPU")


def test_means_and_gains_are_over_seeds(evidence):
    wide, narrow = (
        np.array([run.metrics["test/neg_elbo"] for run in evidence.finished(runs)])
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
    assert batches.loss.min() <= low < mean(evidence.losses(WIDE)) < high <= batches.loss.max()


def test_a_likelihood_is_measured_on_binary_pixels(evidence):
    (found,) = evidence.neg_log_likelihoods(BINARY, samples=9)
    assert found == pytest.approx(64 * np.log(2), abs=4)  # almost untrained: 44.4 nats


def test_a_class_is_compared_with_the_mean_over_all(evidence):
    errors = [evidence.relative_error(WIDE, label) for label in range(10)]
    assert np.mean(errors) == pytest.approx(1, rel=1e-12)
