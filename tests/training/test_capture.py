"""What a GPU captures runs on it alone; shown here on tensors that only pretend to be on one.

PyTorch's fake tensors have shapes, types and devices, compute nothing, and need no GPU. Waiting for
a value, or copying from or to the host, both of which break a capture, raises an error there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import harness
from harness import RunConfig
from harness.data.dataset import Dataset
from harness.likelihoods import Laplace
from harness.models.stack import kernels
from harness.objective import Batch
from harness.registry import BUILT_IN_TERMS
from harness.training import engine
from harness.training.checkpoint import Saved
from harness.training.step import Step

GPU = "lazy"
"""A type of device without streams: autograd of a pretended "cuda" looks for the real one."""

NO_SETTINGS = {"hidden": RunConfig.hidden, "channels": RunConfig.channels}  # of built-in networks
BASE = RunConfig(hidden=(8,), channels=(4,), latent_size=3, epochs=2, batch_size=16)
STACKS = {
    "one": [{}],
    "mixed": [{"seed": i, "kl_weight": 0.1 * i, "kl_warmup_epochs": i} for i in range(3)],
    "relu": [{"head": "relu", "learning_rate": 1e-3 * (1 + i)} for i in range(2)],
    "conv": [{"model": "conv", "seed": i} for i in range(2)],
    "bernoulli": [{"likelihood": "bernoulli", "binarization": "stochastic", "free_bits": 0.1}],
    "laplace": [{"likelihood": "laplace", "seed": i} for i in range(2)],
    "laplace optimal": [{"likelihood": "laplace", "sigma": "optimal", "seed": i} for i in range(2)],
    "without fit": [{"likelihood": "unfitted", "sigma": "learned", "seed": i} for i in range(2)],
    "continuous": [{"likelihood": "continuous_bernoulli", "seed": i} for i in range(2)],
    "optimal": [{"sigma": "optimal", "seed": i} for i in range(2)],
    "learned": [{"sigma": "learned", "free_bits": 0.1 * (1 + i)} for i in range(2)],
    "autoencoder": [{"latent": "deterministic", "kl_weight": 0.0}],
    "recipes": [  # PyTorch's fake kernels have no rates in tensors, and no SGD
        {"optimizer": name, "clip_norm": 0.1, "keep": "best"} for name in ("adam", "adamw")
    ],
    "a term": [{"terms": {"to_prior": weight}} for weight in (0.0, 2.0)],
    "built-in terms": [{"terms": dict.fromkeys(BUILT_IN_TERMS, weight)} for weight in (0.0, 2.0)],
    "a network": [{"model": "normalized", "seed": i, **NO_SETTINGS} for i in range(2)],
}


@pytest.fixture(params=STACKS)
def configs(request: pytest.FixtureRequest, additions: None) -> list[RunConfig]:
    """Return the runs of a stack."""
    return [BASE.replace(**changes) for changes in STACKS[request.param]]


@pytest.fixture
def additions(registered: None) -> None:
    @harness.network("normalized")
    def normalized(data_shape: tuple[int, ...], latent_size: int) -> tuple[nn.Module, nn.Module]:
        pixels = torch.Size(data_shape).numel()
        encoder = nn.Sequential(
            *(nn.Flatten(), nn.Linear(pixels, 8), nn.BatchNorm1d(8), nn.Tanh()),
            nn.Linear(8, 2 * latent_size),
        )
        decoder = nn.Sequential(
            *(nn.Linear(latent_size, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, pixels)),
            nn.Unflatten(1, data_shape),
        )
        return encoder, decoder

    @harness.likelihood("unfitted")
    class Unfitted(Laplace):
        fit = None

    @harness.term("to_prior")
    def to_prior(batch: Batch) -> Tensor:
        difference = batch.z.sort(0).values - batch.prior.sort(0).values
        return batch.progress * difference.square().mean() / batch.training_size


def started(configs: list[RunConfig], data: Dataset, device: str = "cpu") -> Step:
    saved, place = [Saved([], {}) for _ in configs], torch.device(device)
    work = engine._begin(configs, saved, data, place, torch.float32)
    (state,) = work.states.values()
    return work.steps[0] if work.steps else Step(state, work.data, work.linear)


def elsewhere(tensor: Tensor) -> Tensor:
    strides = tensor.stride()
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=GPU)


class Moved(TorchFunctionMode):
    """Copies of tensors are made on the pretended GPU."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - PyTorch's own form
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), elsewhere(tensor))
        return func(*args, **(kwargs or {}))


def moved_parameter(parameter: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
    return memo.setdefault(id(parameter), nn.Parameter(elsewhere(parameter.data)))


class OnGPUAlone(TorchDispatchMode):
    """Refuse operations that read or write tensors of the host.

    `torch.vmap` makes tensors of Python's numbers; they are constants of a kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - PyTorch's own form
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        result = func(*args, **(kwargs or {}))
        made = [v for v in tree_leaves(result) if isinstance(v, Tensor)]
        if not given and all(v.dim() == 0 for v in made):
            self.numbers += made
        known = {id(number) for number in self.numbers}
        touched = [v for v in (*given, *made) if v.device.type != GPU and id(v) not in known]
        assert not touched, f"{func} touches the host"
        return result


@contextmanager
def pretended_gpu() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def move(step: Step) -> Step:
    step._ahead = {}  # the next epoch's draws, an iterator, are no part of what is captured
    with ExitStack() as moving:
        moving.enter_context(Moved())
        moving.enter_context(patch.object(nn.Parameter, "__deepcopy__", moved_parameter))
        return copy.deepcopy(step)


def test_what_a_gpu_captures_neither_waits_nor_touches_the_host(configs, tiny, together):
    step = started(configs, tiny)
    with pretended_gpu():
        moved = move(step)
        assert moved.state.weights.device.type == moved.state.model.device.type == GPU
        with torch.no_grad():
            for captured in (moved._step, moved._metrics):
                captured()
                with OnGPUAlone():
                    captured()


def test_the_pretended_gpu_finds_what_would_break_a_capture():
    with pretended_gpu():
        values, kept_on_the_host = torch.zeros(3, device=GPU), torch.ones(())
        with OnGPUAlone():
            values + values
            with pytest.raises(AssertionError, match="touches the host"):
                values.copy_(torch.ones(3))
            with pytest.raises(AssertionError, match="touches the host"):
                values * kept_on_the_host
            with pytest.raises(AssertionError, match="touches the host"):
                values.cpu()
            with pytest.raises(Exception, match="item|data-dependent|scalar"):
                values.sum().item()


def test_metrics_are_of_the_weights_as_they_are_with_the_same_noise(tiny, parts):
    step = started([BASE], tiny)
    (before,), (again,) = step.measure(), step.measure()
    assert before == again
    step.epoch(1)
    ((_, val),) = step.measure()
    assert val["mse"] < before[1]["mse"]


@pytest.mark.gpu
def test_metrics_that_were_captured_are_those_of_the_weights_as_they_are(configs, tiny):
    step = started(configs, tiny, "cuda")
    step.measure()
    step.epoch(1)
    with torch.no_grad(), kernels():
        eager = step._metrics()
    for row, found in enumerate(step.measure()):
        for ours, its in zip(found, eager, strict=True):
            for name, values in its.items():
                expected = pytest.approx(float(values[row]), nan_ok=True, rel=0, abs=0)
                assert ours[name] == expected, name
