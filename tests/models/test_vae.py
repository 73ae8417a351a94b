"""A variational autoencoder of one run: its distributions, and its use by itself."""

import numpy as np
import pytest
import torch
from textbook import SMALL, Textbook, flat
from torch import nn

from harness.config import RunConfig, UserError
from harness.data.dataset import Dataset
from harness.metrics.pictures import grid, prior_samples
from harness.models.vae import VAE, build
from harness.objective import Posterior, kl_per_latent
from harness.streams import noise

SHAPE = (1, 8, 8)
KINDS = [
    {"model": model, "head": head}
    for model in ("mlp", "linear", "conv")
    for head in ("gaussian", "relu")
]
all_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k.values()))


@all_kinds
def test_a_run_is_the_textbook_network(kind):
    config = SMALL.replace(latent_size=5, **kind)
    model, textbook = build(config, SHAPE).double(), Textbook(config, SHAPE)
    x, z = torch.rand(7, 64).double(), torch.randn(7, 5).double()
    posterior, q = model.encode(x), textbook.posterior(x)
    torch.testing.assert_close(posterior.mean, q.mean)
    torch.testing.assert_close(posterior.log_variance, q.variance.log())
    torch.testing.assert_close(model.decode(z).flatten(1), textbook.decode(z))


def test_the_relu_head_is_the_blogs():
    h_ = torch.randn(50, 20, dtype=torch.float64)
    eps = torch.randn(50, 10, dtype=torch.float64)
    mu, sigma = h_.relu().chunk(2, dim=1)
    h = mu + sigma * eps
    kld = 0.5 * torch.sum(mu**2 + sigma**2 - torch.log(1e-8 + sigma**2) - 1)
    posterior = Posterior.from_head(h_, "relu")
    # The blog's 1e-8 is part of our variance, so its sigma = 0 is our 1e-4.
    torch.testing.assert_close(posterior.sample(eps), h, rtol=0, atol=1.01e-4 * eps.abs().max())
    kl = kl_per_latent(posterior.mean, posterior.log_variance)
    torch.testing.assert_close(kl.sum(), kld, rtol=1e-8, atol=0)
    assert (sigma == 0).any()


def test_a_gaussian_sample_is_mean_plus_deviation_times_noise():
    mean, log_variance, eps = torch.randn(3, 5, 2, dtype=torch.float64)
    z = Posterior(mean, log_variance).sample(eps)
    torch.testing.assert_close(z, mean + torch.exp(log_variance) ** 0.5 * eps)


def test_a_deterministic_latent_is_the_mean():
    model = build(SMALL.replace(latent="deterministic", kl_weight=0), SHAPE)
    batch = model.batch(torch.rand(7, *SHAPE), torch.randn(7, 10))
    assert torch.equal(batch.z, batch.posterior.mean)


def test_a_batch_holds_what_the_model_makes_of_it():
    model = build(SMALL.replace(sigma="learned"), SHAPE).double()
    nn.init.constant_(model.log_decoder_variance, -2.0)
    x, eps = torch.rand(7, *SHAPE).double(), torch.randn(7, 10).double()
    batch = model.batch(x, eps, prior=eps, training_size=96, progress=0.5)
    assert torch.equal(batch.z, model.encode(x).sample(eps))
    assert torch.equal(batch.reconstruction, model.decode(batch.z))
    torch.testing.assert_close(batch.output, batch.reconstruction.logit())
    assert batch.scale.item() == pytest.approx(torch.tensor(-2.0).exp().item())
    assert (batch.x is x, batch.prior is eps) == (True, True)
    assert (batch.training_size, batch.progress) == (96, 0.5)


# --- images in, images out ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(data: Dataset) -> VAE:
    return build(SMALL, data.image_shape, data.train.largest)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_images_may_be_flat_and_of_any_floating_point_type(kind):
    model = build(SMALL.replace(model=kind), SHAPE)
    x = torch.randint(0, 9, (6, *SHAPE)) / 8  # exact in every type
    expected = model.encode(x)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for shape in ((6, *SHAPE), (6, 64)):
            found = model.encode(x.to(dtype).view(shape))
            assert found.mean.dtype == torch.float32
            assert torch.equal(found.mean, expected.mean)
            assert torch.equal(found.log_variance, expected.log_variance)
    assert model.double().encode(x.half()).mean.dtype == torch.float64


def test_grey_values_are_shares_of_the_datas_largest(data, model):
    grey = data.test.images[:20].view(20, *SHAPE)
    assert (grey.dtype, int(grey.max())) == (torch.uint8, 16)
    assert torch.equal(model.encode(grey).mean, model.encode(grey / 16).mean)
    assert torch.equal(model.encode(grey.flatten(1)).mean, model.encode(grey / 16).mean)


WRONG = {
    "another side": (torch.zeros(5, 1, 8, 9), r"shape \(5, 1, 8, 9\): give \(B, 1, 8, 8\) or"),
    "one image": (torch.zeros(1, 8, 8), r"shape \(1, 8, 8\): give \(B, 1, 8, 8\) or \(B, 64\)"),
    "one flat image": (torch.zeros(64), r"shape \(64,\)"),
    "no channel": (torch.zeros(5, 8, 8), r"shape \(5, 8, 8\)"),
    "int64": (torch.zeros(5, 64).long(), "type torch.int64: give torch.uint8 from 0 to 16"),
    "bool": (torch.zeros(5, 64).bool(), "type torch.bool"),
    "too bright": (torch.full((5, 64), 17, dtype=torch.uint8), "from 17 to 17: .* 0 to 16"),
    "0 to 255": (torch.full((5, 64), 255.0), "from 255 to 255: .* must be from 0 to 1"),
    "negative": (torch.full((5, 64), -0.5), "from -0.5 to -0.5"),
    "NaN": (torch.full((5, 64), torch.nan), "from nan to nan"),
}


