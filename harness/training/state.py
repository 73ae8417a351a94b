"""The state of runs in training: weights and Adam's moments, each in one buffer.

The buffers decide bits: Adam rounds in their order, and matrix products read weights of linear
layers as (in, out). On a CPU they lie in memory that worker processes share, so that any of them
can train a run's next epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness import processes
from harness.config import RunConfig
from harness.models.stack import lift, map_tensors
from harness.models.vae import VAE
from harness.objective import Terms

ALIGNED = 16  # numbers in 64 bytes of float32, a cache line and a vector register


class State:
    """Weights, moments and layers' buffers of one run, or of a stack of runs computed as one.

    Numbers of the given models move into the buffers.

    Attributes:
        rows: positions of the runs in the list that `train` was given.
        model: the architecture of each run; of one run the model itself, after `attach`.
        weights, first, second: weights and Adam's moments, shape (S, P), S = 1 for one run.
        counts: steps taken, shape (S,).
        constants: layers' buffers and frozen parameters by name, shape (S, ...).
    """

    def __init__(
        self,
        rows: Sequence[int],
        configs: Sequence[RunConfig],
        models: Sequence[VAE],
        terms: Terms,
        *,
        stacked: bool,
    ) -> None:
        self.rows, self.configs, self.terms, self.stacked = rows, configs, terms, stacked
        self.model = model = models[0]
        given = [dict(_tensors(model)) for model in models]
        self._places: dict[str, tuple[int, int, Sequence[int], bool]] = {}
        size = 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                end = size + parameter.numel()
                transposed = parameter.dim() == 2 and parameter.t().is_contiguous()
                stored = parameter.shape[::-1] if transposed else parameter.shape
                self._places[name] = size, end, stored, transposed
                size = -(-end // ALIGNED) * ALIGNED  # where matrix products read fastest
        zeros = torch.zeros(len(models), size, dtype=model.dtype, device=model.device)
        self.weights, self.first, self.second = (processes.shared(zeros) for _ in range(3))
        self.counts = processes.shared(torch.zeros(len(models), device=zeros.device))
        self.constants = {
            name: processes.shared(torch.stack([one[name].detach() for one in given]))
            for name in given[0]
            if name not in self._places
        }
        for name, view in self.views(self.weights).items():
            for row, one in enumerate(given):
                view[row].copy_(one[name].detach())
        for tensor in given[0].values():  # a worker process is sent no numbers twice
            tensor.data = tensor.new_empty(()).expand(tensor.shape)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the numbers of each trained parameter in a buffer (S, P), shape (S, ...)."""
        found = {}
        for name, (start, end, shape, transposed) in self._places.items():
            stored = flat[:, start:end].view(len(flat), *shape)
            found[name] = stored.mT if transposed else stored
        return found

    def attach(self) -> None:
        """Make the numbers of one run's model those of this state, in the process that trains."""
        numbers = self.views(self.weights) | self.constants
        for name, tensor in _tensors(self.model):
            tensor.data = numbers[name][0]

    def join(self, each: Sequence[Any], axis: int = 0) -> Any:  # noqa: ANN401 - as `map_tensors`
        """Return what the one run has, or what each has joined along an axis S for a stack."""
        if not self.stacked:
            return each[0]
        return map_tensors(lambda *values: torch.stack(values, axis), *each)

    def lift(self, function: Callable[..., Any], *, gradient: bool = False) -> Callable[..., Any]:
        """Return a function (model, *arguments) as one of arguments, in a stack with an axis S."""
        if not self.stacked:
            return partial(function, self.model)
        lifted = lift(self.model, function, gradient=gradient)
        return partial(lifted, self.views(self.weights), self.constants)

    def model_of(self, row: int) -> VAE:
        """Return a copy of a run's model as it is now."""
        model, numbers = copy.deepcopy(self.model), self.views(self.weights) | self.constants
        for name, tensor in _tensors(model):
            tensor.data = numbers[name][row].clone()
        return model.eval()

    def keep(self, places: Sequence[int]) -> State:
        """Return the state of some runs of a stack."""
        rows, configs = [self.rows[s] for s in places], [self.configs[s] for s in places]
        kept = State(rows, configs, [*map(self.model_of, places)], self.terms, stacked=True)
        for new, s in enumerate(places):
            kept.restore(new, self.of_run(s))
        return kept

    def of_run(self, row: int) -> dict[str, Tensor]:
        """Return views of all that a run goes on from, of plain shapes that fit into any stack."""
        found = {"steps": self.counts[row]}
        for kind in ("weights", "first", "second"):
            views = self.views(getattr(self, kind))
            found |= {f"{kind}.{name}": view[row] for name, view in views.items()}
        return found | {f"constants.{name}": value[row] for name, value in self.constants.items()}

    def restore(self, row: int, given: Mapping[str, Tensor]) -> None:
        """Set a run to what `of_run` returned."""
        for name, value in self.of_run(row).items():
            value.copy_(given[name])


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
