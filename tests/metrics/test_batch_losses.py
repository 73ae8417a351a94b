"""Loss and KL term of each batch are what training reads, in the seed's own units."""

import numpy as np
import pytest
import torch
from exact import linear_vae

from harness import streams
from harness.config import RunConfig
from harness.linear.pca import pca
from harness.linear.vae import LinearOptimum
from harness.metrics.evaluate import batch_losses
from harness.models.vae import build
from harness.objective import beta, kl_per_latent
from harness.parts.likelihoods import Gaussian
from harness.training.engine import train

CONFIGS = [
    RunConfig.seed_recipe(seed=0),
    RunConfig.seed_recipe(seed=1, kl_weight=0.3, kl_normalization="latent"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["pixels", "latent"])
def test_each_batch_has_mean_squared_error_plus_weighted_kl(data, config):
    model = build(config, data.image_shape, data.train.largest).double()
    found = batch_losses(config, model, data)
    steps = len(data.train) // 32
    assert found.loss.shape == found.kl_term.shape == (steps,)
    rows = streams.batches(config, len(data.train), config.epochs + 1)[32:64]
    eps = streams.noise(config.seed, "noise", steps * 32, 10, config.epochs + 1)[32:64]
    x = data.train.pixels(rows, torch.float64).view(-1, 1, 8, 8)
    posterior = model.posterior(x)
    error = Gaussian.error(x, model.decode(posterior.sample(eps.double()))).mean() / 64
    kl = kl_per_latent(posterior.mean, posterior.log_variance).sum(-1).mean()
    term = beta(config, 64) * kl / 64
    assert found.kl_term[1] == pytest.approx(term.item(), rel=1e-9)
    assert found.loss[1] == pytest.approx((error + term).item(), rel=1e-9)


def test_the_blogs_kl_term_is_its_sum_over_batch_and_pixels(data):
    # kld = KL.sum() / np.prod(x.shape) in its script.
    config = CONFIGS[0]
    model = build(config, data.image_shape, data.train.largest).double()
    order = streams.batches(config, len(data.train), config.epochs + 1)
    posterior = model.encode(data.train.images[order])
    kl = kl_per_latent(posterior.mean, posterior.log_variance).unflatten(0, (-1, 32))
    expected = kl.sum((1, 2)) / (32 * 64)
    found = batch_losses(config, model, data).kl_term
    assert found == pytest.approx(expected.detach().numpy())


def test_at_the_linear_optimum_the_mean_over_batches_is_the_closed_form(data):
    config = RunConfig(model="linear", kl_weight=0.1, batch_size=64)  # divides 1,280
    optimum = LinearOptimum(pca(data), 10, 0.05)
    found = batch_losses(config, linear_vae(config, data), data)
    # The KL has no noise; the error has that of 1,280 images.
    assert found.kl_term.mean() == pytest.approx(0.1 * optimum.rate / 64, rel=1e-9)
    assert found.loss.mean() == pytest.approx(optimum.loss, rel=0.01)


def test_it_repeats_and_is_near_the_loss_that_training_reports(data):
    config = RunConfig(epochs=1)
    *_, record = train([config], data, "cpu", torch.float64)
    found, again = (batch_losses(config, record.model(0), data) for _ in range(2))
    np.testing.assert_array_equal(found.loss, again.loss)
    assert found.loss.mean() == pytest.approx(record.train["loss"][0], rel=0.05)
