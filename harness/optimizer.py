"""Adam for a stack of runs, whose rows can leave it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.vae import VAE


class Adam:
    """Adam of all runs (Kingma & Ba 2014); elementwise, it couples no runs.

    PyTorch's optimiser takes one learning rate per tensor, so runs that differ in it are updated
    through views of their rows.
    """

    def __init__(self, model: VAE, *, by_row: bool = False) -> None:
        self.parameters: list[Tensor] = list(model.parameters())
        rates = [c.learning_rate for c in model.configs]
        self.rows: list[list[Tensor]] = []
        if by_row or len(set(rates)) > 1:
            self.rows = [[p.detach()[s] for p in self.parameters] for s in range(len(rates))]
        groups = [
            {"params": row, "lr": rate}
            for row, rate in zip(self.rows or [self.parameters], rates, strict=False)
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def step(self) -> None:
        """Update the weights from their gradients."""
        for s, row in enumerate(self.rows):
            for view, parameter in zip(row, self.parameters, strict=True):
                assert parameter.grad is not None
                view.grad = parameter.grad[s]
        self.optimizer.step()

    def keep(self, rows: Sequence[int], model: VAE) -> Adam:
        """Return the optimiser of some runs, moments and all.

        Args:
            rows: which runs.
            model: the stack that they now are.
        """
        kept = Adam(model, by_row=bool(self.rows))
        state = self.optimizer.state
        if self.rows:
            pairs = [
                (new, state[old])
                for own, row in zip(kept.rows, rows, strict=True)
                for new, old in zip(own, self.rows[row], strict=True)
            ]
        else:
            moments = [
                {k: v[list(rows)] if v.ndim else v for k, v in state[p].items()}
                for p in self.parameters
            ]
            pairs = list(zip(kept.parameters, moments, strict=True))
        kept.optimizer.state.update(pairs)
        return kept
