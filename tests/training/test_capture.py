"""What a GPU records must run on it alone; shown here on tensors that only pretend to be on one.

PyTorch's fake tensors know shapes, types and devices, compute nothing, and need no GPU. Waiting for
a value, or copying from or to the host, both of which break a recording, raises an error there.
"""

from __future__ import annotations

import copy
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from harness.gauge import Gauge
from harness.nn import constant
from harness.part import Part, begin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness import RunConfig
from harness.data.dataset import Dataset

BASE = RunConfig(hidden=(8,), latent_size=3, epochs=2, batch_size=16)
STACKS = {
    "one": [BASE],
    "mixed": [BASE.replace(seed=i, latent_size=2 + i, kl_weight=0.1 * i) for i in range(3)],
    "relu": [BASE.replace(head="relu", learning_rate=1e-3 * (1 + i)) for i in range(2)],
    "bernoulli": [BASE.replace(likelihood="bernoulli", binarization="stochastic", free_bits=0.1)],
    "variances": [BASE.replace(sigma=sigma) for sigma in ("fixed", "optimal", "learned")],
    "autoencoder": [BASE.replace(latent="deterministic", kl_weight=0.0)],
}


def started(configs: list[RunConfig], data: Dataset) -> Part:
    linear = torch.zeros(2, len(configs), dtype=torch.float64)
    shown = data.binarized(configs[0].binarization)
    return begin(configs, range(len(configs)), data, shown, linear, torch.float32)[0]


def elsewhere(tensor: Tensor) -> Tensor:
    strides = tensor.stride()
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="cuda")


def in_a_process_of_its_own(test: Callable[..., None]) -> Callable[..., None]:
    """A process that has seen a pretended GPU can no longer fork workers that use autograd."""

    @wraps(test)
    def forked(**fixtures: Any) -> None:
        child = multiprocessing.get_context("fork").Process(target=test, kwargs=fixtures)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pytest-xdist has threads
            child.start()
        child.join()
        assert child.exitcode == 0

    return forked


class Moved(TorchFunctionMode):
    """Copies of tensors are made on the pretended GPU."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - PyTorch's own form
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), elsewhere(tensor))
        return func(*args, **(kwargs or {}))


def moved_parameter(parameter: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
    moved = nn.Parameter(elsewhere(parameter.data))
    if parameter.grad is not None:
        moved.grad = elsewhere(parameter.grad)
    return memo.setdefault(id(parameter), moved)


class OnGPUAlone(TorchDispatchMode):
    """Refuse operations that read or write tensors of the host."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - PyTorch's own form
        given = tree_leaves((args, kwargs))
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (*given, *tree_leaves(result)) if isinstance(t, Tensor)]
        assert all(t.device.type == "cuda" for t in tensors), f"{func} touches the host"
        return result


@contextmanager
def pretended_gpu() -> Iterator[None]:
    constant.cache_clear()  # a recording finds constants made: its warm-up made them
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    constant.cache_clear()


def move(part: Part) -> Part:
    with ExitStack() as moving:
        moving.enter_context(Moved())
        moving.enter_context(patch.object(nn.Parameter, "__deepcopy__", moved_parameter))
        return copy.deepcopy(part)


@pytest.mark.parametrize("configs", STACKS.values(), ids=STACKS)
@in_a_process_of_its_own
def test_what_a_gpu_records_neither_waits_nor_touches_the_host(configs, tiny):
    part = started(configs, tiny)
    part.train(1)
    with pretended_gpu():
        moved = move(part)
        assert moved.model.device.type == "cuda"
        for recorded in (moved.step._counted, moved.gauge._metrics):
            recorded()
            with OnGPUAlone():
                recorded()


@in_a_process_of_its_own
def test_the_pretended_gpu_finds_what_would_break_a_recording():
    with pretended_gpu():
        values = torch.zeros(3, device="cuda")
        with OnGPUAlone():
            values + values
            with pytest.raises(AssertionError, match="touches the host"):
                values.copy_(torch.ones(3))
            with pytest.raises(AssertionError, match="touches the host"):
                values.cpu()
            with pytest.raises(Exception, match="item|data-dependent|scalar"):
                values.sum().item()


def test_a_gauge_reads_the_live_weights_with_the_same_noise(tiny):
    part = started(STACKS["mixed"], tiny)
    (train, val), (again, _) = part.gauge.read(), part.gauge.read()
    assert all(np.array_equal(train[name], again[name], equal_nan=True) for name in train)
    part.train(1)
    assert (part.gauge.read()[1]["mse"] < val["mse"]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("configs", STACKS.values(), ids=STACKS)
def test_metrics_that_were_recorded_are_those_of_the_live_weights(configs, tiny):
    on_gpu = tiny.to(torch.device("cuda"))
    part = started(configs, on_gpu)
    part.gauge.read()
    part.train(1)
    fresh = Gauge(part.model, part.gauge._data, part.gauge._linear)
    with patch.object(Gauge, "capture"):
        eager = fresh.read()
    for ours, its in zip(part.gauge.read(), eager, strict=True):
        for name, values in its.items():
            np.testing.assert_array_equal(ours[name], values, err_msg=name)
