"""The bundle that every tracked run logs at its end."""

import pytest
import torch

from harness.config import RunConfig
from harness.metrics import frechet
from harness.metrics.evaluate import evaluate
from harness.metrics.information import measure_information
from harness.metrics.likelihood import SAMPLES, likelihood_metrics
from harness.metrics.probes import probe_metrics
from harness.metrics.quality import measure_quality
from harness.models.vae import VAE, build

INFORMATION = {"aggregate_gap", "mutual_information", "mutual_information_lower"}
INFORMATION |= {"mutual_information_lower_se", "latent_std", "posterior_sigma"}
LIKELIHOOD = {
    *("neg_log_likelihood", "neg_log_likelihood_se", "neg_log_likelihood_slack"),
    *("effective_samples", "proposal_inflation"),
    *(f"neg_log_likelihood/k{k}" for k in SAMPLES),
}
OTHERS = {"frechet", "frechet_reconstructions", "frechet_floor", "feature_accuracy"} | {
    "probe_accuracy",
    "knn_accuracy",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


def untrained(**settings) -> tuple[RunConfig, VAE]:
    config = RunConfig(**settings)
    return config, build(config, (1, 8, 8), largest=16)


def test_no_runs_have_no_numbers(tiny):
    assert measure_quality([], tiny) == evaluate([], tiny) == []


def test_each_run_has_its_own_numbers(tiny, folder):
    runs = [untrained(latent_size=n, seed=n) for n in (5, 2)]
    known = frechet.reference(tiny, folder)
    for run, metrics in zip(runs, measure_quality(runs, tiny, folder), strict=True):
        assert metrics.keys() == INFORMATION | LIKELIHOOD | OTHERS
        assert all(isinstance(value, float) for value in metrics.values())
        expected = {name: float(v) for name, v in measure_information(*run, tiny.test).items()}
        expected |= frechet.measure_images(*run, tiny, known)
        expected |= likelihood_metrics(*run, tiny)
        expected |= probe_metrics(run[1], tiny)
        assert metrics == pytest.approx(expected, rel=1e-6)


def test_the_numbers_are_the_same_bits_alone_in_company_and_on_any_number_of_cores(
    tiny, folder, threads
):
    binary = {"likelihood": "bernoulli", "binarization": "threshold"}
    runs = [untrained(latent_size=n, seed=n) for n in (5, 40, 2)] + [untrained(**binary)]
    together = measure_quality(runs, tiny, folder)
    torch.set_num_threads(1)
    assert together == [measure_quality([run], tiny, folder)[0] for run in runs]


def test_runs_on_binary_pixels_are_measured_on_them(tiny, folder):
    run = untrained(likelihood="bernoulli", binarization="threshold")
    grey = untrained()
    both = measure_quality([run, grey], tiny, folder)
    assert [both[0]] == measure_quality([run], tiny.drawn("threshold"), folder)
    assert both[0]["frechet_floor"] != both[1]["frechet_floor"]


def test_a_diverged_run_has_no_metrics_of_its_own_and_no_error(tiny, folder):
    config, model = untrained()
    with torch.no_grad():
        model.encoder[1].weight.fill_(torch.nan)
        model.decoder[0].weight.fill_(torch.nan)
    (found,) = measure_quality([(config, model)], tiny, folder)
    assert found.keys() == {"frechet_floor", "feature_accuracy"}


def test_a_deterministic_latent_has_no_information_but_probes_and_images(tiny, folder):
    run = untrained(latent="deterministic", kl_weight=0.0)
    (found,) = measure_quality([run], tiny, folder)
    assert found.keys() == OTHERS | {"latent_std"}
