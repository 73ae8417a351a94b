"""One training step of a stack; on a GPU it finds its inputs by its own counter.

Everything that a step reads lies in buffers made once: images, and for each step of the epoch the
batch, the noise and the weight of the KL. So a GPU captures the step once and replays it. A CPU is
handed views of these buffers, which costs it less than to gather from them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.autograd import Autograd, needs_autograd
from harness.capture import record
from harness.config import Precision
from harness.gradient import Gradient
from harness.optimizer import Adam
from harness.vae import VAE


class Step:
    """Gather a batch, find its gradient, update the weights.

    Args:
        model: the stack; its weights are moved (see `Gradient`).
        steps: steps of an epoch.
    """

    def __init__(self, model: VAE, steps: int) -> None:
        configs, batch = model.configs, model.configs[0].batch_size
        self.model = model
        self.gradient = (Autograd if needs_autograd(configs[0]) else Gradient)(model, batch)
        learning_rates = [config.learning_rate for config in configs]
        self.adam = Adam(self.gradient.weights, self.gradient.gradients, learning_rates)
        lead, seen = self.gradient.lead, len(configs) * batch
        self.order = self._new(steps, seen, dtype=torch.int64)
        self.noise = self._new(steps, *lead, batch, model.latent_size)
        self.betas = self._new(steps, *lead, 1, 1)
        self.now = self._new(1, dtype=torch.int64)
        self.rows, self.eps, self.beta = (
            torch.zeros_like(every[:1]) for every in (self.order, self.noise, self.betas)
        )
        self.raw = self._new(seen, model.pixels, dtype=torch.uint8)
        self.x = self._new(*lead, batch, model.pixels)
        self.images, self.largest = torch.zeros(0), 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, device=self.model.device, dtype=dtype or self.model.dtype)

    def load(
        self, images: Tensor, largest: int, order: Tensor, noise: Tensor, betas: Tensor
    ) -> None:
        """Lay out an epoch.

        Args:
            images: what batches are taken from, uint8, shape (N, D), the same at every epoch.
            largest: grey value that stands for 1.
            order: images of each run in the order they are seen, shape (S, steps * B).
            noise: shape (S, steps * B, L).
            betas: shape (steps, S).
        """
        self.largest = largest
        if self.graph is None:
            self.images = images
        elif images is not self.images:
            self.images.copy_(images)
        steps = len(self.order)
        self.order.copy_(order.unflatten(1, (steps, -1)).transpose(0, 1).flatten(1))
        self.noise.copy_(noise.unflatten(1, (steps, -1)).transpose(0, 1).view_as(self.noise))
        self.betas.copy_(betas.view_as(self.betas))
        self.now.zero_()

    def epoch(self) -> None:
        """Take every step of the epoch that is laid out."""
        self.capture()
        if self.graph is None:
            for rows, eps, beta in zip(self.order, self.noise, self.betas, strict=True):
                self._step(rows, eps, beta)
        else:
            for _ in range(len(self.order)):
                self.graph.replay()

    def _step(self, rows: Tensor, eps: Tensor, beta: Tensor) -> None:
        torch.index_select(self.images, 0, rows, out=self.raw)
        self.x.copy_(self.raw.view(self.x.shape)).div_(self.largest)
        self.gradient(self.x, eps, beta)
        self.adam.step()

    def _counted(self) -> None:
        """Take the step that the counter is at."""
        for every, one in (
            (self.order, self.rows),
            (self.noise, self.eps),
            (self.betas, self.beta),
        ):
            torch.index_select(every, 0, self.now, out=one)
        self._step(self.rows[0], self.eps[0], self.beta[0])
        self.now.add_(1)

    def capture(self) -> None:
        """Record the step, on a GPU, unless it is recorded."""
        if self.model.device.type != "cuda" or self.graph is not None:
            return
        changed = (self.gradient.weights, *self.adam.state, self.now)
        with products_in(self.model.configs[0].precision):
            self.graph, _ = record(self._counted, changed)

    def keep(self, rows: Sequence[int]) -> Step:
        """Return the step of some runs, with their weights and moments; what is recorded goes."""
        self.graph = None
        kept = Step(self.model.keep(rows), len(self.order))
        kept.adam.take(self.adam, rows)
        return kept

    def states(self) -> list[dict[str, Tensor]]:
        """Return all that each run goes on from: weights, Adam's moments, steps taken.

        Each as the plain run has it, without padding, so that it fits into any stack.
        """
        forms = self._forms()
        return [
            {
                f"{name}.{key}": value
                for name, form in forms.items()
                for key, value in form.run(row).state_dict().items()
            }
            | {"steps": self.adam.steps[row].clone()}
            for row in range(len(self.model.configs))
        ]

    def restore(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from the states of runs that have taken equally many steps, in stack order."""
        for name, form in self._forms().items():
            runs = [form.run(row) for row in range(len(states))]
            for run, state in zip(runs, states, strict=True):
                run.load_state_dict({key: state[f"{name}.{key}"] for key in run.state_dict()})
            for place, value in zip(form.parameters(), VAE(runs).parameters(), strict=True):
                place.data.copy_(value.data)
        self.adam.steps.copy_(torch.stack([state["steps"] for state in states]))

    def _forms(self) -> dict[str, VAE]:
        """Return weights and moments as stacks of the model's form, in the step's own memory."""
        weights, (first, second, _) = self.gradient.weights, self.adam.state
        flats = {"weights": weights, "first": first, "second": second}
        return {name: _like(self.model, weights, flat) for name, flat in flats.items()}


def _like(model: VAE, weights: Tensor, flat: Tensor) -> VAE:
    """Return a stack with its parameters in another buffer, where the model's are in `weights`."""
    own: dict[int, Any] = {}  # what a deep copy takes instead of copying the parameters
    for parameter in model.parameters():
        place = flat.storage_offset() + parameter.storage_offset() - weights.storage_offset()
        view = flat.as_strided(parameter.shape, parameter.stride(), place)
        own[id(parameter)] = nn.Parameter(view, requires_grad=False)
    return copy.deepcopy(model, own)


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Let a GPU choose kernels of this precision for products of float32 matrices meanwhile."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = {"float32": "ieee", "tf32": "tf32"}[precision]
    try:
        yield
    finally:
        matmul.fp32_precision = before
