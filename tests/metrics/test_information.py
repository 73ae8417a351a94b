"""Information in the latents: against closed forms, quadrature, and each other."""

import math

import numpy as np
import pytest
import torch
from exact import linear_vae
from scipy.special import ndtri
from scipy.stats import norm

from harness.config import RunConfig
from harness.linear.pca import pca
from harness.linear.vae import LinearOptimum
from harness.metrics.evaluate import coefficients, measure
from harness.metrics.information import (
    aggregate_gap,
    measure_information,
    mutual_information_lower,
)
from harness.models.vae import build
from harness.objective import kl_per_latent, with_decoder_variance


def posteriors(images=300, latent_size=3):
    mean = torch.randn(images, latent_size, dtype=torch.float64)
    return mean, torch.randn(images, latent_size, dtype=torch.float64) - 2


# --- the aggregate posterior ----------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "shift", "latents"), [(1, 0, 3), (3, 1, 3), (2, -1, 1)])
def test_the_gap_is_the_kl_between_the_gaussians_of_these_moments(scale, shift, latents):
    mean, log_variance = posteriors(latent_size=latents)
    mean = mean * scale + shift
    covariance = np.cov(mean.T.numpy(), bias=True).reshape(latents, latents)
    covariance += np.diag(log_variance.exp().mean(0).numpy())
    q = torch.distributions.MultivariateNormal(mean.mean(0), torch.tensor(covariance))
    zero, one = torch.zeros(latents).double(), torch.eye(latents).double()
    p = torch.distributions.MultivariateNormal(zero, one)
    expected = float(torch.distributions.kl_divergence(q, p))
    assert float(aggregate_gap(mean, log_variance)) == pytest.approx(expected)


def test_the_prior_itself_has_no_gap_and_a_collapsed_latent_adds_none():
    zeros = torch.zeros(50, 4, dtype=torch.float64)
    assert float(aggregate_gap(zeros, zeros)) == 0
    mean, log_variance = posteriors()
    beside = torch.zeros(300, 2, dtype=torch.float64)
    more = aggregate_gap(torch.cat([mean, beside], -1), torch.cat([log_variance, beside], -1))
    torch.testing.assert_close(more, aggregate_gap(mean, log_variance))


def test_the_gap_bounds_the_kl_of_the_aggregate_posterior_from_below():
    # Two far clusters on a line: no Gaussian, so the gap is well below the KL by quadrature.
    mean = torch.tensor([-2.0, 2.0]).reshape(2, 1)
    log_variance = torch.full_like(mean, -2)
    z = np.linspace(-8, 8, 20_001)
    q = norm.pdf(z[:, None], mean.flatten(), math.exp(-1)).mean(1)
    exact = np.trapezoid(q * (np.log(q) - norm.logpdf(z)), z)
    assert 0 < float(aggregate_gap(mean, log_variance)) < exact - 0.1


# --- the information ------------------------------------------------------------------------------


def test_the_sampled_bound_equals_quadrature():
    # Four posteriors, each of a quarter of the images, with evenly spread quantiles as noise.
    centres, deviations = np.array([-1.0, 0.0, 0.3, 2.0]), np.array([0.2, 1.0, 0.1, 0.5])
    each = 500
    eps = np.tile(ndtri((np.arange(each) + 0.5) / each), 4)
    mean, deviation = np.repeat(centres, each), np.repeat(deviations, each)
    z = np.linspace(-6, 6, 40_001)
    q = norm.pdf(z[:, None], centres, deviations)
    exact = np.trapezoid(
        (q * (np.log(q + 1e-300) - np.log(q.mean(1) + 1e-300)[:, None])).mean(1), z
    )
    arguments = [torch.tensor(v).reshape(-1, 1) for v in (mean, 2 * np.log(deviation), eps)]
    assert float(mutual_information_lower(*arguments)[0]) == pytest.approx(exact, abs=2e-3)


def test_the_sampled_bound_saturates_at_the_logarithm_of_the_number_of_images():
    mean, log_variance = posteriors(images=250)
    far = mutual_information_lower(100 * mean, log_variance - 5, torch.randn_like(mean))
    assert list(map(float, far)) == pytest.approx([math.log(250), 0], abs=1e-12)
    nothing = torch.zeros_like(mean)
    none = mutual_information_lower(nothing, nothing, mean)
    assert list(map(float, none)) == pytest.approx([0, 0], abs=1e-12)


