"""Twelve networks as users write them, for images (C, H, W) of even height and width.

Registered by `registry.load("benchmarks/users_networks.py:NAME", "network")`; `benchmarks.networks`
measures them, and tests train them.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from harness import network

Pair = tuple[nn.Module, nn.Module]
Shape = tuple[int, int, int]


def encoder_of(shape: Shape, latent_size: int, width: int, *layers: nn.Module) -> nn.Module:
    """Return linear layers around the given ones."""
    first, last = nn.Linear(math.prod(shape), width), nn.Linear(width, 2 * latent_size)
    return nn.Sequential(nn.Flatten(), first, *layers, last)


def decoder_of(shape: Shape, latent_size: int, width: int, *layers: nn.Module) -> nn.Module:
    """Return linear layers around the given ones, by default a ReLU."""
    first, last = nn.Linear(latent_size, width), nn.Linear(width, math.prod(shape))
    return nn.Sequential(first, *(layers or [nn.ReLU()]), last, nn.Unflatten(1, shape))


def mlp(
    shape: Shape, latent_size: int, width: int, layers: Callable[[], Sequence[nn.Module]]
) -> Pair:
    """Return an encoder and a decoder of linear layers around new ones."""
    encoder = encoder_of(shape, latent_size, width, *layers())
    return encoder, decoder_of(shape, latent_size, width, *layers())


@network("layer_norm")
def layer_norm(shape: Shape, latent_size: int, width: int = 64) -> Pair:
    """Return an MLP with LayerNorm and Tanh."""
    return mlp(shape, latent_size, width, lambda: [nn.LayerNorm(width), nn.Tanh()])


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return x + f(x)."""
        return x + self.inner(x)


@network("residual_mlp")
def residual_mlp(shape: Shape, latent_size: int, width: int = 64, depth: int = 2) -> Pair:
    """Return an MLP of residual blocks."""
    return mlp(shape, latent_size, width, lambda: [*map(Residual, [width] * depth)])


