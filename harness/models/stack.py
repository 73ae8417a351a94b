"""Runs of equal shapes computed as one: the only place that knows a run axis S.

Every network, loss term and metric is written for one run. `Stack` maps such functions over S runs
with `torch.func` (Wang et al. 2021, 2102.02344, call the idea horizontal fusion).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import Precision, RunConfig
from harness.models.vae import VAE

MAPPED = {"kl_weight", "kl_normalization", "kl_warmup_epochs", "kl_cycles", "learning_rate", "seed"}
"""Settings that runs of one stack may differ in; free bits and weights of terms may, too."""


def stack_key(config: RunConfig) -> tuple[object, ...]:
    """Return what all runs of a stack share: shapes, branches and the names of terms."""
    mapped = {*MAPPED, "free_bits", "terms"}
    shared = [getattr(config, f.name) for f in fields(config) if f.name not in mapped]
    return (*shared, config.free_bits > 0, *config.terms)


class _Call(nn.Module):
    """A function of a model as a module, whose weights `functional_call` can replace."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401
        return function(self.model, *args)


class Stack:
    """The weights of S runs, and functions of one run mapped over them.

    Models have equal architecture; their weights and buffers are copied.

    Attributes:
        form: a model of this architecture, whose numbers are not used.
        weights: trained parameters by name, shape (S, ...); replace or change them in place.
        constants: buffers and frozen parameters by name, shape (S, ...).
    """

    def __init__(self, runs: Sequence[VAE]) -> None:
        self.form = copy.deepcopy(runs[0])
        self._call = _Call(self.form)
        parameters, self.constants = torch.func.stack_module_state(list(runs))
        frozen = {name for name, p in self.form.named_parameters() if not p.requires_grad}
        self.weights = {n: p.detach() for n, p in parameters.items() if n not in frozen}
        self.constants |= {n: p.detach() for n, p in parameters.items() if n in frozen}

    def lift(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function (model, *arguments) -> tensors of one run as a function of all.

        Its arguments and results have a leading axis S, and the model is in `eval` mode. Tensors
        may be in tuples and dictionaries; other arguments must be None.
        """

        def lifted(*args: Any) -> Any:  # noqa: ANN401
            self.form.eval()
            return self._map(self._of_weights(function), *args)

        return lifted

    def gradient(self, function: Callable[..., Tensor], *args: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """Return the gradient of (model, *args) -> loss with respect to each weight, (S, ...).

        Arguments have a leading axis S as for `lift`, and the model is in `train` mode.
        """
        self.form.train()
        return self._map(torch.func.grad(self._of_weights(function)), *args)

    def _of_weights(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def applied(weights: Any, constants: Any, *args: Any) -> Any:  # noqa: ANN401
            named = {f"model.{name}": value for name, value in (weights | constants).items()}
            return torch.func.functional_call(self._call, named, (function, *args))

        return applied

    def _map(self, function: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401
        given = (self.weights, self.constants, *args)
        return torch.vmap(function, map_tensors(lambda tensor: 0, given))(*given)

    @torch.no_grad()
    def run(self, row: int) -> VAE:
        """Return a copy of one run."""
        model = copy.deepcopy(self.form).eval()
        state = self.weights | self.constants
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            value.copy_(state[name][row])
        return model


def map_tensors(function: Callable[..., Any], *values: Any) -> Any:  # noqa: ANN401
    """Apply a function to the tensors in equal structures of tuples and dictionaries.

    What is neither tuple, dictionary nor tensor becomes None.
    """
    first = values[0]
    if isinstance(first, Tensor):
        return function(*values)
    if isinstance(first, Mapping):
        return {key: map_tensors(function, *(value[key] for value in values)) for key in first}
    if isinstance(first, tuple):
        made = [map_tensors(function, *parts) for parts in zip(*values, strict=True)]
        return type(first)(*made) if hasattr(first, "_fields") else tuple(made)
    return None


def has_hooks(model: nn.Module) -> bool:
    """Return whether a module or parameter has a hook, a parametrization or a replaced forward."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(
        "forward" in vars(module)
        or any(getattr(module, name, None) for name in (*hooks, "parametrizations"))
        for module in model.modules()
    ) or any(
        p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
        for p in model.parameters()
    )


def uses_a_module_twice(model: nn.Module) -> bool:
    """Return whether a module with weights or buffers has two names in a model."""
    named = [m for _, m in model.named_modules(remove_duplicate=False) if m.state_dict()]
    return len(named) > len({id(module) for module in named})


@contextmanager
def kernels(precision: Precision = "float32") -> Iterator[None]:
    """Make a GPU multiply and convolve at this precision, always to the same bits.

    PyTorch's default for convolutions is tf32, and kernels whose sums depend on chance.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    conv = cudnn.conv  # type: ignore[attr-defined] # not in PyTorch's stubs
    before = matmul.fp32_precision, cudnn.deterministic, conv.fp32_precision
    wanted = {"float32": "ieee", "tf32": "tf32"}[precision]
    matmul.fp32_precision, cudnn.deterministic, conv.fp32_precision = wanted, True, wanted
    try:
        yield
    finally:
        matmul.fp32_precision, cudnn.deterministic, conv.fp32_precision = before