@pytest.mark.parametrize(("images", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("call", ["encode", "reconstruct", "interpolate"])
def test_images_that_cannot_be_encoded_are_refused_in_one_line(model, images, message, call):
    given = (images, images) if call == "interpolate" else (images,)
    with pytest.raises(UserError, match=message) as refusal:
        getattr(model, call)(*given)
    assert len(str(refusal.value).splitlines()) == 1


def test_grey_values_of_unknown_range_are_refused():
    model = build(SMALL, SHAPE, largest=None)
    with pytest.raises(UserError, match="was not stored with this model; give floats from 0 to 1"):
        model.encode(torch.zeros(2, 64, dtype=torch.uint8))
    assert model.encode(torch.zeros(2, 64)).mean.shape == (2, 10)


def test_no_images_have_no_posteriors(model):
    assert model.encode(torch.zeros(0, 64)).mean.shape == (0, 10)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_reconstruction_decodes_the_posterior_mean_in_the_datas_shape(kind):
    model, x = build(SMALL.replace(model=kind), (3, 5, 7)), torch.rand(6, 105)
    y = model.reconstruct(x)
    assert y.shape == (6, 3, 5, 7)
    assert torch.equal(y, model.decode(model.encode(x).mean))
    assert torch.equal(y, model(x.view(6, 3, 5, 7)))
    assert not y.requires_grad
    assert model.encode(x).mean.requires_grad


def test_samples_decode_the_seeds_prior_draws(model):
    first = model.sample(6, seed=3)
    assert first.shape == (6, *SHAPE)
    assert torch.equal(first, model.sample(6, seed=3))
    torch.testing.assert_close(first[:2], model.sample(2, seed=3))
    assert not torch.equal(first, model.sample(6, seed=4))
    other = build(SMALL.replace(seed=7), SHAPE)
    assert not torch.equal(first, other.sample(6, seed=3))


def test_the_samples_of_a_seed_are_those_of_its_pictures(model):
    drawn = model.sample(20, seed=2)
    torch.testing.assert_close(drawn, model.decode(noise(2, "prior", 20, 10)))
    assert np.array_equal(prior_samples(model, 2, 4, 5), grid(drawn.unflatten(0, (4, 5))))


def test_lines_between_images_end_at_their_reconstructions(data, model):
    first, second = data.test.images[:3], data.test.images[3:6]
    lines = model.interpolate(first, second, steps=5)
    assert lines.shape == (3, 5, *SHAPE)
    torch.testing.assert_close(lines[:, 0], model.reconstruct(first))
    torch.testing.assert_close(lines[:, -1], model.reconstruct(second))
    halfway = (model.encode(first).mean + model.encode(second).mean) / 2
    torch.testing.assert_close(lines[:, 2], model.decode(halfway))
    assert model.interpolate(first, second).shape == (3, 9, *SHAPE)


# --- without a configuration ----------------------------------------------------------------------


class Encoder(nn.Module):
    """Half the pixels are the mean, and every log-variance is -1."""

    def forward(self, x):
        """Return means and log-variances."""
        return torch.cat([x.flatten(1)[:, :2], -torch.ones(len(x), 2)], 1)


def test_two_plain_modules_are_enough():
    decoder = nn.Linear(2, 4)
    model = VAE(Encoder(), decoder, data_shape=(4,), latent_size=2, output="identity")
    x = torch.rand(5, 4)
    assert torch.equal(model.encode(x).mean, x[:, :2])
    assert (model.encode(x).log_variance == -1).all()
    z = torch.randn(5, 2)
    assert torch.equal(model.decode(z), decoder(z))
    assert model.sample(3).shape == (3, 4)
    assert model.interpolate(x, x, steps=2).shape == (5, 2, 4)
    assert list(model.state_dict()) == ["decoder.weight", "decoder.bias"]


@pytest.mark.parametrize(
    ("likelihood", "output", "has_sigmoid"),
    [
        ("gaussian", "sigmoid", True),
        ("gaussian", "identity", False),
        ("bernoulli", "identity", True),
    ],
)
def test_decoder_means_lie_behind_the_output_of_the_likelihood(likelihood, output, has_sigmoid):
    given = {"data_shape": (4,), "latent_size": 1, "likelihood": likelihood, "output": output}
    model = VAE(nn.Linear(4, 2), nn.Linear(1, 4), **given)
    z = torch.randn(3, 1)
    expected = model.decoder(z)
    assert torch.equal(model.decode(z), expected.sigmoid() if has_sigmoid else expected)


def test_a_model_keeps_its_numbers_whatever_the_layout_it_was_given():
    layers = nn.Linear(64, 8), nn.Linear(4, 64)
    transposed = [nn.Linear(64, 8), nn.Linear(4, 64)]
    for mine, given in zip(transposed, layers, strict=True):
        mine.load_state_dict(given.state_dict())
        mine.weight.data = mine.weight.data.t().contiguous().t()
    x = torch.rand(32, 64)
    one, other = (VAE(*both, data_shape=(64,), latent_size=4) for both in (layers, transposed))
    assert torch.equal(flat(one), flat(other))
    assert torch.equal(one(x), other(x))


def test_the_default_grey_range_is_that_of_bytes():
    model = build(RunConfig(), SHAPE)
    x = torch.full((1, 64), 51, dtype=torch.uint8)
    torch.testing.assert_close(model.encode(x).mean, model.encode(torch.full((1, 64), 0.2)).mean)
