"""The objective against torch.distributions, the textbook loss and SCIENCE.md's table."""

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from harness import objective
from harness.config import RunConfig
from harness.parts import likelihoods

MODES = ("pixels", "batch", "latent", "sum")
all_modes = pytest.mark.parametrize("mode", MODES)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batch_of(config: RunConfig, pixels: int) -> dict[str, torch.Tensor]:
    """Return random images, decoder outputs and posteriors."""
    torch.manual_seed(1)
    size = config.batch_size
    return {
        "x": torch.rand(size, pixels, dtype=torch.float64),
        "y": torch.rand(size, pixels, dtype=torch.float64, requires_grad=True),
        "mean": torch.randn(size, config.latent_size, dtype=torch.float64, requires_grad=True),
        "log_variance": torch.randn(size, config.latent_size, dtype=torch.float64),
    }


def loss_of(config: RunConfig, pixels: int, x, y, mean, log_variance) -> torch.Tensor:
    posterior = objective.Posterior(mean, log_variance)
    batch = objective.Batch(x, posterior, posterior.mean, y, y)
    beta = torch.tensor(objective.beta(config, pixels), dtype=torch.float64)
    return objective.objective(config, batch, objective.Coefficients(beta))


def test_kl_is_that_of_torch_distributions():
    mean, log_variance = 3 * torch.randn(2, 50, 6, dtype=torch.float64)
    kl = objective.kl_per_latent(mean, log_variance)
    zero = torch.zeros_like(mean)
    reference = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(zero, 1.0))
    torch.testing.assert_close(kl, reference, **EXACT)
    assert (kl >= 0).all()


def test_kl_is_zero_at_the_prior_and_least_there():
    mean, log_variance = torch.zeros(2, 1, 3, dtype=torch.float64, requires_grad=True)
    kl = objective.kl_per_latent(mean, log_variance)
    assert not kl.any()
    for gradient in torch.autograd.grad(kl.sum(), (mean, log_variance)):
        assert not gradient.any()


def test_squared_error_is_summed_over_the_pixels():
    x, y = torch.rand(2, 4, 2, 5, 5, dtype=torch.float64)
    error = likelihoods.Gaussian.error(x, y)
    expected = torch.nn.functional.mse_loss(y, x, reduction="none").sum((1, 2, 3))
    torch.testing.assert_close(error, expected, **EXACT)


@all_modes
def test_loss_is_the_textbook_mean_error_plus_scaled_kl(mode):
    config = RunConfig(kl_weight=0.7, kl_normalization=mode, latent_size=3, batch_size=5)
    batch = batch_of(config, pixels=12)
    q = Normal(batch["mean"], (batch["log_variance"] / 2).exp())
    kl = kl_divergence(q, Normal(torch.zeros_like(q.mean), 1.0)).sum()
    c = {"pixels": 5 * 12, "batch": 5, "latent": 5 * 3, "sum": 1}[mode]
    textbook = torch.nn.functional.mse_loss(batch["y"], batch["x"]) + 0.7 * kl / c
    loss = loss_of(config, 12, **batch)
    torch.testing.assert_close(loss, textbook, **EXACT)
    assert objective.beta(config, 12) == pytest.approx(0.7 * 12 * 5 / c, rel=1e-15)


@all_modes
def test_the_loss_has_the_elbos_gradient_up_to_scale(mode):
    config = RunConfig(kl_weight=0.7, kl_normalization=mode, latent_size=3, batch_size=5)
    batch = batch_of(config, pixels=12)
    inputs = (batch["y"], batch["mean"])
    variance = objective.decoder_variance(config, 12)
    q = Normal(batch["mean"], (batch["log_variance"] / 2).exp())
    rate = kl_divergence(q, Normal(torch.zeros_like(q.mean), 1.0)).sum() / 5
    log_p = Normal(batch["y"], variance**0.5).log_prob(batch["x"]).sum() / 5
    elbo = torch.autograd.grad(log_p - rate, inputs, retain_graph=True)
    ours = torch.autograd.grad(loss_of(config, 12, **batch), inputs)
    for a, b in zip(ours, elbo, strict=True):
        torch.testing.assert_close(a, -b * 2 * variance / 12, **EXACT)


@all_modes
def test_equal_decoder_variance_is_the_same_training_in_every_mode(mode):
    base = RunConfig(latent_size=3, batch_size=5, kl_weight=0.7)
    unit = objective.beta(base.replace(kl_weight=1.0, kl_normalization=mode), 12)
    other = base.replace(kl_weight=0.7 / unit, kl_normalization=mode)
    assert objective.decoder_variance(other, 12) == pytest.approx(0.35, rel=1e-14)
    batch = batch_of(base, pixels=12)
    inputs = (batch["y"], batch["mean"])
    losses = [loss_of(config, 12, **batch) for config in (base, other)]
    torch.testing.assert_close(*losses, **EXACT)
    for pair in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        torch.testing.assert_close(*pair, **EXACT)


