"""The built-in networks, as two plain modules of one run.

An activation lies between layers and none after the last. Convolutions are 3 x 3 of stride 2, so
that a side of n pixels becomes n / 2, rounded up; images may have any size.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import nn

KERNEL, STRIDE, PADDING = 3, 2, 1

Pair = tuple[nn.Module, nn.Module]
"""Encoder (B, *data_shape) -> (B, 2 L) and decoder (B, L) -> (B, *data_shape)."""


ACTIVATIONS = {  # by the name that `RunConfig.activation` takes
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
}


def mlp(
    data_shape: Sequence[int],
    latent_size: int,
    *,
    hidden: Sequence[int] = (256, 64),
    activation: str = "relu",
) -> Pair:
    """Return an encoder with hidden layers of these widths, and a decoder that mirrors it."""
    pixels = math.prod(data_shape)
    layers = _linears((pixels, *hidden, 2 * latent_size), activation)
    encoder = nn.Sequential(nn.Flatten(), *layers)
    layers = _linears((latent_size, *reversed(hidden), pixels), activation)
    return encoder, nn.Sequential(*layers, nn.Unflatten(1, tuple(data_shape)))


def linear(data_shape: Sequence[int], latent_size: int) -> Pair:
    """Return one linear layer each: probabilistic PCA as a VAE."""
    return mlp(data_shape, latent_size, hidden=())


def conv(
    data_shape: Sequence[int],
    latent_size: int,
    *,
    channels: Sequence[int] = (32, 64),
    activation: str = "relu",
) -> Pair:
    """Return an encoder of convolutions and one linear layer, and a decoder that mirrors it."""
    shapes, between = [tuple(data_shape)], ACTIVATIONS[activation]
    for outputs in channels:
        shapes.append((outputs, *(-(-side // STRIDE) for side in shapes[-1][1:])))
    flat = math.prod(shapes[-1])
    encoder: list[nn.Module] = []
    for (inputs, *_), (outputs, *_) in pairwise(shapes):
        encoder += [nn.Conv2d(inputs, outputs, KERNEL, STRIDE, PADDING), between()]
    encoder += [nn.Flatten(), nn.Linear(flat, 2 * latent_size)]
    decoder: list[nn.Module] = [nn.Linear(latent_size, flat), between()]
    decoder.append(nn.Unflatten(1, shapes[-1]))
    for small, large in pairwise(reversed(shapes)):
        # A transposed convolution makes 2 n - 1 pixels of n: an even side lacks one.
        more = 1 - large[1] % 2, 1 - large[2] % 2
        layer = nn.ConvTranspose2d(small[0], large[0], KERNEL, STRIDE, PADDING, more)
        decoder += [layer, between()]
    return nn.Sequential(*encoder), nn.Sequential(*decoder[:-1])


def _linears(sizes: Sequence[int], activation: str) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return layers[:-1]


@torch.no_grad()
def draw(layers: Iterable[nn.Module], stream: np.random.Generator) -> None:
    """Set weights and biases to U(-1, 1) / sqrt(inputs), PyTorch's default, layer by layer."""
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for parameter in layer.parameters():
                if parameter.is_meta:
                    continue
                drawn = stream.uniform(-bound, bound, tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
