"""The importance-weighted bound against exact densities, quadrature and its own definition."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import gaussian
from exact import linear_vae
from scipy.special import logsumexp
from scipy.stats import bernoulli, multivariate_normal, norm
from torch.nn.functional import logsigmoid

from harness.config import RunConfig
from harness.data.dataset import Dataset, Split
from harness.data.load import load_dataset
from harness.metrics import evaluate as evaluation
from harness.metrics import likelihood
from harness.metrics.evaluate import coefficients, evaluate, measure, posteriors
from harness.metrics.likelihood import (
    amortization_gap,
    centred,
    importance_bounds,
    inflated,
    likelihood_metrics,
    refit_posterior,
)
from harness.models.vae import VAE, build
from harness.objective import Posterior, decoder_variance, with_decoder_variance
from harness.streams import noise
from harness.training.engine import train

SMALL = RunConfig(hidden=(16, 12), kl_weight=0.05)
VARIANCE = torch.tensor(0.05, dtype=torch.float64)
BINARY = {"likelihood": "bernoulli", "binarization": "threshold"}
SETTINGS = {
    "gaussian": {},
    "relu": {"head": "relu"},
    "linear": {"model": "linear"},
    "bernoulli": BINARY,
    "linear bernoulli": {"model": "linear", **BINARY},
}
every_kind = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def untrained(**settings) -> tuple[RunConfig, VAE]:
    """Return a run whose posterior depends on the image."""
    config = SMALL.replace(latent_size=5, **settings)
    model = build(config, (1, 8, 8), largest=16).double()
    with torch.no_grad():
        model.encoder[-1].weight *= 5
    return config, model


@pytest.fixture(scope="module")
def trained() -> list[tuple[RunConfig, VAE]]:
    """Return runs of 1, 2 and 6 latents, trained on digits."""
    base = RunConfig(hidden=(32,), kl_weight=0.05, learning_rate=1e-2, batch_size=128, epochs=12)
    configs = [base.replace(latent_size=size, seed=size) for size in (1, 2, 6)]
    *_, last = train(configs, load_dataset("digits"), device="cpu", dtype=torch.float64)
    return [(config, last.model(row)) for row, config in enumerate(configs)]


# --- the definition -------------------------------------------------------------------------------


def weights_by_hand(
    config: RunConfig, model: VAE, split: Split, variance: float, count: int
) -> np.ndarray:
    """Return log p(x|z_j) + log p(z_j) - log q(z_j|x), shape (count, N), with SciPy's densities."""
    x = split.pixels(slice(None), torch.float64)
    q, log_weights = model.encode(x), []
    mean, deviation = q.mean.detach().numpy(), (q.log_variance / 2).exp().detach().numpy()
    for j in range(1, count + 1):
        eps = noise(config.seed, "likelihood", len(split), config.latent_size, j).numpy()
        z = mean + deviation * eps
        y = model.decode(torch.from_numpy(z)).flatten(1).detach().numpy()
        log_weights.append(
            (
                bernoulli.logpmf(x.numpy(), y)
                if config.likelihood == "bernoulli"
                else norm.logpdf(x.numpy(), y, math.sqrt(variance))
            ).sum(1)
            + norm.logpdf(z).sum(1)
            - norm.logpdf(z, mean, deviation).sum(1)
        )
    return np.array(log_weights)


@every_kind
def test_the_bound_is_the_logarithm_of_the_mean_weight(tiny, settings):
    config, model = untrained(**settings)
    split = tiny.drawn(config.binarization).test
    found = importance_bounds(config, model, split, VARIANCE, samples=(1, 3, 20))
    assert list(found.bounds) == [1, 3, 20]
    log_w = weights_by_hand(config, model, split, float(VARIANCE), 20)
    for k, bound in found.bounds.items():
        expected = logsumexp(log_w[:k], axis=0) - math.log(k)
        assert bound.tolist() == pytest.approx(expected.tolist(), rel=1e-10)
    w = np.exp(log_w - log_w.max(0))
    effective = np.square(w.sum(0)) / np.square(w).sum(0)
    assert found.effective_samples.tolist() == pytest.approx(effective.tolist(), rel=1e-9)


