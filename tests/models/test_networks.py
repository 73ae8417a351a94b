"""The built-in networks, and the initial weights that a run's seed fixes."""

import copy
from itertools import pairwise

import pytest
import torch
from textbook import flat
from torch import nn

from harness.config import RunConfig
from harness.models.vae import VAE, build
from harness.streams import generator

SHAPE = (1, 8, 8)


def weighted(model: VAE) -> list[nn.Module]:
    return [m for m in model.modules() if getattr(m, "weight", None) is not None]


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("mlp", {nn.Linear, nn.ReLU}),
        ("linear", {nn.Linear}),
        ("conv", {nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.ReLU}),
    ],
)
def test_networks_are_of_pytorchs_layers(model, layers):
    network = build(RunConfig(model=model), SHAPE)
    kinds = {type(m) for m in network.modules() if not list(m.children())}
    assert kinds - {nn.Flatten, nn.Unflatten} == layers


def test_initial_weights_are_pytorchs_distribution():
    for layer in weighted(build(RunConfig(), (1, 28, 28))):
        scaled = layer.weight.detach() * layer.in_features**0.5
        assert -1 <= scaled.min() < -0.99
        assert 0.99 < scaled.max() <= 1
        five_sigma = 5 / scaled.numel() ** 0.5
        assert abs(scaled.mean()) < five_sigma * (1 / 3) ** 0.5
        assert abs(scaled.square().mean() - 1 / 3) < five_sigma * (4 / 45) ** 0.5
        assert layer.bias.abs().max() * layer.in_features**0.5 <= 1


def test_convolutions_begin_with_pytorchs_bounds():
    config = RunConfig(model="conv", channels=(64, 64, 64))
    for layer in weighted(build(config, (3, 16, 16))):
        theirs = copy.deepcopy(layer)
        theirs.reset_parameters()
        bound = theirs.weight.detach().abs().max()
        assert float(layer.weight.detach().abs().max() / bound) == pytest.approx(1, rel=0.03)
        assert layer.bias.abs().max() < 1.03 * bound


def test_initial_weights_depend_on_seed_and_latent_size_alone():
    first = build(RunConfig(), SHAPE)
    same = RunConfig(kl_weight=3.0, learning_rate=1.0, kl_normalization="sum", epochs=1)
    assert torch.equal(flat(first), flat(build(same, SHAPE)))
    assert not torch.any(flat(first) == flat(build(RunConfig(seed=1), SHAPE)))
    one, other = (build(RunConfig(latent_size=size), SHAPE).encoder[1] for size in (3, 4))
    assert not torch.any(one.weight == other.weight)


def test_initial_weights_are_drawn_in_the_order_of_the_layers_weight_before_bias():
    # Pinned: other weights here mean that no recorded run can be repeated.
    model = build(RunConfig(hidden=(2,), latent_size=1, seed=3), (1, 1, 2))
    drawn = torch.from_numpy(generator(3, "weights", latent_size=1).random(22)) * 2 - 1
    sizes = [(4, 2), (2, 2), (4, 2), (2, 2), (2, 1), (2, 1), (4, 2), (2, 2)]
    parts = drawn.split([count for count, _ in sizes])
    expected = [part / inputs**0.5 for part, (_, inputs) in zip(parts, sizes, strict=True)]
    torch.testing.assert_close(flat(model), torch.cat(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_building_does_not_touch_the_global_generator(model):
    before = torch.get_rng_state()
    build(RunConfig(model=model), SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


def test_hidden_layers_mirror_in_the_decoder():
    model = build(RunConfig(hidden=(30, 20, 10), latent_size=4), SHAPE)

    def sizes(part: nn.Module) -> list[int]:
        layers = [m for m in part.modules() if isinstance(m, nn.Linear)]
        assert all(a.out_features == b.in_features for a, b in pairwise(layers))
        return [layers[0].in_features, *(m.out_features for m in layers)]

    assert sizes(model.encoder) == [64, 30, 20, 10, 8]
    assert sizes(model.decoder) == [4, 10, 20, 30, 64]


def test_channels_mirror_in_the_decoder():
    model = build(RunConfig(model="conv", channels=(5, 6, 7)), (3, 9, 14))
    there = [(m.in_channels, m.out_channels) for m in model.encoder if isinstance(m, nn.Conv2d)]
    back = [
        (m.in_channels, m.out_channels) for m in model.decoder if isinstance(m, nn.ConvTranspose2d)
    ]
    assert there == [(3, 5), (5, 6), (6, 7)]
    assert back == [(7, 6), (6, 5), (5, 3)]
    assert model.encoder[-1].in_features == model.decoder[0].out_features == 7 * 2 * 2


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 1), (3, 5, 8), (1, 7, 12), (3, 9, 6)])
@pytest.mark.parametrize("channels", [(3,), (4, 5, 6, 7)])
def test_convolutions_take_images_of_any_size(shape, channels):
    model = build(RunConfig(model="conv", channels=channels), shape)
    assert model(torch.rand(7, *shape)).shape == (7, *shape)
