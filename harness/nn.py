"""Layers with a leading run axis S: S independent networks computed as one.

A network of one run is S = 1; there is no other code path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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


class MLP(nn.Module):
    """Linear layers with a ReLU between them and none after the last."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (S, B, in) to (S, B, out)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x).relu()
        return last(x)