@network("group_norm")
def group_norm(shape: Shape, latent_size: int, width: int = 16) -> Pair:
    """Return convolutions with GroupNorm, and a plain decoder."""
    channels, height, across = shape
    encoder = nn.Sequential(
        *(nn.Conv2d(channels, width, 3, 2, 1), nn.GroupNorm(4, width), nn.SiLU()),
        *(nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(4, width), nn.SiLU(), nn.Flatten()),
        nn.Linear(width * (height // 2) * (across // 2), 2 * latent_size),
    )
    return encoder, decoder_of(shape, latent_size, 4 * width)


@network("upsampling")
def upsampling(shape: Shape, latent_size: int, width: int = 16) -> Pair:
    """Return a strided convolution, and a decoder that doubles a smaller image."""
    channels, height, across = shape
    small = width, height // 2, across // 2
    encoder = nn.Sequential(
        *(nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU(), nn.Flatten()),
        nn.Linear(math.prod(small), 2 * latent_size),
    )
    decoder = nn.Sequential(
        *(nn.Linear(latent_size, math.prod(small)), nn.ReLU(), nn.Unflatten(1, small)),
        *(nn.Upsample(scale_factor=2), nn.Conv2d(width, channels, 3, 1, 1)),
    )
    return encoder, decoder


class Transposed(nn.Module):
    """A linear layer with the transposed weights of another."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = nn.Parameter(torch.zeros(layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output (B, inputs of the other)."""
        return nn.functional.linear(x, self.weight.t(), self.bias)


class Mean(nn.Linear):
    """A linear layer for the mean; the log-variances are parameters."""

    def __init__(self, pixels: int, latent_size: int) -> None:
        super().__init__(pixels, latent_size)
        self.log_variance = nn.Parameter(torch.zeros(latent_size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the posterior's parameters."""
        mean = super().forward(x)
        return torch.cat([mean, self.log_variance.expand_as(mean)], 1)


@network("tied")
def tied(shape: Shape, latent_size: int) -> Pair:
    """Return linear layers that share their weights."""
    head = Mean(math.prod(shape), latent_size)
    return nn.Sequential(nn.Flatten(), head), nn.Sequential(
        Transposed(head), nn.Unflatten(1, shape)
    )


class Attention(nn.Module):
    """Self-attention among patches of 2 x 2 pixels."""

    def __init__(self, shape: Shape, latent_size: int, width: int) -> None:
        super().__init__()
        channels, height, across = shape
        self.patches = nn.Conv2d(channels, width, 2, 2)
        self.places = nn.Parameter(torch.randn(height // 2 * (across // 2), width) / 10)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 2 * latent_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the posterior's parameters."""
        patches = self.patches(x).flatten(2).transpose(1, 2) + self.places
        mixed, _ = self.attention(patches, patches, patches, need_weights=False)
        return self.head((patches + mixed).mean(1))


@network("attention")
def attention(shape: Shape, latent_size: int, width: int = 16) -> Pair:
    """Return attention over patches, and a plain decoder."""
    return Attention(shape, latent_size, width), decoder_of(shape, latent_size, 4 * width)


class Rows(nn.Module):
    """A recurrent network that reads an image row by row."""

    def __init__(self, shape: Shape, latent_size: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(shape[0] * shape[2], width, batch_first=True)
        self.head = nn.Linear(width, 2 * latent_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the posterior's parameters."""
        _, last = self.gru(x.transpose(1, 2).flatten(2))
        return self.head(last[0])


@network("recurrent")
def recurrent(shape: Shape, latent_size: int, width: int = 32) -> Pair:
    """Return a GRU over rows, and a plain decoder."""
    return Rows(shape, latent_size, width), decoder_of(shape, latent_size, 2 * width)


class Centred(nn.Module):
    """Less the running mean of the batches that it has seen, in frequencies drawn once."""

    frequencies: Tensor
    mean: Tensor

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(inputs, width) / math.sqrt(inputs))
        self.register_buffer("mean", torch.zeros(inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return cosines (B, width)."""
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return torch.cos((x - self.mean) @ self.frequencies)


@network("buffers")
def buffers(shape: Shape, latent_size: int, width: int = 64) -> Pair:
    """Return random Fourier features with a linear layer, and a plain decoder."""
    features = Centred(math.prod(shape), width)
    encoder = nn.Sequential(nn.Flatten(), features, nn.Linear(width, 2 * latent_size))
    return encoder, decoder_of(shape, latent_size, width)


@network("dropout")
def dropout(shape: Shape, latent_size: int, width: int = 64, share: float = 0.2) -> Pair:
    """Return an MLP with dropout."""
    return mlp(shape, latent_size, width, lambda: [nn.ReLU(), nn.Dropout(share)])


@network("batch_norm")
def batch_norm(shape: Shape, latent_size: int, width: int = 64) -> Pair:
    """Return an MLP with BatchNorm."""
    return mlp(shape, latent_size, width, lambda: [nn.BatchNorm1d(width), nn.ReLU()])


class Branch(nn.Module):
    """A limit at 1, applied where a value is above it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return min(x, 1)."""
        return x.clamp(max=1) if x.max() > 1 else x


@network("branch")
def branch(shape: Shape, latent_size: int, width: int = 64) -> Pair:
    """Return an MLP with a forward that branches in Python on a value."""
    return encoder_of(shape, latent_size, width, Branch()), decoder_of(shape, latent_size, width)


@network("spatial")
def spatial(shape: Shape, latent_size: int, width: int = 16) -> Pair:
    """Return convolutions whose code is small images (latent_size / 4, 2, 2), flattened."""
    channels, height, across = shape
    code = latent_size // 4, 2, 2
    encoder = nn.Sequential(
        *(nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(code[1:])),
        *(nn.Conv2d(width, 2 * code[0], 1), nn.Flatten()),
    )
    decoder = nn.Sequential(
        *(nn.Unflatten(1, code), nn.Upsample(size=(height, across), mode="bilinear")),
        *(nn.Conv2d(code[0], width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, channels, 3, 1, 1)),
    )
    return encoder, decoder
