"""Runs of equal shapes computed as one: the only module with a run axis S.

Every network, loss term and metric is written for one run. `lift` maps such functions over S runs
with `torch.func` (Wang et al. 2021, 2102.02344, call the idea horizontal fusion).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import UPDATE, Precision, RunConfig
from harness.models.vae import VAE

# Settings in which runs of one stack may differ; free bits, clip_norm and terms' weights may, too.
MAPPED = {"kl_weight", "kl_normalization", "kl_warmup_epochs", "kl_cycles", "seed", "patience"}
MAPPED |= {*UPDATE}


def stack_key(config: RunConfig) -> tuple[object, ...]:
    """Return what all runs of a stack share: shapes, branches and the names of terms."""
    mapped = {*MAPPED, "free_bits", "clip_norm", "terms"}
    shared = [getattr(config, f.name) for f in fields(config) if f.name not in mapped]
    return (*shared, config.free_bits > 0, config.clip_norm > 0, *config.terms)


class _Call(nn.Module):
    # A function of a model as a module, whose weights `functional_call` can replace.

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401
        return function(self.model, *args)


def lift(model: VAE, function: Callable[..., Any], *, gradient: bool = False) -> Callable[..., Any]:
    """Return a function (model, *arguments) -> tensors of one run as a function of S runs.

    It takes weights and constants of the runs before the arguments: trained parameters by name, and
    all other parameters and buffers. All of them and the results have a leading axis S. Tensors may
    be in tuples and dictionaries; other arguments must be None. With `gradient` the function
    returns a loss, and the result is its gradient by weight, of the model in `train` mode.
    """
    if has_hooks(model):
        raise ValueError("a module or a parameter has a hook or the like")
    named = [m for _, m in model.named_modules(remove_duplicate=False) if m.state_dict()]
    if len(named) > len(set(named)):  # functional_call does not give its weights back
        raise ValueError("a module is used twice")
    call = _Call(model)

    def of_one(weights: Any, constants: Any, *args: Any) -> Any:  # noqa: ANN401
        numbers = {f"model.{name}": value for name, value in (weights | constants).items()}
        return torch.func.functional_call(call, numbers, (function, *args))

    mapped = torch.func.grad(of_one) if gradient else of_one

    def of_all(*args: Any) -> Any:  # noqa: ANN401
        model.train(gradient)
        return torch.vmap(mapped, map_tensors(lambda _: 0, args))(*args)

    return of_all


def map_tensors(function: Callable[..., Any], *values: Any) -> Any:  # noqa: ANN401
    """Apply a function to the tensors in equal tuples and dictionaries; others become None."""
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


@contextmanager
def kernels(precision: Precision = "float32") -> Iterator[None]:
    """Make a GPU multiply and convolve at this precision, always to the same bits."""
    # PyTorch's defaults are tf32 for convolutions, and kernels whose sums depend on chance.
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    conv = cudnn.conv  # type: ignore[attr-defined] # not in PyTorch's stubs
    before = matmul.fp32_precision, cudnn.deterministic, conv.fp32_precision
    wanted = {"float32": "ieee", "tf32": "tf32"}[precision]
    matmul.fp32_precision, cudnn.deterministic, conv.fp32_precision = wanted, True, wanted
    try:
        yield
    finally:
        matmul.fp32_precision, cudnn.deterministic, conv.fp32_precision = before
