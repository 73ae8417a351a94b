"""What every network gives: those that are built in, those of `examples/` and others."""

import importlib.util
import logging
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from textbook import SMALL, flat
from torch import Tensor, nn

from harness import RunConfig, UserError, objective, registry
from harness.data.dataset import Dataset
from harness.metrics.evaluate import coefficients
from harness.models.files import load_model, save_model
from harness.models.vae import VAE, build
from harness.training.checkpoint import Checkpoints
from harness.training.engine import EpochRecord, train

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHAPE, PIXELS = (1, 8, 8), 64


# --- networks -------------------------------------------------------------------------------------


def smooth(data_shape, latent_size):
    pixels = math.prod(data_shape)
    encoder = nn.Sequential(
        *(nn.Flatten(), nn.Linear(pixels, 12), nn.LayerNorm(12), nn.Tanh()),
        nn.Linear(12, 2 * latent_size),
    )
    decoder = nn.Sequential(
        *(nn.Linear(latent_size, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, pixels)),
        nn.Unflatten(1, data_shape),
    )
    return encoder, decoder


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, x: Tensor) -> Tensor:
        """Return x + f(x)."""
        return x + self.inner(x)


def around(*layers: nn.Module, data_shape, latent_size):
    """Return an encoder with these layers, 12 numbers wide, and a plain decoder."""
    pixels = math.prod(data_shape)
    encoder = nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 12), *layers, nn.Linear(12, 2 * latent_size)
    )
    decoder = nn.Sequential(
        *(nn.Linear(latent_size, 12), nn.ReLU(), nn.Linear(12, pixels)),
        nn.Unflatten(1, data_shape),
    )
    return encoder, decoder


def residual(data_shape, latent_size):
    return around(Residual(12), Residual(12), data_shape=data_shape, latent_size=latent_size)


def batch_norm(data_shape, latent_size):
    layers = nn.BatchNorm1d(12), nn.ReLU()
    return around(*layers, data_shape=data_shape, latent_size=latent_size)


def dropout(data_shape, latent_size):
    layers = nn.ReLU(), nn.Dropout(0.2)
    return around(*layers, data_shape=data_shape, latent_size=latent_size)