def test_one_sample_gives_the_elbo_up_to_the_sampled_rate(trained, data):
    # With the noise of sample 1 the distortion is the same, and what is left is KL by sampling
    # against KL in closed form; repeated images have noise of their own.
    split = repeated(data.test, 10)
    for config, model in trained:
        eps = noise(config.seed, "likelihood", len(split), config.latent_size, 1).double()
        known = coefficients(config, data.pixels, model.device)
        elbo = -measure(config, model, split, 10, eps, known, variance=VARIANCE)["neg_elbo"]
        bound = importance_bounds(config, model, split, VARIANCE, samples=(1,)).bounds[1].mean()
        q = model.encode(split.images)
        # Var[(eps^2 - z^2) / 2] with z = m + s eps is ((1 - s^2)^2 + 2 m^2 s^2) / 2 per latent.
        s2 = q.log_variance.exp()
        error = ((1 - s2).square() + 2 * q.mean.square() * s2).sum(-1).mean() / 2
        error = (error / len(split)).sqrt()
        assert (bound - elbo).abs() < 4 * error
        assert error < 0.06


def repeated(split: Split, times: int) -> Split:
    images, labels = split.images.repeat(times, 1), split.labels.repeat(times)
    return replace(split, images=images, labels=labels)


def test_more_samples_give_a_tighter_bound(trained, data):
    for config, model in trained:
        found = importance_bounds(config, model, data.test, scalar(0.01)).bounds
        for fewer, more in ((1, 8), (8, 64), (64, 512)):
            gain = found[more] - found[fewer]
            assert gain.mean() > 0
            if config.latent_size == 6:
                assert gain.mean() > 4 * gain.std() / math.sqrt(len(data.test))


# --- exact densities ------------------------------------------------------------------------------


def log_density(config: RunConfig, data: Dataset, x: np.ndarray) -> np.ndarray:
    """Return pPCA's log p(x) of each image: a Gaussian whose small eigenvalues are all s2."""
    train = data.train.images.numpy() / data.train.largest
    variance = decoder_variance(config, data.pixels)
    values, vectors = np.linalg.eigh(np.cov(train.T, bias=True))
    discarded = np.arange(data.pixels)[::-1] >= config.latent_size
    values = np.where(discarded, variance, np.maximum(values, variance))
    covariance = (vectors * values) @ vectors.T
    return multivariate_normal(train.mean(0), covariance).logpdf(x)


DATA = {"digits": load_dataset, "gaussian": gaussian}


@pytest.mark.parametrize(
    ("name", "variance", "latents"),
    [
        ("digits", 0.01, 10),
        ("digits", 0.3, 10),
        ("digits", 2.0, 3),
        ("gaussian", 0.1, 3),
        ("gaussian", 0.02, 8),
    ],
    ids=["active", "some collapsed", "all collapsed", "gaussian", "gaussian, full covariance"],
)
def test_at_the_linear_optimum_every_sample_gives_the_exact_density(name, variance, latents):
    data = DATA[name]()
    base = RunConfig(model="linear", latent_size=latents)
    config = with_decoder_variance(base, variance, data.pixels)
    model, given = linear_vae(config, data), scalar(variance)
    found = importance_bounds(config, model, data.test, given, samples=(1, 10, 100))
    exact = log_density(config, data, data.test.images.numpy() / data.test.largest)
    for bound in found.bounds.values():
        assert bound.tolist() == pytest.approx(exact.tolist(), rel=1e-8, abs=1e-8)
    # Without variance: each of the 100 weights is the same.
    assert found.effective_samples.tolist() == pytest.approx([100.0] * len(exact), rel=1e-9)


