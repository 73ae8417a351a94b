"""Stacked layers are S independent torch.nn layers."""

import torch
from torch import nn
from torch.nn import functional

from harness.nn import MLP, Linear, linear


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