def test_variances_near_zero_leave_the_bound_finite():
    mean, log_variance = posteriors(images=250)
    bound, _ = mutual_information_lower(mean, torch.full_like(log_variance, -60), mean)
    assert float(bound) == pytest.approx(math.log(250))


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0])
def test_lower_and_upper_bound_enclose_the_information(scale):
    mean, log_variance = posteriors(images=1000, latent_size=2)
    mean *= scale
    rate = kl_per_latent(mean, log_variance).mean(0).sum()
    noise = (torch.randn_like(mean) for _ in range(9))
    draws = [mutual_information_lower(mean, log_variance, eps)[0] for eps in noise]
    upper = rate - aggregate_gap(mean, log_variance)
    assert torch.stack(draws).mean() < upper <= rate


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_standard_error_of_the_sampled_bound_is_its_spread_over_sets_of_images(scale):
    draws = []
    for _ in range(200):
        mean, log_variance = posteriors(images=150, latent_size=2)
        eps = torch.randn_like(mean)
        draws.append(mutual_information_lower(scale * mean, log_variance, eps))
    bounds, errors = map(torch.stack, zip(*draws, strict=True))
    assert float(errors.mean()) == pytest.approx(float(bounds.std()), rel=0.2)


def test_the_standard_error_is_that_of_a_jackknife():
    mean, log_variance = posteriors(images=200, latent_size=2)
    log_variance += 2  # wide: no image is most of its own average
    eps, rest = torch.randn_like(mean), torch.eye(200) == 0
    left = torch.stack(
        [mutual_information_lower(mean[k], log_variance[k], eps[k])[0] for k in rest]
    )
    jackknife = math.sqrt(199 * float(left.var(correction=0)))
    error = mutual_information_lower(mean, log_variance, eps)[1]
    assert float(error) == pytest.approx(jackknife, rel=0.05)


@pytest.mark.parametrize("variance", [0.005, 0.05, 0.5])
def test_at_the_exact_linear_optimum_all_of_the_rate_is_information(data, variance):
    # Over the training images the aggregate posterior has mean 0 and covariance I.
    config = with_decoder_variance(RunConfig(model="linear", latent_size=10), variance, 64)
    found = measure_information(config, linear_vae(config, data), data.train)
    assert float(found["aggregate_gap"]) == pytest.approx(0, abs=1e-6)
    rate = LinearOptimum(pca(data), 10, variance).rate
    assert float(found["mutual_information"]) == pytest.approx(rate, abs=1e-6)
    assert float(found["mutual_information_lower"]) < rate + 0.05


# --- a run ----------------------------------------------------------------------------------------


def test_the_information_and_the_gap_add_up_to_the_rate_of_the_evaluation(data):
    config = RunConfig()
    model = build(config, data.image_shape, data.train.largest).double()
    noise = torch.zeros(len(data.test), 10, dtype=torch.float64)
    found = measure_information(config, model, data.test)
    known = coefficients(config, data.pixels, model.device)
    rate = measure(config, model, data.test, 10, noise, known)["rate"]
    both = found["aggregate_gap"] + found["mutual_information"]
    assert float(both) == pytest.approx(float(rate))


def test_a_deterministic_latent_has_its_spread_alone(data):
    config = RunConfig(latent="deterministic", kl_weight=0.0)
    model = build(config, data.image_shape)
    found = measure_information(config, model, data.test)
    z = model.encode(data.test.images / 16).mean.double()
    assert found == {"latent_std": pytest.approx(z.std(correction=0).item(), rel=1e-6)}


# --- spread ---------------------------------------------------------------------------------------


def test_the_spread_is_that_of_samples_of_all_posteriors_together(data):
    config = RunConfig(latent_size=3, seed=1)
    model = build(config, data.image_shape)
    found = measure_information(config, model, data.test)
    mean, log_variance = model.encode(data.test.images / 16)
    std = (log_variance / 2).exp()
    samples = mean + std * torch.randn(500, *mean.shape)
    assert float(found["latent_std"]) == pytest.approx(samples.std().item(), rel=5e-3)
    assert float(found["posterior_sigma"]) == pytest.approx(std.mean().item(), rel=1e-6)
