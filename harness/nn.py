"""Layers with a leading run axis S: S independent networks computed as one.

A network of one run is S = 1; there is no other code path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

Shape = tuple[int, int, int]
"""(channels, height, width)."""

KERNEL, STRIDE, PADDING = 3, 2, 1
"""Of every convolution: a side of n pixels becomes one of n / 2, rounded up, whatever n is."""


@cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor that is made once: what a GPU records cannot copy them."""
    return torch.tensor(values, dtype=dtype, device=device)


@contextmanager
def steady_convolutions() -> Iterator[None]:
    """Convolve on a GPU as precisely as matrices are multiplied, and always to the same bits.

    PyTorch's own choice is tf32 there, and kernels whose sums depend on chance.
    """
    cudnn = torch.backends.cudnn
    conv = cudnn.conv  # type: ignore[attr-defined] # not in PyTorch's stubs
    before = cudnn.deterministic, conv.fp32_precision
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    cudnn.deterministic, conv.fp32_precision = True, "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        cudnn.deterministic, conv.fp32_precision = before


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Affine map of each run: y[s] = x[s] weight[s] + bias[s].

    Args:
        x: inputs, shape (S, B, in).
        weight: shape (S, in, out).
        bias: shape (S, out).

    Returns:
        Shape (S, B, out).
    """
    return torch.baddbmm(bias.unsqueeze(1), x, weight)


class Linear(nn.Module):
    """`linear` with its parameters: weight (S, in, out), bias (S, out)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous())
        self.bias = nn.Parameter(bias.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Map (S, B, in) to (S, B, out)."""
        return linear(x, self.weight, self.bias)


def halved(shape: Shape, channels: int) -> Shape:
    """Return the shape that a convolution of stride 2 makes of an image."""
    _, height, width = shape
    return channels, -(-height // STRIDE), -(-width // STRIDE)


def output_padding(small: Shape, large: Shape) -> tuple[int, int]:
    """Return the rows and columns by which a transposed convolution falls short: 0 or 1.

    It makes 2 n - 1 pixels of n, where `halved` makes n of 2 n - 1 and of 2 n alike.
    """
    (_, *few), (_, *many) = small, large
    height, width = (b - (STRIDE * (a - 1) + 1) for a, b in zip(few, many, strict=True))
    return height, width


class Conv(nn.Module):
    """A convolution 3 x 3 of stride 2 of each run, on flat images; all as one, a group a run.

    Args:
        weight: shape (S, out, in, 3, 3).
        bias: shape (S, out).
        inputs: shape of an image.
        outputs: `halved(inputs, out)`.
    """

    def __init__(self, weight: Tensor, bias: Tensor, inputs: Shape, outputs: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous())
        self.bias = nn.Parameter(bias.contiguous())
        self.inputs, self.outputs = inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (S, B, pixels of `inputs`) to (S, B, pixels of `outputs`)."""
        images = x.unflatten(-1, self.inputs).transpose(0, 1).flatten(1, 2)
        with steady_convolutions():
            y = self._convolve(images, self.weight.flatten(0, 1), self.bias.flatten())
        return y.unflatten(1, self.bias.shape).transpose(0, 1).flatten(2)

    def _convolve(self, images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Map (B, S in, height, width) to (B, S out, height, width)."""
        runs = len(self.bias)
        return functional.conv2d(images, weight, bias, STRIDE, PADDING, groups=runs)


class TransposedConv(Conv):
    """The same the other way round: from half the size, weight (S, in, out, 3, 3)."""

    def _convolve(self, images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        more, runs = output_padding(self.inputs, self.outputs), len(self.bias)
        return functional.conv_transpose2d(images, weight, bias, STRIDE, PADDING, more, runs)


class MLP(nn.Module):
    """Layers with a ReLU between them and none after the last."""

    def __init__(self, layers: Sequence[Linear | Conv]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (S, B, in) to (S, B, out)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x).relu()
        return last(x)
