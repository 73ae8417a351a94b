"""Warm-up, free bits, learned variances and binary pixels: against their definitions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from harness.config import RunConfig, UserError
from harness.data.dataset import Dataset
from harness.linear.pca import pca
from harness.linear.vae import LinearOptimum, linear_metrics, matched_variance
from harness.metrics.evaluate import evaluate
from harness.models.files import load_model, save_model
from harness.models.vae import build
from harness.objective import decoder_variance, free_rate, kl_warmup, with_decoder_variance
from harness.training.engine import check_runs, train, train_and_evaluate

SMALL = RunConfig(hidden=(16, 12), epochs=2, batch_size=8, latent_size=3, learning_rate=3e-3)
BINARY = SMALL.replace(likelihood="bernoulli", binarization="stochastic")
DEQUANTIZED = SMALL.replace(likelihood="continuous_bernoulli", dequantize="uniform")


def finals(configs: list[RunConfig], data: Dataset) -> list[dict[str, float]]:
    return [r.metrics for r in train_and_evaluate(configs, data, "cpu", torch.float64)]


# --- warm-up --------------------------------------------------------------------------------------


def test_the_cyclical_warm_up_starts_again_in_every_cycle():
    cyclical = RunConfig(epochs=6, kl_warmup_epochs=2, kl_cycles=2)
    factors = torch.cat([kl_warmup(cyclical, epoch, 4) for epoch in range(1, 7)])
    cycle = [k / 8 for k in range(8)] + [1.0] * 4
    assert factors.tolist() == cycle * 2


# --- free bits ------------------------------------------------------------------------------------


def test_free_bits_charge_each_latent_at_least_the_floor_and_give_none_a_gradient_below():
    kl = torch.tensor([0.2, 3.0, 0.4], requires_grad=True)
    rate = free_rate(kl, torch.tensor(0.5))
    rate.backward()
    assert rate.item() == pytest.approx(0.5 + 3.0 + 0.5)
    assert kl.grad.tolist() == [0, 1, 0]


def test_free_bits_keep_latents_that_a_large_weight_would_collapse(tiny):
    heavy = SMALL.replace(kl_weight=50.0, epochs=30)
    without, kept = finals([heavy, heavy.replace(free_bits=0.5)], tiny)
    assert without["rate"] < 0.1
    assert kept["rate"] > 0.5


# --- decoder variance -----------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", ["optimal", "learned"])
def test_the_loss_of_a_sigma_vae_is_its_negative_elbo_per_pixel(tiny, sigma):
    metrics, *_ = finals([SMALL.replace(sigma=sigma)], tiny)
    variance = metrics["val/learned_variance"] if sigma == "learned" else metrics["val/mse"]
    distortion = (
        tiny.pixels / 2 * (math.log(2 * math.pi * variance) + metrics["val/mse"] / variance)
    )
    negative_elbo = distortion + metrics["val/rate"]
    assert metrics["val/loss"] * tiny.pixels == pytest.approx(negative_elbo, rel=1e-12)
    assert metrics["val/calibration_ratio"] == pytest.approx(variance / metrics["val/mse"])
    if sigma == "optimal":
        assert metrics["val/neg_elbo"] == pytest.approx(negative_elbo, rel=1e-12)


def test_beta_scales_the_variance_that_a_sigma_vae_is_calibrated_to(tiny):
    half, *_ = finals([SMALL.replace(sigma="optimal", kl_weight=0.5)], tiny)
    assert half["val/calibration_ratio"] == pytest.approx(0.5)


def test_learned_variances_find_the_error_that_is_left(tiny):
    config = SMALL.replace(sigma="learned", epochs=120, learning_rate=1e-2)
    *_, last = train([config], tiny, "cpu", torch.float64)
    assert last.train["mse"][0] < 0.9 * pca(tiny).likeliest_variance(0)
    assert last.train["learned_variance"][0] == pytest.approx(last.train["mse"][0], rel=0.1)


def test_learned_variances_survive_files_rows_and_stacks(tiny, tmp_path, parts):
    configs = [SMALL.replace(seed=s, sigma="learned", learning_rate=1e-2) for s in range(3)]
    for record in train(configs, tiny, "cpu", torch.float64):
        if record.epoch == 1:
            record.drop([1])
    *_, whole = train(configs, tiny, "cpu", torch.float64)
    expected, found = whole.model(2), record.model(1)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-9, atol=0)
    assert found.scale != tiny.pixel_variance
    save_model(configs[2], expected, tmp_path)
    config, loaded = load_model(tmp_path)
    assert loaded.log_decoder_variance == expected.log_decoder_variance
    assert evaluate([(config, loaded)], tiny) == evaluate([(configs[2], expected)], tiny)


def test_where_the_weight_sets_no_decoder_variance_none_is_named():
    for config in (SMALL.replace(sigma="learned"), BINARY):
        assert math.isnan(decoder_variance(config, 64))
        with pytest.raises(UserError, match="sets the decoder variance only with sigma='fixed'"):
            with_decoder_variance(config, 0.1, 64)


def test_the_linear_sigma_vae_is_ppca(data):
    # At beta = 1 the variance that fits itself is the maximum-likelihood one.
    known = pca(data)
    for size in (1, 5, 20):
        config = RunConfig(sigma="optimal", latent_size=size)
        matched = matched_variance(known, config, data.pixels)
        assert matched == pytest.approx(known.likeliest_variance(size), rel=1e-10)


def test_the_linear_sigma_vae_minimises_its_loss_at_any_beta(data):
    known, config = pca(data), RunConfig(sigma="optimal", latent_size=6, kl_weight=2.0)

    def loss(log_variance: float) -> float:
        best = LinearOptimum(known, 6, 2.0 * math.exp(log_variance))
        return best.distortion(math.exp(log_variance)) + 2.0 * best.rate

    found = minimize_scalar(loss, bracket=(-6, -2), tol=1e-12)
    expected = 2.0 * math.exp(found.x)
    assert matched_variance(known, config, data.pixels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"sigma": "optimal"}, {"free_bits": 0.1}, {"likelihood": "bernoulli"}],
    ids=lambda c: next(iter(c)),
)
def test_a_loss_without_a_linear_closed_form_has_no_gap(tiny, changes):
    metrics, *_ = finals([SMALL.replace(**changes)], tiny)
    assert "gap_to_linear" not in metrics
    assert ("linear/mse" in linear_metrics(SMALL.replace(**changes), tiny)) == (
        "likelihood" not in changes
    )


# --- binary pixels --------------------------------------------------------------------------------


def test_pixels_are_one_with_their_grey_value_as_probability(data):
    drawn = np.mean(
        [
            data.train.drawn("stochastic", np.random.default_rng(i)).images.double().numpy()
            for i in range(200)
        ],
        axis=0,
    )
    grey = data.train.pixels(slice(None), torch.float64).numpy()
    assert np.abs(drawn.mean(0) - grey.mean(0)).max() < 5 * 0.5 / math.sqrt(200 * len(grey))
    assert (drawn[grey == 0] == 0).all()
    assert (drawn[grey == 1] == 1).all()


def test_the_threshold_is_half_the_largest_value(data):
    binary = data.train.drawn("threshold")
    assert torch.equal(binary.images == 1, data.train.images >= 8)
    assert binary.largest == 1


def test_the_measured_pixels_are_the_same_for_everyone_and_binary_data_stay(data):
    first, again = data.drawn("stochastic"), data.drawn("stochastic")
    assert torch.equal(first.test.images, again.test.images)
    assert torch.equal(first.drawn("stochastic").val.images, first.val.images)
    assert torch.equal(first.drawn("threshold").val.images, first.val.images)
    assert data.drawn("none") is data
    assert first.digest == data.digest


def test_binary_data_have_an_exact_elbo_at_beta_one(tiny):
    metrics, *_ = finals([BINARY], tiny)
    assert metrics["neg_elbo"] == pytest.approx(metrics["loss"] * tiny.pixels, rel=1e-12)
    assert metrics["neg_elbo"] == pytest.approx(metrics["distortion"] + metrics["rate"])
    assert 0 < metrics["distortion"] < tiny.pixels * math.log(2) * 1.1
    assert "calibration_ratio" not in metrics


def test_grey_cross_entropy_is_a_loss_and_no_likelihood(tiny):
    metrics, *_ = finals([SMALL.replace(likelihood="bernoulli")], tiny)
    assert {"loss", "mse", "rate"} <= set(metrics)
    assert not {"distortion", "neg_elbo", "calibration_ratio"} & set(metrics)


@pytest.mark.parametrize("base", [BINARY, DEQUANTIZED], ids=["binary", "dequantized"])
def test_pixels_are_drawn_anew_every_epoch_for_every_seed_alone_or_in_a_stack(tiny, parts, base):
    configs = [base.replace(seed=1), base.replace(seed=0), base.replace(kl_weight=0.1)]
    stacked = finals(configs, tiny)
    for config, metrics in zip(configs, stacked, strict=True):
        assert metrics == pytest.approx(finals([config], tiny)[0], rel=1e-9)
    # One epoch of fixed pixels is another training than one of drawn pixels.
    fixed = replace(tiny, train=tiny.drawn(base.drawing).train)
    assert finals([configs[0]], fixed)[0]["loss"] != pytest.approx(stacked[0]["loss"], rel=1e-6)


# --- dequantised pixels ---------------------------------------------------------------------------


def test_a_dequantized_pixel_is_uniform_within_its_grey_level(data):
    first, again = data.drawn("uniform"), data.drawn("uniform")
    for part in ("train", "val", "test"):
        grey, drawn = getattr(data, part), getattr(first, part)
        x = drawn.pixels(slice(None), torch.float64)
        assert torch.equal((x * 17 - 1e-6).floor().clamp(min=0).to(torch.uint8), grey.images)
        u = x * 17 - grey.images
        assert u.min() >= 0
        assert u.max() <= 1 + 1e-6
        assert u.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * u.numel()))
        assert torch.equal(drawn.images, getattr(again, part).images)
    assert torch.equal(first.drawn("uniform").val.images, first.val.images)
    assert (first.train.largest, first.train.levels) == (1, 17)


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace", "continuous_bernoulli"])
def test_bits_per_dim_are_those_of_the_grey_levels(tiny, likelihood):
    config = DEQUANTIZED.replace(likelihood=likelihood)
    metrics, *_ = finals([config], tiny)
    nats = metrics["neg_elbo"] / (tiny.pixels * math.log(2))
    assert metrics["bits_per_dim"] == pytest.approx(nats + math.log2(17), rel=1e-12)
    assert "bits_per_dim" not in finals([config.replace(dequantize="none")], tiny)[0]


def test_the_uniform_density_needs_the_bits_of_a_grey_level(tiny):
    # Logits 0 are the density 1 on [0, 1], and posteriors that are the prior cost nothing.
    model = build(DEQUANTIZED, tiny.image_shape, 16)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    (metrics,) = evaluate([(DEQUANTIZED, model)], tiny)
    assert metrics["test/neg_elbo"] == pytest.approx(0, abs=1e-6)
    assert metrics["test/bits_per_dim"] == pytest.approx(math.log2(17), rel=1e-9)


def test_bits_per_dim_of_binary_pixels_are_nats_in_bits(tiny):
    metrics, *_ = finals([BINARY], tiny)
    bits = metrics["neg_elbo"] / (tiny.pixels * math.log(2))
    assert metrics["bits_per_dim"] == pytest.approx(bits, rel=1e-12)


def test_dequantization_is_refused_where_there_are_no_grey_levels_or_no_density():
    with pytest.raises(UserError, match="it needs a density"):
        DEQUANTIZED.replace(likelihood="bernoulli")
    table = Dataset.from_tensors("rows", np.random.default_rng(0).normal(size=(40, 3)))
    config = SMALL.replace(dequantize="uniform", batch_size=4)
    with pytest.raises(UserError, match="rows has no grey levels"):
        check_runs([config], table)
