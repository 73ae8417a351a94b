"""The state of runs in training: weights and Adam's moments, each in one buffer.

The buffers decide bits: Adam rounds in their order, and matrix products read weights of linear
layers as (in, out). On a CPU they lie in memory that worker processes share, so that any of them
can train a run's next epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness import processes
from harness.config import RunConfig
from harness.models.stack import Stack, map_tensors
from harness.models.vae import VAE
from harness.objective import Terms

ALIGNED = 16
"""Numbers in 64 bytes of float32, a cache line and a vector register."""


class Run(NamedTuple):
    """A run in training: its settings, its model and its loss terms by name."""

    config: RunConfig
    model: VAE
    terms: Terms


class State:
    """Weights, moments and layers' buffers of one run, or of a stack.

    Args:
        runs: one run, or those of a stack, with their initial weights.
        stacked: whether the runs are computed as one `Stack`; false for one run.

    Attributes:
        configs: settings of the runs.
        terms: loss terms of each.
        stack: the stack; None for one run.
        model: the run's model, or the form of the stack.
        weights, first, second: weights and Adam's moments, shape (S, P), S = 1 for one run; the
            weights of the model are views.
        counts: steps taken, shape (S,).
    """

    def __init__(self, runs: Sequence[Run], *, stacked: bool) -> None:
        self.configs, self.terms = [run.config for run in runs], runs[0].terms
        self.stack = Stack([run.model for run in runs]) if stacked else None
        self.model = runs[0].model if self.stack is None else self.stack.form
        self._places, width = _places(self.model)
        zeros = torch.zeros(len(runs), width, dtype=self.model.dtype, device=self.model.device)
        self.weights, self.first, self.second = (processes.shared(zeros) for _ in range(3))
        self.counts = processes.shared(torch.zeros(len(runs), device=zeros.device))
        given = self.trained()
        for name, view in self.views(self.weights).items():
            view.copy_(given[name].detach())
        if self.stack is None:
            for module in self.model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, processes.shared(buffer))
        self._attach()

    @property
    def on_gpu(self) -> bool:
        """Whether the runs are on a GPU."""
        return self.weights.device.type == "cuda"

    @property
    def is_captured(self) -> bool:
        """Whether steps and metrics are captured and replayed: those of a stack on a GPU."""
        return self.on_gpu and self.stack is not None

    def join(self, each: Sequence[Any], axis: int = 0) -> Any:  # noqa: ANN401 - as `map_tensors`
        """Return what the one run has, or what each has joined along an axis S for a stack."""
        if self.stack is None:
            return each[0]
        return map_tensors(lambda *values: torch.stack(values, axis), *each)

    def lift(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function (model, *arguments) of one run as one of the arguments, for all runs.

        Those of a stack have a leading axis S (`Stack.lift`).
        """
        return partial(function, self.model) if self.stack is None else self.stack.lift(function)

    def trained(self) -> dict[str, Tensor]:
        """Return the trained parameters by name, with a leading axis S for a stack."""
        if self.stack is not None:
            return self.stack.weights
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def buffers(self) -> dict[str, Tensor]:
        """Return the layers' buffers by name, with a leading axis S for a stack."""
        named = dict(self.model.named_buffers())
        return named if self.stack is None else {n: self.stack.constants[n] for n in named}

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the numbers of each trained parameter in a buffer (S, P), shaped as `trained`."""
        numbers = flat[0] if self.stack is None else flat
        return {name: place.view(numbers) for name, place in self._places.items()}

    def _attach(self) -> None:
        """Make the weights of the model views of the buffer."""
        views = self.views(self.weights)
        if self.stack is not None:
            self.stack.weights = views
            return
        for name, parameter in self.trained().items():
            parameter.data = views[name]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker process needs: weights of the model are not copied for it."""
        no_numbers = torch.empty((), dtype=self.model.dtype)
        memo: dict[int, Any] = {
            id(p): nn.Parameter(no_numbers.expand(p.shape)) for p in self.trained().values()
        }
        memo |= {id(buffer): buffer for buffer in self.model.buffers()}
        return self.__dict__ | {"model": copy.deepcopy(self.model, memo)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    def model_of(self, row: int) -> VAE:
        """Return a copy of a run's model as it is now."""
        return copy.deepcopy(self.model) if self.stack is None else self.stack.run(row)

    def keep(self, rows: Sequence[int]) -> State:
        """Return the state of some runs of a stack."""
        runs = [Run(self.configs[row], self.model_of(row), self.terms) for row in rows]
        kept = State(runs, stacked=True)
        kept.restore([self._run(row) for row in rows])
        return kept

    def runs(self) -> list[dict[str, Tensor]]:
        """Return all that each run goes on from, as views: weights, moments, buffers, steps.

        Each as the plain run has it, so that it fits into any stack.
        """
        return [self._run(row) for row in range(len(self.configs))]

    def restore(self, runs: Sequence[Mapping[str, Tensor]]) -> None:
        """Set every run to what `runs` returned."""
        for now, given in zip(self.runs(), runs, strict=True):
            for name, value in now.items():
                value.copy_(given[name])

    def _run(self, row: int) -> dict[str, Tensor]:
        found = {"steps": self.counts[row]}
        for kind in ("weights", "first", "second"):
            flat = getattr(self, kind)[row]
            found |= {f"{kind}.{name}": place.view(flat) for name, place in self._places.items()}
        for name, buffer in self.buffers().items():
            found[f"buffers.{name}"] = (buffer if self.stack is None else buffer[row]).detach()
        return found


class _Place(NamedTuple):
    """Where a parameter lies in a buffer."""

    start: int
    shape: torch.Size
    transposed: bool

    def view(self, flat: Tensor) -> Tensor:
        numbers = flat[..., self.start : self.start + self.shape.numel()]
        if self.transposed:
            return numbers.unflatten(-1, self.shape[::-1]).mT
        return numbers.view(flat.shape[:-1] + self.shape)


def _places(model: VAE) -> tuple[dict[str, _Place], int]:
    """Return where each trained parameter lies, and the length of the buffer.

    Each begins at a multiple of 16 numbers, where matrix products read fastest.
    """
    places, start = {}, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            transposed = parameter.dim() == 2 and parameter.t().is_contiguous()
            places[name] = _Place(start, parameter.shape, transposed)
            start += -(-parameter.numel() // ALIGNED) * ALIGNED
    return places, start