@pytest.mark.parametrize("factor", [12, 12 / 3, 12 * 5], ids=MODES[1:])
def test_a_factor_of_the_whole_loss_is_another_epsilon_of_adam_and_a_learning_rate_of_sgd(factor):
    config = RunConfig(latent_size=3, batch_size=5, kl_weight=0.7)
    batch = batch_of(config, pixels=12)

    def trained(optimizer, scale, **options):
        y, mean = (batch[name].detach().clone().requires_grad_() for name in ("y", "mean"))
        steps = optimizer([y, mean], **options)
        for _ in range(5):
            steps.zero_grad()
            (scale * loss_of(config, 12, **batch | {"y": y, "mean": mean})).backward()
            steps.step()
        return y, mean

    adam, sgd = torch.optim.Adam, torch.optim.SGD
    ours = trained(adam, 1, lr=0.1, eps=1e-3 / factor), trained(sgd, 1, lr=0.1 * factor)
    theirs = trained(adam, factor, lr=0.1, eps=1e-3), trained(sgd, factor, lr=0.1)
    torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize(
    ("settings", "variance", "beta"),
    [
        ({"kl_normalization": "pixels"}, 0.5, 1.0),
        ({"kl_normalization": "batch"}, 392.0, 784.0),
        ({"kl_normalization": "latent", "latent_size": 20}, 19.6, 39.2),
        ({"kl_normalization": "sum"}, 12_544.0, 25_088.0),
        ({"kl_normalization": "pixels", "kl_weight": 0.05}, 0.025, 0.05),
        ({"kl_normalization": "sum", "kl_weight": 0.0}, 0.0, 0.0),
    ],
)
def test_the_table_of_normalisations(settings, variance, beta):
    config = RunConfig(batch_size=32, **settings)
    assert objective.beta(config, 784) == pytest.approx(beta, rel=1e-14)
    assert objective.decoder_variance(config, 784) == pytest.approx(variance, rel=1e-14)


def distortion(mse, variance):
    found = likelihoods.Gaussian.neg_log_density(12 * mse, variance, 12)
    torch.testing.assert_close(likelihoods.Gaussian.distortion(12 * mse, variance, 12), found)
    return found


def test_distortion_is_the_gaussian_negative_log_likelihood():
    x, y = torch.rand(2, 3, 5, 12, dtype=torch.float64)
    variance = torch.tensor([0.01, 0.3, 2.0], dtype=torch.float64)
    mse = (x - y).square().mean((1, 2))
    p = Normal(y, variance.sqrt().view(3, 1, 1))
    expected = -p.log_prob(x).sum(-1).mean(-1)
    torch.testing.assert_close(distortion(mse, variance), expected, **EXACT)


def test_distortion_is_least_at_the_mean_squared_error():
    mse = torch.tensor([0.02, 0.5], dtype=torch.float64)
    variance = mse.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distortion(mse, variance).sum(), variance)
    torch.testing.assert_close(gradient, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)
    for factor in (0.9, 1.1):
        worse = distortion(mse, factor * mse)
        assert (worse > distortion(mse, mse)).all()


@pytest.mark.parametrize("epochs", [0, 1, 2, 3])
def test_warm_up_rises_linearly_by_steps_from_zero(epochs):
    config = RunConfig(kl_warmup_epochs=epochs)
    factors = torch.cat([objective.kl_warmup(config, epoch, steps=4) for epoch in (1, 2, 3, 4)])
    expected = [min(1.0, step / (4 * epochs)) if epochs else 1.0 for step in range(16)]
    assert factors.tolist() == expected


def test_cross_entropy_is_that_of_bernoulli_pixels():
    x, logits = torch.rand(4, 2, 3, dtype=torch.float64), torch.randn(4, 2, 3).double()
    expected = -Bernoulli(logits=logits).log_prob(x.round()).sum((1, 2))
    torch.testing.assert_close(likelihoods.Bernoulli.error(x.round(), logits), expected, **EXACT)


# --- terms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"sigma": "optimal"}, {"likelihood": "bernoulli"}])
def test_terms_add_their_weight_times_value_over_the_pixels(settings):
    config = RunConfig(latent_size=3, batch_size=5, **settings)
    given = batch_of(config, pixels=12)
    posterior = objective.Posterior(given["mean"], given["log_variance"])
    batch = objective.Batch(given["x"], posterior, posterior.mean, given["y"], given["y"])
    weights = {"mean": torch.tensor(3.0).double(), "error": torch.tensor(-0.5).double()}
    known = objective.Coefficients(torch.tensor(0.7).double(), None, weights)
    terms = {
        "mean": lambda batch: batch.posterior.mean.square().sum(),
        "error": lambda batch: (batch.x - batch.reconstruction).abs().mean(),
    }
    added = 3 * given["mean"].square().sum() - 0.5 * (given["x"] - given["y"]).abs().mean()
    without = objective.objective(config, batch, known)
    expected = without + added / 12
    torch.testing.assert_close(objective.objective(config, batch, known, terms), expected, **EXACT)


def test_kl_weight_normalisation_and_warm_up_do_not_touch_a_term():
    config, values = RunConfig(latent_size=3, batch_size=5), []
    given = batch_of(config, pixels=12)
    posterior = objective.Posterior(given["mean"], given["log_variance"])
    batch = objective.Batch(given["x"], posterior, posterior.mean, given["y"], given["y"])
    for beta in (0.0, 0.3, 50.0):
        known = objective.Coefficients(torch.tensor(beta), None, {"one": torch.tensor(2.0)})
        with_it = objective.objective(config, batch, known, {"one": lambda batch: torch.ones(())})
        values.append((with_it - objective.objective(config, batch, known)).item())
    assert values == pytest.approx([2 / 12] * 3)


def test_a_batch_can_be_made_by_hand():
    x, z = torch.rand(2, 4), torch.zeros(2, 1)
    batch = objective.Batch(
        x=x, posterior=objective.Posterior(z, z), z=z, output=x, reconstruction=x
    )
    assert (batch.scale, batch.prior, batch.training_size, batch.progress) == (None, None, 0, 1)