def test_away_from_the_optimum_the_bound_is_below_the_exact_density(data):
    # Else the test above could hold for any encoder.
    config = with_decoder_variance(RunConfig(model="linear"), 0.05, data.pixels)
    model = linear_vae(config, data)
    exact = log_density(config, data, data.test.images.numpy() / 16).mean()
    with torch.no_grad():
        model.encoder[1].weight *= 0.7
        model.encoder[1].bias *= 0.7
    found = importance_bounds(config, model, data.test, scalar(0.05), samples=(1, 10, 100))
    means = [bound.mean().item() for bound in found.bounds.values()]
    assert means[0] < means[1] < means[2] < exact
    assert means[0] < exact - 3
    assert found.effective_samples.mean() < 20


# --- quadrature -----------------------------------------------------------------------------------


def plane(latents: int, step: float) -> torch.Tensor:
    """Return the points of a grid over [-8, 8]^L, shape (points, L)."""
    axis = torch.arange(-8, 8 + step / 2, step, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * latents).view(-1, latents)


def log_integral(log_p_image: torch.Tensor, z: torch.Tensor, step: float) -> torch.Tensor:
    """Return log of the integral of p(x|z) N(z; 0, I) over a grid, for log p(x|z) (points, N)."""
    prior = -(z.square() + math.log(2 * math.pi)).sum(1, keepdim=True) / 2
    return (log_p_image + prior).logsumexp(0) + z.shape[1] * math.log(step)


@torch.no_grad()
def gaussian_integral(model: VAE, x: torch.Tensor, step: float) -> torch.Tensor:
    """Return log p(x) of images (N, D) for a Gaussian decoder of variance 0.2."""
    z = plane(model.latent_size, step)
    y = model.decode(z).flatten(1)
    error = torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    return log_integral(-(error / 0.2 + x.shape[1] * math.log(2 * math.pi * 0.2)) / 2, z, step)


@torch.no_grad()
def bernoulli_integral(model: VAE, x: torch.Tensor, step: float) -> torch.Tensor:
    """Return log p(x) of binary images (N, D) for a Bernoulli decoder."""
    z = plane(model.latent_size, step)
    logits = model.decoder(z).flatten(1)
    return log_integral(logsigmoid(logits) @ x.T + logsigmoid(-logits) @ (1 - x).T, z, step)


INTEGRALS = {"gaussian": gaussian_integral, "bernoulli": bernoulli_integral}


@pytest.mark.parametrize(("latents", "step"), [(1, 0.004), (2, 0.04)])
@pytest.mark.parametrize("likelihood", INTEGRALS)
def test_many_samples_reach_the_integral_over_the_latents(data, likelihood, latents, step):
    config = SMALL.replace(latent_size=latents, **(BINARY if likelihood == "bernoulli" else {}))
    model = lively(config)
    split = data.drawn(config.binarization).test.head(12)
    x = split.pixels(slice(None), torch.float64)
    exact, coarse = (INTEGRALS[likelihood](model, x, h) for h in (step, 2 * step))
    torch.testing.assert_close(exact, coarse, rtol=0, atol=1e-3)
    found = importance_bounds(config, model, split, scalar(0.2), samples=(1, 8000))
    # Image by image: the relative variance of the mean weight is 1/ESS - 1/k.
    error = (1 / found.effective_samples - 1 / 8000).sqrt()
    z = (found.bounds[8000] - exact) / error
    assert error.max() < 0.05
    assert z.abs().max() < 4
    assert z.mean().abs() < 4 / math.sqrt(len(z))
    assert found.bounds[1].mean() < exact.mean() - 1


@torch.no_grad()
def lively(config: RunConfig) -> VAE:
    """Return a model whose decoder varies with z and whose posterior is wide.

    The bound of many samples is log p(x) for any posterior that leaves out no mode of p(z|x).
    """
    model, size = build(config, (1, 8, 8), largest=16).double(), config.latent_size
    for layer in model.decoder[:-1:2]:
        layer.weight *= 2
    head = model.encoder[-1]
    head.weight[size:] = 0
    head.bias[size:] = math.log(1.5)
    return model


# --- no block, no other image and no precision matters --------------------------------------------


ROW = 64 * 8
"""Bytes of decoder output for one image and sample of `untrained`."""


