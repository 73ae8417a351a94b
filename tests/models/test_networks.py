"""Stacked layers are S independent torch.nn layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import conv2d, conv_transpose2d

from harness.nn import (
    MLP,
    Conv,
    Linear,
    TransposedConv,
    halved,
    linear,
    output_padding,
    steady_convolutions,
)
from harness.step import products_in


def random_layer(runs: int, inputs: int, outputs: int) -> Linear:
    return Linear(
        torch.randn(runs, inputs, outputs, dtype=torch.float64),
        torch.randn(runs, outputs, dtype=torch.float64),
    )


def test_linear_is_a_torch_linear_layer_per_run():
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    weight, bias = torch.randn(3, 4, 2).double(), torch.randn(3, 2).double()
    y = linear(x, weight, bias)
    for s in range(3):
        torch.testing.assert_close(y[s], functional.linear(x[s], weight[s].T, bias[s]))


def test_linear_couples_no_runs():
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    layer = random_layer(3, 4, 2)
    layer(x)[1].sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    for gradient in (x.grad, layer.weight.grad):
        assert gradient[1].abs().sum() > 0
        assert not gradient[[0, 2]].any()


@pytest.mark.parametrize("sides", [(5, 8), (6, 7), (1, 2)])
def test_convolutions_are_torchs_per_run_there_and_back(sides):
    large, small = (2, *sides), halved((2, *sides), 3)
    there, back = torch.randn(4, 3, 2, 3, 3).double(), torch.randn(4, 3, 2, 3, 3).double()
    bias, other = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    x = torch.rand(4, 6, *large, dtype=torch.float64)
    y = Conv(there, bias, large, small)(x.flatten(2)).unflatten(2, small)
    z = TransposedConv(back, other, small, large)(y.flatten(2)).unflatten(2, large)
    more = output_padding(small, large)
    for s in range(4):
        torch.testing.assert_close(y[s], conv2d(x[s], there[s], bias[s], 2, 1))
        own = conv_transpose2d(y[s], back[s], other[s], 2, 1, more)
        torch.testing.assert_close(z[s], own)


def test_convolutions_couple_no_runs():
    layer = Conv(torch.randn(3, 2, 1, 3, 3), torch.zeros(3, 2), (1, 4, 4), (2, 2, 2))
    x = torch.rand(3, 5, 16, requires_grad=True)
    layer(x)[1].sum().backward()
    assert x.grad is not None
    assert not x.grad[[0, 2]].any()
    assert x.grad[1].any()


def test_convolutions_follow_the_precision_of_products_and_leave_no_setting_behind():
    cudnn, seen = torch.backends.cudnn, []
    before = cudnn.deterministic, cudnn.conv.fp32_precision
    for precision in ("float32", "tf32"):
        with products_in(precision), steady_convolutions():
            seen.append((cudnn.deterministic, cudnn.conv.fp32_precision))
    with steady_convolutions():
        seen.append((cudnn.deterministic, cudnn.conv.fp32_precision))
    assert seen == [(True, "ieee"), (True, "tf32"), (True, "ieee")]
    assert (cudnn.deterministic, cudnn.conv.fp32_precision) == before


def test_mlp_is_a_torch_sequential_per_run():
    layers = [random_layer(3, 4, 6), random_layer(3, 6, 5), random_layer(3, 5, 2)]
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    y = MLP(layers)(x)
    for s in range(3):
        plain = nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
        ).double()
        with torch.no_grad():
            for own, stacked in zip(plain[::2], layers, strict=True):
                own.weight.copy_(stacked.weight[s].T)
                own.bias.copy_(stacked.bias[s])
        torch.testing.assert_close(y[s], plain(x[s]))


def test_mlp_of_one_layer_is_linear():
    layer = random_layer(2, 4, 3)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    assert torch.equal(MLP([layer])(x), layer(x))
