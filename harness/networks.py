"""Encoder and decoder of a run as plain `torch.nn` layers, and of many runs as one stack.

mlp: linear layers. conv: convolutions 3 x 3 of stride 2, then one linear layer; the decoder mirrors
it with transposed convolutions. A side of n pixels becomes n / 2, rounded up, and comes back as n:
`output_padding` adds the row or column that is missing, so images may have any size. linear: one
layer. Everywhere a ReLU between layers and none after the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise, zip_longest

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.config import RunConfig
from harness.nn import (
    KERNEL,
    MLP,
    PADDING,
    STRIDE,
    Conv,
    Linear,
    Shape,
    TransposedConv,
    halved,
    output_padding,
)

Plain = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
"""A layer of one run that has weights."""


def shapes(config: RunConfig, image_shape: Shape) -> list[Shape]:
    """Return the shape of an image, and that after each convolution."""
    found = [image_shape]
    for channels in config.channels if config.model == "conv" else ():
        found.append(halved(found[-1], channels))
    return found


def encoder(config: RunConfig, image_shape: Shape) -> nn.Sequential:
    """Return the network from flat images (B, D) to the head (B, 2 L), with PyTorch's weights."""
    hidden = config.hidden if config.model == "mlp" else ()
    steps = list(pairwise(shapes(config, image_shape)))
    layers: list[nn.Module] = [nn.Unflatten(1, image_shape)] if steps else []
    for (inputs, *_), (outputs, *_) in steps:
        layers += [nn.Conv2d(inputs, outputs, KERNEL, STRIDE, PADDING), nn.ReLU()]
    layers += [nn.Flatten()] if steps else []
    last = math.prod(shapes(config, image_shape)[-1])
    return nn.Sequential(*layers, *_linears((last, *hidden, 2 * config.latent_size)))


def decoder(config: RunConfig, image_shape: Shape) -> nn.Sequential:
    """Return the network from latents (B, L) to flat images (B, D) before any sigmoid."""
    hidden = config.hidden[::-1] if config.model == "mlp" else ()
    steps = list(pairwise(shapes(config, image_shape)[::-1]))
    first = math.prod(shapes(config, image_shape)[-1])
    layers = _linears((config.latent_size, *hidden, first))
    layers += [nn.ReLU(), nn.Unflatten(1, steps[0][0])] if steps else []
    for small, large in steps:
        more = output_padding(small, large)
        layers += [
            nn.ConvTranspose2d(small[0], large[0], KERNEL, STRIDE, PADDING, more),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers[:-1], nn.Flatten()) if steps else nn.Sequential(*layers)


def _linears(sizes: tuple[int, ...]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return layers[:-1]


def numbers(config: RunConfig, image_shape: Shape) -> int:
    """Return how many weights and biases both networks have, without making them."""
    found = shapes(config, image_shape)
    hidden = config.hidden if config.model == "mlp" else ()
    first, latents = math.prod(found[-1]), config.latent_size
    halves = ((first, *hidden, 2 * latents), (latents, *hidden[::-1], first))
    linear = sum((a + 1) * b for half in halves for a, b in pairwise(half))
    pairs = [(a, b) for (a, *_), (b, *_) in pairwise(found)]
    return linear + sum(2 * KERNEL**2 * a * b + a + b for a, b in pairs)


def layers(*networks: nn.Sequential) -> list[Plain]:
    """Return the layers of some networks that have weights, in order."""
    return [layer for network in networks for layer in network if isinstance(layer, Plain)]


@torch.no_grad()
def draw(layers: Iterable[Plain], stream: np.random.Generator) -> None:
    """Set weights and biases to U(-1, 1) / sqrt(inputs), PyTorch's default, from a stream."""
    for layer in layers:
        bound = 1 / math.sqrt(layer.weight[0].numel())
        for parameter in layer.parameters():
            drawn = stream.uniform(-bound, bound, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))


Weights = tuple[Tensor, Tensor]
"""Weight and bias of a layer of one run: (in, out) and (out,) of a linear one."""


def stacked_encoder(
    config: RunConfig, image_shape: Shape, runs: Sequence[nn.Sequential], latent_size: int
) -> MLP:
    """Return the encoders of some runs as one network; latents that a run lacks have weights 0.

    Args:
        config: of any of the runs; they share all that fixes shapes but the latent size.
        image_shape: (channels, height, width).
        runs: their encoders, whose weights are copied.
        latent_size: that of the stack.
    """
    *hidden, heads = zip(*(_weights(run) for run in runs), strict=True)
    steps = pairwise(shapes(config, image_shape))
    first = [_joined(Conv, *pair) for pair in zip_longest(hidden, steps)]
    return MLP([*first, _joined(Conv, [_padded_head(head, latent_size) for head in heads])])


def stacked_decoder(
    config: RunConfig, image_shape: Shape, runs: Sequence[nn.Sequential], latent_size: int
) -> MLP:
    """Return the decoders of some runs as one network, as `stacked_encoder` does."""
    firsts, *rest = zip(*(_weights(run) for run in runs), strict=True)
    steps = pairwise(shapes(config, image_shape)[::-1])
    last = [_joined(TransposedConv, *pair) for pair in zip_longest(rest, steps)]
    return MLP([_joined(Conv, [_padded_input(one, latent_size) for one in firsts]), *last])


def _weights(network: nn.Sequential) -> list[Weights]:
    found = []
    for layer in layers(network):
        weight, bias = (parameter.detach() for parameter in layer.parameters())
        found.append((facing(layer, weight), bias))
    return found


def facing(layer: Plain, weight: Tensor) -> Tensor:
    """Turn a run's weight into a stack's or back: that of a linear layer is (in, out) there."""
    return weight.T if isinstance(layer, nn.Linear) else weight


def _joined(
    kind: type[Conv], runs: Sequence[Weights], step: tuple[Shape, Shape] | None = None
) -> Linear | Conv:
    """Return one layer of all runs: linear, or a convolution that makes such a step."""
    weight, bias = (torch.stack(part) for part in zip(*runs, strict=True))
    return Linear(weight, bias) if step is None else kind(weight, bias, *step)


def _padded_head(head: Weights, latent_size: int) -> Weights:
    """Widen both halves of a head."""
    weight, bias = head
    halves = weight.unflatten(1, (2, -1)), bias.unflatten(0, (2, -1))
    missing = latent_size - halves[1].shape[1]
    wide = [functional.pad(half, (0, missing)) for half in halves]
    return wide[0].flatten(1), wide[1].flatten()


def _padded_input(first: Weights, latent_size: int) -> Weights:
    weight, bias = first
    return functional.pad(weight, (0, 0, 0, latent_size - len(weight))), bias