class Rows(nn.Module):
    """A recurrent network that reads an image row by row."""

    def __init__(self, width: int, latent_size: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, 6, batch_first=True)
        self.head = nn.Linear(6, 2 * latent_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the posterior's parameters."""
        _, last = self.gru(x.flatten(1, 2))
        return self.head(last[0])


def recurrent(data_shape, latent_size):
    _, decoder = around(data_shape=data_shape, latent_size=latent_size)
    return Rows(data_shape[-1], latent_size), decoder


class Attention(nn.Module):
    """Self-attention among the rows of an image."""

    def __init__(self, width: int, latent_size: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 2 * latent_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the posterior's parameters."""
        rows = x.flatten(1, 2)
        mixed, _ = self.attention(rows, rows, rows, need_weights=False)
        return self.head(mixed.mean(1))


def attention(data_shape, latent_size):
    _, decoder = around(data_shape=data_shape, latent_size=latent_size)
    return Attention(data_shape[-1], latent_size), decoder


class Transposed(nn.Module):
    """The decoder of a linear layer: its weights, turned around."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = nn.Parameter(torch.zeros(layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return the latents times the encoder's weights."""
        return nn.functional.linear(x, self.weight.t(), self.bias)


class Widened(nn.Linear):
    """A linear layer for the mean; every log-variance is a parameter of its own."""

    def __init__(self, pixels: int, latent_size: int) -> None:
        super().__init__(pixels, latent_size)
        self.log_variance = nn.Parameter(torch.zeros(latent_size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the posterior's parameters."""
        mean = super().forward(x)
        return torch.cat([mean, self.log_variance.expand_as(mean)], 1)


def tied(data_shape, latent_size):
    head = Widened(math.prod(data_shape), latent_size)
    decoder = nn.Sequential(Transposed(head), nn.Unflatten(1, data_shape))
    return nn.Sequential(nn.Flatten(), head), decoder


HERE = [smooth, residual, batch_norm, dropout, recurrent, attention, tied]
ONE_BY_ONE = {"dropout", "recurrent"}
"""Networks that `torch.vmap` refuses: random layers, and loops that PyTorch has as one operator."""


def of_examples() -> dict[str, registry.Network]:
    """Return the networks that the modules of `examples/` register."""
    before = set(registry.NETWORKS)
    for path in EXAMPLES.glob("*.py"):
        if "network(" in path.read_text():
            spec = importlib.util.spec_from_file_location(f"examples_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
    found = {n: network for n, network in registry.NETWORKS.items() if n not in before}
    for name in found:
        del registry.NETWORKS[name]
    return found


NETWORKS = {
    **{name: registry.NETWORKS[name] for name in registry.BUILT_IN},
    **of_examples(),
    **{function.__name__: registry.Network(function, "sigmoid") for function in HERE},
}


@pytest.fixture(params=NETWORKS)
def config(request: pytest.FixtureRequest, registered: None) -> Iterator[RunConfig]:
    registry.NETWORKS[request.param] = NETWORKS[request.param]
    return SMALL.replace(model=request.param, latent_size=3, epochs=3)


# --- the contract ---------------------------------------------------------------------------------


def last_of(configs: list[RunConfig], data: Dataset, dtype=torch.float64) -> EpochRecord:
    *_, last = train(configs, data, "cpu", dtype)
    return last


def seeds(config: RunConfig) -> list[RunConfig]:
    return [config, config.replace(seed=1, kl_weight=0.1)]


def check_same(ours: EpochRecord, its: EpochRecord, limit: float) -> None:
    for s in range(len(its.rows)):
        one, other = ours.model(s).state_dict(), its.model(s).state_dict()
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=limit, atol=limit, msg=name)
    for name, values in its.val.items():
        np.testing.assert_allclose(
            ours.val[name], values, rtol=10 * limit, atol=limit, err_msg=name
        )


@pytest.mark.parametrize("shape", [SHAPE, (3, 8, 6)], ids=["grey", "colour"])
def test_images_become_posteriors_and_latents_images(config, shape):
    model = build(config, shape).eval()
    x = torch.rand(5, *shape)
    posterior = model.encode(x)
    assert posterior.mean.shape == posterior.log_variance.shape == (5, 3)
    assert model.decode(posterior.mean).shape == (5, *shape)
    assert model.decoder(posterior.mean).shape == (5, *shape)


def test_an_image_is_encoded_and_decoded_whatever_is_beside_it(config):
    model = build(config, SHAPE).eval().double()
    x = torch.rand(5, *SHAPE).double()
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]))


def test_the_seed_fixes_the_initial_weights(config):
    first, again, other = (build(config.replace(seed=s), SHAPE) for s in (0, 0, 1))
    assert torch.equal(flat(first), flat(again))
    assert not torch.equal(flat(first), flat(other))


def test_the_gradient_reaches_every_parameter(config):
    model = build(config, SHAPE).double()
    x, eps = torch.rand(8, *SHAPE).double(), torch.randn(8, 3).double()
    known = coefficients(config, PIXELS, model.device)
    objective.objective(config, model.batch(x, eps), known).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention: a loop over runs
def test_a_stack_is_each_run_alone_or_refused_with_a_reason(config, tiny, request, caplog):
    alone = last_of(seeds(config), tiny)
    request.getfixturevalue("stacks")
    with caplog.at_level(logging.WARNING):
        stacked = last_of(seeds(config), tiny)
    check_same(stacked, alone, limit=1e-9)
    reasons = [m for m in caplog.messages if m.startswith("Runs are trained one by one: ")]
    assert bool(reasons) == (config.model in ONE_BY_ONE)


def test_many_cores_change_no_bit(config, tiny):
    alone = last_of(seeds(config), tiny, torch.float32)
    torch.set_num_threads(2)
    check_same(last_of(seeds(config), tiny, torch.float32), alone, limit=0)


def test_a_file_gives_back_the_model(config, tiny, tmp_path):
    model = last_of([config], tiny, torch.float32).model(0)
    save_model(config, model, tmp_path)
    known, loaded = load_model(tmp_path)
    assert known == config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert (loaded.data_shape, loaded.largest) == (SHAPE, 16)
    images = tiny.test.images[:6]
    assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))


def test_initial_weights_of_a_stored_network_may_depend_on_values(registered, tmp_path):
    @registry.network("orthogonal")
    def orthogonal(data_shape, latent_size):
        encoder, decoder = around(data_shape=data_shape, latent_size=latent_size)
        for layer in (encoder[1], encoder[2], decoder[0], decoder[2]):
            nn.init.orthogonal_(layer.weight, gain=float(layer.weight.detach().std()))
        return encoder, decoder

    config = SMALL.replace(model="orthogonal", latent_size=3)
    model = build(config, SHAPE)
    save_model(config, model, tmp_path)
    assert torch.equal(flat(load_model(tmp_path)[1]), flat(model))
    for weights in ({}, {"other": torch.zeros(2)}):
        save_file(weights, tmp_path / "weights.safetensors", {"image_shape": "[1, 8, 8]"})
        with pytest.raises(UserError, match="no loadable model .* Missing key"):
            load_model(tmp_path)


def test_a_stopped_run_goes_on_with_the_same_bits(config, tiny, tmp_path):
    whole, kept = last_of([config], tiny, torch.float32), Checkpoints(tmp_path, every=100)
    stopped = train([config], tiny, "cpu", checkpoints=kept)
    list(islice(stopped, 1))
    stopped.close()
    *_, again = train([config], tiny, "cpu", checkpoints=kept)
    assert again.resumed == (1,)
    check_same(again, whole, limit=0)


def test_every_network_is_a_vae_by_itself(config):
    network = registry.NETWORKS[config.model]
    encoder, decoder = network.build(SHAPE, 3)
    model = VAE(encoder, decoder, data_shape=SHAPE, latent_size=3, output=network.output)
    assert model.eval().reconstruct(torch.rand(4, PIXELS)).shape == (4, *SHAPE)
