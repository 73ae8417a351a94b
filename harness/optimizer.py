"""Adam for a stack of runs, each with its own learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from harness.cores import shared_zeros


class Adam:
    """Adam of all runs (Kingma & Ba 2014); elementwise, it couples no runs.

    Args:
        weights: weights of each run, shape (S, P); updated in place.
        gradients: their gradients, shape (S, P).
        learning_rates: learning rate of each run.
    """

    def __init__(self, weights: Tensor, gradients: Tensor, learning_rates: Sequence[float]) -> None:
        self.weights, self.gradients, self.learning_rates = (
            weights,
            gradients,
            tuple(learning_rates),
        )
        self.first, self.second = (
            shared_zeros(weights.shape, weights.device, weights.dtype) for _ in range(2)
        )
        self.steps = shared_zeros((len(learning_rates),), weights.device, torch.float32)
        self.groups = list(self._group())

    def _group(self) -> Iterator[tuple[float, list[list[Tensor]]]]:
        """Yield each learning rate with the tensors that have it: all as one, or rows."""
        tensors = (self.weights, self.gradients, self.first, self.second)
        if len(set(self.learning_rates)) == 1:
            yield self.learning_rates[0], [*([tensor] for tensor in tensors), [self.steps[0]]]
            return
        for learning_rate in sorted(set(self.learning_rates)):
            rows = [row for row, own in enumerate(self.learning_rates) if own == learning_rate]
            yield (
                learning_rate,
                [[tensor[row] for row in rows] for tensor in (*tensors, self.steps)],
            )

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights from their gradients.

        By PyTorch's fused kernel itself: the checks that `torch.optim` makes before it would cost
        a CPU 3 % of a step.
        """
        self.steps.add_(1)
        for learning_rate, (weights, gradients, first, second, steps) in self.groups:
            torch._fused_adam_(
                weights,
                gradients,
                first,
                second,
                [],
                steps,
                lr=learning_rate,
                beta1=0.9,
                beta2=0.999,
                weight_decay=0.0,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """First and second moments, shape (S, P), and steps taken, shape (S,).

        With one learning rate the first of them counts for all runs.
        """
        return self.first, self.second, self.steps

    def take(self, other: Adam, rows: Sequence[int]) -> None:
        """Go on from the state of some runs of another stack's optimiser."""
        self.first.copy_(other.first[list(rows)])
        self.second.copy_(other.second[list(rows)])
        self.steps.fill_(other.steps[0])
