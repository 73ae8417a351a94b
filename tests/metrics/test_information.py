"""What latents say: against closed forms, quadrature, and each other."""

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import norm

from harness import RunConfig, latents
from harness.evaluate import evaluate, measure
from harness.latents import aggregate_gap, measure_latents, mutual_information_lower
from harness.linear.pca import pca
from harness.linear.vae import LinearOptimum, linear_vae
from harness.objective import kl_per_latent, with_decoder_variance
from harness.vae import VAE, initial


def posteriors(stack=2, images=300, latent_size=3):
    mean = torch.randn(stack, images, latent_size, dtype=torch.float64)
    return mean, torch.randn(stack, images, latent_size, dtype=torch.float64) - 2


# --- the aggregate posterior ----------------------------------------------------------------------


def test_the_gap_is_the_kl_between_the_gaussians_of_these_moments():
    mean, log_variance = posteriors()
    mean[1] = mean[1] * 3 + 1
    for run, gap in enumerate(aggregate_gap(mean, log_variance)):
        covariance = np.cov(mean[run].T.numpy(), bias=True)
        covariance += np.diag(log_variance[run].exp().mean(0).numpy())
        q = torch.distributions.MultivariateNormal(mean[run].mean(0), torch.tensor(covariance))
        p = torch.distributions.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
        assert float(gap) == pytest.approx(float(torch.distributions.kl_divergence(q, p)))


def test_the_prior_itself_has_no_gap_and_a_collapsed_latent_adds_none():
    zeros = torch.zeros(1, 50, 4, dtype=torch.float64)
    assert float(aggregate_gap(zeros, zeros)) == 0
    mean, log_variance = posteriors()
    beside = torch.zeros(2, 300, 2, dtype=torch.float64)
    padded = aggregate_gap(torch.cat([mean, beside], -1), torch.cat([log_variance, beside], -1))
    torch.testing.assert_close(padded, aggregate_gap(mean, log_variance))


def test_the_gap_bounds_the_kl_of_the_aggregate_posterior_from_below():
    # Two far clusters on a line: no Gaussian, so the gap is well below the KL by quadrature.
    mean = torch.tensor([-2.0, 2.0]).reshape(1, 2, 1)
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
    arguments = [torch.tensor(v).reshape(1, -1, 1) for v in (mean, 2 * np.log(deviation), eps)]
    assert float(mutual_information_lower(*arguments)) == pytest.approx(exact, abs=2e-3)


def test_the_sampled_bound_saturates_at_the_logarithm_of_the_number_of_images():
    mean, log_variance = posteriors(images=250)
    far = mutual_information_lower(100 * mean, log_variance - 5, torch.randn_like(mean))
    assert far.tolist() == pytest.approx([math.log(250)] * 2, abs=1e-12)
    nothing = torch.zeros_like(mean)
    assert mutual_information_lower(nothing, nothing, mean).tolist() == pytest.approx([0, 0])


def test_variances_near_zero_leave_the_bound_finite():
    mean, log_variance = posteriors(images=250)
    bound = mutual_information_lower(mean, torch.full_like(log_variance, -60), mean)
    assert bound.tolist() == pytest.approx([math.log(250)] * 2)


def test_lower_and_upper_bound_enclose_the_information():
    mean, log_variance = posteriors(stack=3, images=1000, latent_size=2)
    mean *= torch.tensor([0.1, 0.5, 1.0]).reshape(3, 1, 1)
    rate = kl_per_latent(mean, log_variance).mean(1).sum(-1)
    draws = [mutual_information_lower(mean, log_variance, torch.randn_like(mean)) for _ in range(9)]
    lower = torch.stack(draws).mean(0)
    upper = latents.mutual_information(rate, aggregate_gap(mean, log_variance))
    assert (lower < upper).all()
    assert (upper <= rate).all()


@pytest.mark.parametrize("variance", [0.005, 0.05, 0.5])
def test_at_the_exact_linear_optimum_all_of_the_rate_is_information(data, variance):
    # Over the training images the aggregate posterior has mean 0 and covariance I.
    config = with_decoder_variance(RunConfig(model="linear", latent_size=10), variance, 64)
    found = measure_latents(VAE([linear_vae(config, data)]), data.train)
    assert float(found["aggregate_gap"]) == pytest.approx(0, abs=1e-6)
    rate = LinearOptimum(pca(data), 10, variance).rate
    assert float(found["mutual_information"]) == pytest.approx(rate, abs=1e-6)
    assert float(found["mutual_information_lower"]) < rate + 0.05


# --- a stack --------------------------------------------------------------------------------------


def test_a_run_has_the_same_numbers_alone_and_in_a_stack_of_other_sizes(data):
    configs = [RunConfig(latent_size=n, seed=s) for s, n in enumerate((5, 2, 9))]
    runs = [initial(config, data.image_shape).double() for config in configs]
    together = measure_latents(VAE(runs), data.test)
    for row, run in enumerate(runs):
        for name, value in measure_latents(VAE([run]), data.test).items():
            assert float(value) == pytest.approx(float(together[name][row]), abs=1e-9)


def test_the_information_and_the_gap_add_up_to_the_rate_of_the_evaluation(data):
    stack = VAE([initial(RunConfig(), data.image_shape).double()])
    noise = torch.zeros(1, len(data.test), 10, dtype=torch.float64)
    found, rate = measure_latents(stack, data.test), measure(stack, data.test, noise, 10)["rate"]
    both = found["aggregate_gap"] + found["mutual_information"]
    assert both.tolist() == pytest.approx(rate.tolist())


def test_a_deterministic_latent_has_none_of_it(data):
    run = initial(RunConfig(latent="deterministic", kl_weight=0.0), data.image_shape)
    assert measure_latents(VAE([run]), data.test) == {}
    assert "rate" not in evaluate(run, data)[0]
