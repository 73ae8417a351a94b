"""Optimisers: the kernels of `torch.optim` on the weights of runs, and rates of their epochs."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.config import UPDATE, RunConfig


def learning_rate(config: RunConfig, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 1.

    rate = learning_rate * min(1, epoch / (W + 1)) * s(t),  t = max(0, epoch - 1 - W)

    W: warm-up epochs. s: 1; (1 + cos(pi t / (epochs - W))) / 2 (Loshchilov & Hutter 2017,
    1608.03983); lr_factor^t; or lr_factor^(number of milestones <= t). They are LinearLR(1/(W+1)),
    then CosineAnnealingLR, ExponentialLR or MultiStepLR of `torch.optim`, stepped once an epoch.
    """
    warmup = config.lr_warmup_epochs
    done = max(0, epoch - 1 - warmup)
    share = {
        "constant": 1.0,
        "cosine": (1 + math.cos(math.pi * done / (config.epochs - warmup))) / 2,
        "exponential": config.lr_factor**done,
        "steps": config.lr_factor ** bisect_right(config.lr_milestones, done),
    }[config.lr_schedule]
    return config.learning_rate * min(1.0, epoch / (warmup + 1)) * share


@dataclass
class _Group:  # runs of a stack with equal settings of the update: one call of a kernel
    config: RunConfig
    kernel: Callable[..., None]
    tensors: list[list[Tensor]]
    rate: float | Tensor


class Optimizer:
    """The update of weights of runs in place.

    The buffers are weights, gradient, first and second moment, shape (S, P), and steps taken (S,).
    The step is `captured` by a GPU: then rates that change lie in its memory.
    """

    def __init__(self, configs: Sequence[RunConfig], *buffers: Tensor, captured: bool) -> None:
        weights, gradient, first, second, counts = buffers
        self._gradient, self._counts, self._one = gradient, counts, torch.ones_like(counts[0])
        limits = gradient.new_tensor([config.clip_norm for config in configs]).unsqueeze(1)
        self._limits = limits if configs[0].clip_norm else None
        alike: dict[object, list[int]] = {}
        for row, config in enumerate(configs):
            key = tuple(getattr(config, name) for name in UPDATE)
            alike.setdefault(key, []).append(row)
        self._groups = []
        for rows in alike.values():
            config = configs[rows[0]]
            read: tuple[Any, ...] = (weights, gradient, first, second, (), counts)
            if config.optimizer == "sgd":
                read = weights, gradient, first if config.momentum else ()
            tensors = [[buffer[row] for row in rows if len(buffer)] for buffer in read]
            rate: float | Tensor = config.learning_rate
            if captured and (config.lr_schedule != "constant" or config.lr_warmup_epochs):
                kind = torch.float32 if weights.is_cuda else torch.float64  # as kernels read it
                rate = torch.tensor(rate, dtype=kind, device=weights.device)
            self._groups.append(_Group(config, _kernel(config), tensors, rate))

    def begin(self, epoch: int) -> None:
        """Set the rates of an epoch, counted from 1."""
        for group in self._groups:
            rate = learning_rate(group.config, epoch)
            if isinstance(group.rate, Tensor):
                group.rate.fill_(rate)
            else:
                group.rate = rate

    def step(self) -> None:
        """Take a step; gradients longer than `clip_norm` are shortened in place."""
        if self._limits is not None:  # as torch.nn.utils.clip_grad_norm_
            norms = torch.linalg.vector_norm(self._gradient, dim=1, keepdim=True)
            self._gradient.mul_((self._limits / (norms + 1e-6)).clamp_(max=1.0))
        self._counts.add_(self._one)
        for group in self._groups:
            group.kernel(*group.tensors, lr=group.rate)


def _kernel(config: RunConfig) -> Callable[..., None]:
    # The kernels themselves, as of PyTorch 2.11 to 2.15: on a CPU `torch.optim.adam.adam` needs
    # 65 us more a step, and the class imports torch.compile at its first use, for seconds.
    settings: dict[str, Any] = {"weight_decay": config.weight_decay, "maximize": False}
    if config.optimizer == "sgd":
        settings |= {"momentum": config.momentum, "dampening": 0.0, "nesterov": False}
        settings["is_first_step"] = False  # which from momentum 0 is the same
    else:
        settings |= zip(("beta1", "beta2"), config.adam_betas, strict=True)
        settings |= {"eps": config.adam_eps, "amsgrad": False}
    return partial(getattr(torch, f"_fused_{config.optimizer}_"), **settings)