@pytest.mark.parametrize("rows", [0, 1, 7, 50, 130, 10_000])
def test_the_bound_on_memory_is_kept_and_changes_nothing(tiny, monkeypatch, rows):
    config, model = untrained()
    expected = importance_bounds(config, model, tiny.test, VARIANCE, samples=(1, 8, 20))
    monkeypatch.setitem(likelihood.OUTPUT_BYTES, "cpu", ROW * rows + 5)
    seen = []
    model.decoder.register_forward_hook(lambda _module, _inputs, y: seen.append(len(y)))
    found = importance_bounds(config, model, tiny.test, VARIANCE, samples=(1, 8, 20))
    for k, bound in found.bounds.items():
        torch.testing.assert_close(bound, expected.bounds[k], rtol=1e-12, atol=1e-12)
    assert max(seen) <= max(1, rows)
    assert sum(seen) == 20 * len(tiny.test)


def test_an_images_bound_depends_on_no_other_image_and_no_larger_number_of_samples(tiny):
    config, model = untrained()
    every = importance_bounds(config, model, tiny.test, VARIANCE, samples=(1, 8, 20))
    first = importance_bounds(config, model, tiny.test.head(7), VARIANCE, samples=(8, 1))
    for k in (1, 8):
        torch.testing.assert_close(first.bounds[k], every.bounds[k][:7], rtol=1e-12, atol=0)


def test_single_precision_is_as_good_as_the_decoder(trained, tiny):
    for config, model in trained:
        exact = importance_bounds(config, model, tiny.test, VARIANCE).bounds[512]
        single = copy.deepcopy(model).float()
        found = importance_bounds(config, single, tiny.test, VARIANCE).bounds[512]
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-3)


@pytest.mark.gpu
@every_kind
def test_a_gpu_gives_what_the_cpu_gives(tiny, settings):
    config, model = untrained(**settings)
    split = tiny.drawn(config.binarization).test
    expected = importance_bounds(config, model, split, VARIANCE, samples=(8,)).bounds[8]
    split, variance = split.to(torch.device("cuda")), VARIANCE.cuda()
    found = importance_bounds(config, model.cuda(), split, variance, samples=(8,)).bounds[8]
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)


# --- the proposal ---------------------------------------------------------------------------------


def linear(data: Dataset, variance: float) -> tuple[RunConfig, VAE]:
    config = with_decoder_variance(RunConfig(model="linear"), variance, data.pixels)
    return config, linear_vae(config, data)


def shifted(q: Posterior, mean: float, factor: float) -> Posterior:
    """Return posteriors with means moved by so many deviations, and variances times a factor."""
    signs = 1 - 2 * (torch.arange(q.mean.shape[1]) % 2)
    moved = q.mean + mean * signs * (q.log_variance / 2).exp()
    return Posterior(moved, q.log_variance + math.log(factor))


@torch.no_grad()
def spoilt(model: VAE, mean: float, factor: float) -> VAE:
    """Return a linear VAE whose encoder's means and variances are those times a factor."""
    model = copy.deepcopy(model)
    half = model.latent_size
    model.encoder[1].weight[:half] *= mean
    model.encoder[1].bias[:half] *= mean
    model.encoder[1].bias[half:] += math.log(factor)
    return model


def divergence(q: Posterior, p: Posterior) -> torch.Tensor:
    """Return KL(q || p) of each image."""
    normal = torch.distributions.Normal
    both = [normal(part.mean, (part.log_variance / 2).exp()) for part in (q, p)]
    return torch.distributions.kl_divergence(*both).sum(-1)


