"""Loss and KL term of each batch are what training reads, in the seed's own units."""

import numpy as np
import pytest
import torch

from harness import RunConfig, UserError, streams
from harness.batches import batch_losses
from harness.engine import train
from harness.linear.pca import pca
from harness.linear.vae import LinearOptimum, linear_vae
from harness.objective import beta, kl_per_latent, squared_error
from harness.vae import VAE, initial

CONFIGS = [
    RunConfig.seed_recipe(seed=0),
    RunConfig.seed_recipe(seed=1, kl_weight=0.3, kl_normalization="latent"),
]


def test_each_batch_has_mean_squared_error_plus_weighted_kl(data):
    runs = [initial(config, data.image_shape).double() for config in CONFIGS]
    found = batch_losses(runs, data)
    steps = len(data.train) // 32
    assert found.loss.shape == found.kl_term.shape == (2, steps)
    for s, (run, config) in enumerate(zip(runs, CONFIGS, strict=True)):
        rows = streams.batches([config], len(data.train), config.epochs + 1)[0, 32:64]
        eps = streams.noise([config], "noise", steps * 32, config.epochs + 1)[0, 32:64]
        x = data.train.pixels(rows, torch.float64)
        posterior = run.encode(x)
        error = squared_error(x, run.decode(posterior.sample(eps.double()))).mean() / 64
        kl = kl_per_latent(posterior.mean, posterior.log_variance).sum(-1).mean()
        term = beta(config, 64) * kl / 64
        assert found.kl_term[s, 1] == pytest.approx(term.item(), rel=1e-9)
        assert found.loss[s, 1] == pytest.approx((error + term).item(), rel=1e-9)


def test_the_blogs_kl_term_is_its_sum_over_batch_and_pixels(data):
    # kld = KL.sum() / np.prod(x.shape) in its script.
    run = initial(CONFIGS[0], data.image_shape).double()
    order = streams.batches(CONFIGS[:1], len(data.train), CONFIGS[0].epochs + 1)[0]
    posterior = run.encode(data.train.pixels(order, torch.float64))
    kl = kl_per_latent(posterior.mean, posterior.log_variance).unflatten(0, (-1, 32))
    expected = kl.sum((1, 2)) / (32 * 64)
    assert batch_losses([run], data).kl_term[0] == pytest.approx(expected.detach().numpy())


def test_at_the_linear_optimum_the_mean_over_batches_is_the_closed_form(data):
    config = RunConfig(model="linear", kl_weight=0.1, batch_size=64)  # divides 1,280
    optimum = LinearOptimum(pca(data), 10, 0.05)
    found = batch_losses([linear_vae(config, data)], data)
    # The KL has no noise; the error has that of 1,280 images.
    assert found.kl_term.mean() == pytest.approx(0.1 * optimum.rate / 64, rel=1e-9)
    assert found.loss.mean() == pytest.approx(optimum.loss, rel=0.01)


def test_it_repeats_and_is_near_the_loss_that_training_reports(data):
    config = RunConfig(epochs=1)
    *_, record = train([config], data, "cpu", torch.float64)
    found = batch_losses([record.model.run(0)], data)
    again = batch_losses([VAE([record.model.run(0)]).run(0)], data)
    np.testing.assert_array_equal(found.loss, again.loss)
    assert found.loss.mean() == pytest.approx(record.train["loss"][0], rel=0.05)


def test_runs_that_cannot_share_a_stack_are_refused(data):
    runs = [initial(RunConfig(epochs=e), data.image_shape) for e in (1, 2)]
    with pytest.raises(UserError, match="must agree"):
        batch_losses(runs, data)
