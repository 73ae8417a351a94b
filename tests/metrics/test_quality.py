"""The bundle that every tracked run logs at its end."""

import pytest
import torch

from harness import RunConfig, frechet, measure_quality, probe
from harness.latents import measure_latents
from harness.likelihood import SAMPLES, likelihood_metrics
from harness.vae import VAE, initial

INFORMATION = {"aggregate_gap", "mutual_information", "mutual_information_lower"}
LIKELIHOOD = {"neg_log_likelihood", "neg_log_likelihood_se", "effective_samples"} | {
    f"neg_log_likelihood/k{k}" for k in SAMPLES
}
OTHERS = {"frechet", "frechet_reconstructions", "frechet_floor", "feature_accuracy"} | {
    "probe_accuracy",
    "knn_accuracy",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


def test_each_run_has_its_own_numbers(tiny, folder):
    runs = [initial(RunConfig(latent_size=n, seed=n), tiny.image_shape) for n in (5, 2)]
    found = measure_quality(VAE(runs), tiny, folder)
    known = frechet.reference(tiny, folder)
    for run, metrics in zip(runs, found, strict=True):
        assert metrics.keys() == INFORMATION | LIKELIHOOD | OTHERS
        assert all(isinstance(value, float) for value in metrics.values())
        alone = VAE([run])
        expected = {name: float(v) for name, v in measure_latents(alone, tiny.test).items()}
        expected |= frechet.measure_images(alone, tiny, known)[0]
        expected |= likelihood_metrics(alone, tiny)[0]
        expected["probe_accuracy"] = probe.linear_probe_accuracy(run, tiny)
        expected["knn_accuracy"] = probe.knn_accuracy(run, tiny)
        assert metrics == pytest.approx(expected, rel=1e-6)


def test_the_numbers_are_the_same_bits_alone_in_company_and_on_any_number_of_cores(
    tiny, folder, threads
):
    runs = [initial(RunConfig(latent_size=n, seed=n), tiny.image_shape) for n in (5, 40, 2)]
    together = measure_quality(VAE(runs), tiny, folder)
    torch.set_num_threads(1)
    assert together == [measure_quality(run, tiny, folder)[0] for run in runs]


def test_a_single_run_is_a_stack_of_one(tiny, folder):
    run = initial(RunConfig(), tiny.image_shape)
    assert measure_quality(run, tiny, folder) == measure_quality(VAE([run]), tiny, folder)


def test_runs_on_binary_pixels_are_measured_on_them(tiny, folder):
    binary = {"likelihood": "bernoulli", "binarization": "threshold"}
    run = initial(RunConfig(**binary), tiny.image_shape)
    found = measure_quality(run, tiny, folder)
    assert found == measure_quality(run, tiny.binarized("threshold"), folder)
    grey = initial(RunConfig(), tiny.image_shape)
    floors = [each[0]["frechet_floor"] for each in (found, measure_quality(grey, tiny, folder))]
    assert floors[0] != floors[1]


def test_a_diverged_run_has_no_metrics_of_its_own_and_no_error(tiny, folder):
    run = initial(RunConfig(), tiny.image_shape)
    with torch.no_grad():
        run.encoder[0].weight.fill_(torch.nan)
        run.decoder[0].weight.fill_(torch.nan)
    (found,) = measure_quality(run, tiny, folder)
    assert found.keys() == {"frechet_floor", "feature_accuracy"}


def test_a_deterministic_latent_has_no_information_but_probes_and_images(tiny, folder):
    run = initial(RunConfig(latent="deterministic", kl_weight=0.0), tiny.image_shape)
    (found,) = measure_quality(run, tiny, folder)
    assert found.keys() == OTHERS