@pytest.mark.parametrize("factor", [1.0, 2.0, 16.0])
def test_an_inflated_posterior_is_that_of_a_larger_decoder_variance(data, factor):
    model = linear(data, 0.1)[1]
    q = posteriors(model, data.test)
    gram = (model.decoder[0].weight.T @ model.decoder[0].weight).diagonal().detach()
    expected = 1 / (1 + gram / (0.1 * factor))  # 1 / (1 + w'w / variance) of each latent
    found = inflated(q, factor)
    torch.testing.assert_close(found.log_variance[0].exp(), expected)
    assert found.mean is q.mean


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_exact_encoder_is_its_own_proposal_and_no_sample_differs(data, dtype):
    variance = 0.05
    for _ in range(20):  # until the variance that fits validation images is that of the decoder
        config, model = linear(data, variance)
        given = evaluation.conditions(config, model, "val", len(data.val))
        variance = float(measure(config, model, data.val, 0, **given)["mse"])
    config, model = linear(data, variance)
    found = likelihood_metrics(config, model.to(dtype), data)
    assert found["proposal_inflation"] == 1
    assert found["effective_samples"] == pytest.approx(512, rel=1e-6)
    assert found["neg_log_likelihood_slack"] == pytest.approx(0, abs=1e-6)
    exact = -log_density(config, data, data.test.images.numpy() / 16).mean()
    assert found["neg_log_likelihood"] == pytest.approx(exact, abs=1e-3)
    assert found["neg_log_likelihood/k1"] == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize(("mean", "factor"), [(0, 0.25), (0, 4), (1, 1), (1, 0.5), (2, 1), (2, 2)])
def test_the_slack_of_a_wrong_proposal_is_found_within_a_factor_of_two(data, mean, factor):
    config, model = linear(data, 0.05)
    exact = log_density(config, data, data.test.images.numpy() / 16).mean()
    wrong = shifted(posteriors(model, data.test), mean, factor)
    found = importance_bounds(config, model, data.test, scalar(0.05), proposal=wrong)
    slack = exact - found.bounds[512].mean().item()
    assert slack / 2.2 < found.slack.item() < 1.5 * slack
    assert slack > 0.05


def test_a_proposal_for_a_wrong_encoder_reaches_the_exact_density(data):
    config, model = linear(data, 0.03)
    wrong = spoilt(model, 0.7, 0.5)
    found = likelihood_metrics(config, wrong, data)
    variance = scalar(evaluate([(config, wrong)], data)[0]["val/mse"])
    before = importance_bounds(config, wrong, data.test, variance)
    columns = model.decoder[0].weight.detach().numpy()
    covariance = columns @ columns.T + float(variance) * np.eye(64)
    mean = model.decoder[0].bias.detach().numpy()
    exact = multivariate_normal(mean, covariance).logpdf(data.test.images.numpy() / 16).mean()
    assert before.bounds[512].mean().item() < exact - 0.3
    assert found["neg_log_likelihood"] == pytest.approx(-exact, abs=0.05)
    assert found["neg_log_likelihood_slack"] < 0.05


# --- refitted posteriors --------------------------------------------------------------------------


def test_a_refitted_posterior_is_the_exact_one_of_a_linear_vae(data):
    config, model = linear(data, 0.05)
    split, exact = data.test.head(60), posteriors(model, data.test.head(60))
    found = refit_posterior(spoilt(model, 0.6, 4), split, scalar(0.05))
    deviations = (exact.log_variance / 2).exp()
    torch.testing.assert_close(found.mean / deviations, exact.mean / deviations, rtol=0, atol=0.01)
    assert divergence(found, exact).mean() < 0.04


def test_the_gap_is_the_divergence_from_the_exact_posterior(data, monkeypatch):
    config, model = linear(data, 0.05)
    exact, variance = posteriors(model, data.test.head(80)), scalar(0.05)
    monkeypatch.setattr(likelihood, "_fitted", lambda *_: variance)  # that the encoder is exact at
    for encoder in (model, spoilt(model, 0.9, 2)):
        found = amortization_gap(config, encoder, data, images=80)
        each = divergence(posteriors(encoder, data.test.head(80)), exact)
        assert found["amortization_gap"] == pytest.approx(each.mean().item(), abs=0.06)
        error = each.std().item() / math.sqrt(80)
        assert error < found["amortization_gap_se"] < error + 0.03  # that of 64 samples is in it
    density = log_density(config, data, data.test.head(80).images.numpy() / 16).mean()
    assert found["neg_elbo_refitted"] == pytest.approx(-density, abs=0.06)


@pytest.mark.parametrize(
    "settings",
    [{"likelihood": "laplace"}, BINARY, {"likelihood": "continuous_bernoulli"}, {"head": "relu"}]
    + [{"model": "conv", "channels": (3, 4)}],
    ids=str,
)
def test_every_kind_of_run_has_a_gap_that_a_seed_fixes(tiny, settings, monkeypatch):
    config, model = untrained(**settings)
    monkeypatch.setattr(likelihood, "STEPS", 20)
    found = amortization_gap(config, model, tiny, images=9)
    assert found["amortization_gap"] > 0.1
    assert found["amortization_gap_se"] > 0
    monkeypatch.setattr(evaluation, "CHUNK", 4)  # images at once change nothing
    assert amortization_gap(config, model, tiny, images=9) == pytest.approx(found, rel=1e-6)


# --- the metrics of a run -------------------------------------------------------------------------


def chosen(model: VAE, split: Split, variance: torch.Tensor, found: dict[str, float]) -> Posterior:
    """Return the proposal of a run's metrics."""
    return inflated(centred(model, split, variance), found["proposal_inflation"])


def test_the_metrics_are_means_over_test_images_at_the_variance_of_the_distortion(tiny, trained):
    for (config, model), finals in zip(trained, evaluate(trained, tiny), strict=True):
        metrics = likelihood_metrics(config, model, tiny, (1, 32))
        given = config, model, tiny.test, scalar(finals["val/mse"])
        found = importance_bounds(*given, (1, 32), chosen(*given[1:], metrics))
        values = -found.bounds[32].numpy()
        assert metrics == pytest.approx(
            {
                "neg_log_likelihood": values.mean(),
                "neg_log_likelihood/k1": -found.bounds[1].mean().item(),
                "neg_log_likelihood/k32": values.mean(),
                "neg_log_likelihood_se": np.std(values, ddof=1) / math.sqrt(50),
                "neg_log_likelihood_slack": found.slack.item(),
                "effective_samples": found.effective_samples.mean().item(),
                "proposal_inflation": metrics["proposal_inflation"],
            },
            rel=1e-10,
        )


def test_the_default_ladder_ends_below_neg_elbo(tiny, trained):
    for run, plain in zip(trained, evaluate(trained, tiny), strict=True):
        metrics = likelihood_metrics(*run, tiny)
        ladder = [metrics[f"neg_log_likelihood/k{k}"] for k in (1, 8, 64, 512)]
        assert np.diff(ladder).max() < 0.03  # but for noise: with one latent the bound is tight
        assert metrics["neg_log_likelihood"] == ladder[-1] < plain["neg_elbo"]
        assert 1 < metrics["effective_samples"] < 512


def test_only_the_first_test_images_are_read(tiny, trained, monkeypatch):
    monkeypatch.setattr(likelihood, "LIKELIHOOD_IMAGES", 20)
    cut = replace(tiny, test=tiny.test.head(20))
    few, expected = (likelihood_metrics(*trained[0], d, samples=(2,)) for d in (tiny, cut))
    assert few == expected


@pytest.mark.parametrize("kind", ["stochastic", "threshold"])
def test_a_bernoulli_run_is_measured_on_binary_test_images(tiny, kind):
    run, binary = untrained(likelihood="bernoulli", binarization=kind), tiny.drawn(kind)
    found = likelihood_metrics(*run, binary)
    proposal = chosen(run[1], binary.test, VARIANCE, found)
    bounds = importance_bounds(*run, binary.test, VARIANCE, proposal=proposal).bounds
    expected = -bounds[512].mean().item()
    assert found["neg_log_likelihood"] == pytest.approx(expected, rel=1e-12)
    assert found["neg_log_likelihood"] < evaluate([run], tiny)[0]["neg_elbo"]


@pytest.mark.parametrize(
    "change",
    [{"latent": "deterministic", "kl_weight": 0.0}, {"likelihood": "bernoulli"}],
    ids=["deterministic", "cross-entropy of grey pixels"],
)
def test_what_is_no_likelihood_is_not_reported(tiny, change):
    config = SMALL.replace(**change)
    model = build(config, (1, 8, 8))
    assert likelihood_metrics(config, model, tiny) == amortization_gap(config, model, tiny) == {}
