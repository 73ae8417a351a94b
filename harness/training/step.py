"""One training step of a run, or of a stack of runs on a GPU.

A step gathers a batch, differentiates the objective and updates the weights with Adam. A CPU trains
one run and reads each batch from the epoch's draws. A GPU trains a stack: all that a step reads
lies in buffers made once, so that it is captured as a CUDA graph and replayed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.adam import (
    adam,
)  # without the class, whose first use imports torch.compile: seconds

from harness import processes, streams
from harness.config import RunConfig
from harness.data.dataset import Split
from harness.models.stack import Stack, has_hooks, kernels
from harness.models.vae import VAE
from harness.objective import Coefficients, Terms, objective
from harness.training.draws import Draw
from harness.training.mlp_gradient import MLPGradient, covers

ALIGNED = 16
"""Numbers in 64 bytes of float32, a cache line and a vector register."""

WARM_UP = 3
"""Calls before one is captured, in which libraries choose their kernels."""

Result = TypeVar("Result")


class Run(NamedTuple):
    """A run in training.

    Attributes:
        config: its settings.
        model: its model.
        terms: its loss terms by name.
    """

    config: RunConfig
    model: VAE
    terms: Terms


class Place(NamedTuple):
    """Where a parameter lies in the buffer of all weights."""

    start: int
    shape: tuple[int, ...]
    transposed: bool

    def view(self, flat: Tensor) -> Tensor:
        """Return the numbers of the parameter in a buffer (P,), or (S, P) for a stack."""
        last = flat.dim() - 1
        numbers = flat.narrow(last, self.start, torch.Size(self.shape).numel())
        if self.transposed:
            return numbers.unflatten(last, self.shape[::-1]).transpose(-1, -2)
        return numbers.unflatten(last, self.shape) if self.shape else numbers.squeeze(last)


class Step:
    """Weights, moments and the training step of one run, or of a stack.

    On a CPU the weights, Adam's moments and the layers' buffers lie in memory that worker processes
    share, so that any of them can train the next epoch.

    Args:
        runs: one run, or those of a stack, with their initial weights.
        training_size: number of training images.
        stacked: whether the runs are computed as one `Stack`; false for one run.
    """

    def __init__(self, runs: Sequence[Run], training_size: int, *, stacked: bool) -> None:
        self.configs, self.terms = [run.config for run in runs], runs[0].terms
        self.training_size = training_size
        self.stack = Stack([run.model for run in runs]) if stacked else None
        self.model = runs[0].model if self.stack is None else self.stack.form
        self.places, width = _places(self.model)
        lead = (len(runs),) if stacked else ()
        zeros = torch.zeros(*lead, width, dtype=self.model.dtype, device=self.model.device)
        self.weights, self.first, self.second = (processes.shared(zeros) for _ in range(3))
        self.counts = processes.shared(torch.zeros(len(runs), device=zeros.device))
        for name, value in self._trained().items():
            self.places[name].view(self.weights).copy_(value.detach())
        if self.stack is None:
            for module in self.model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, processes.shared(buffer))
        self._attach()

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.training_size // self.configs[0].batch_size

    @property
    def images(self) -> int:
        """Images seen in an epoch, by all runs."""
        return self.steps * self.configs[0].batch_size * len(self.configs)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.weights.device

    def model_of(self, row: int) -> VAE:
        """Return a copy of a run's model as it is now."""
        return copy.deepcopy(self.model) if self.stack is None else self.stack.run(row)

    def _trained(self) -> dict[str, Tensor]:
        if self.stack is not None:
            return self.stack.weights
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def _attach(self) -> None:
        """Make the weights of the model views of the buffer."""
        self._gradients: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        if self.stack is not None:
            self.stack.weights = {n: p.view(self.weights) for n, p in self.places.items()}
            return
        for name, parameter in self._trained().items():
            parameter.data = self.places[name].view(self.weights)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker process needs; the weights are in memory that it shares."""
        no_numbers = torch.empty((), dtype=self.model.dtype)
        memo: dict[int, Any] = {
            id(p): nn.Parameter(no_numbers.expand(p.shape)) for p in self._trained().values()
        }
        memo |= {id(buffer): buffer for buffer in self.model.buffers()}
        names = "configs terms training_size stack places weights first second counts"
        state = {name: getattr(self, name) for name in names.split()}
        return state | {"model": copy.deepcopy(self.model, memo)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    def _prepare(self) -> None:
        """Make what the process that trains needs: gradients, the optimiser, a batch's buffers."""
        config, new = self.configs[0], self.weights.new_zeros
        self._gradients = torch.zeros_like(self.weights)
        gradients = {n: place.view(self._gradients) for n, place in self.places.items()}
        self._groups = self._adam_groups(self._gradients)
        lead = () if self.stack is None else (len(self.configs),)
        seen = config.batch_size * len(self.configs)
        self._raw = new(seen, self.model.pixels, dtype=torch.uint8)
        self._x = new(*lead, config.batch_size, self.model.pixels)
        self._images = self._x.unflatten(-1, self.model.data_shape)
        free = [c.free_bits for c in self.configs] if config.free_bits else None
        self._free_bits = None if free is None else self._by_run(free)
        self._term_weights = {
            name: self._by_run([c.terms[name] for c in self.configs]) for name in self.terms
        }
        self._written: MLPGradient | None = None
        if self.stack is not None:
            self._slopes = gradients
        elif self.device.type == "cpu" and covers(config, self.model, self.terms):
            self._written = MLPGradient(config, self.model, gradients)
        else:
            for name, parameter in self._trained().items():
                parameter.grad = gradients[name]

    def _by_run(self, values: list[float]) -> Tensor:
        made = self.weights.new_tensor(values)
        return made[0] if self.stack is None else made

    def _adam_groups(self, gradients: Tensor) -> list[tuple[float, list[list[Tensor]]]]:
        """Return each learning rate with weights, gradients, moments and steps of its runs."""
        buffers = (self.weights, gradients, self.first, self.second)
        rows = list(
            zip(*(b.view(len(self.configs), -1) for b in buffers), self.counts, strict=True)
        )
        rates = [config.learning_rate for config in self.configs]
        return [
            (
                rate,
                [
                    list(part)
                    for part in zip(
                        *(rows[s] for s, r in enumerate(rates) if r == rate), strict=True
                    )
                ],
            )
            for rate in dict.fromkeys(rates)
        ]

    @torch.no_grad()
    def _update(self) -> None:
        """Update the weights by Adam (Kingma & Ba 2014)."""
        for rate, (weights, gradients, first, second, steps) in self._groups:
            adam(
                weights,
                gradients,
                first,
                second,
                [],
                steps,
                fused=True,
                capturable=self.device.type == "cuda",
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )

    def epoch(self, draw: Draw) -> None:
        """Take every step of an epoch; a GPU may still compute on return."""
        with kernels(self.configs[0].precision):
            if self.stack is not None and self.device.type == "cuda":
                self.capture(draw)
                assert self._graph is not None
                for _ in range(self.steps):
                    self._graph.replay()
            else:
                self.take(draw)

    def take(self, draw: Draw) -> None:
        """Take every step of an epoch, without capturing it."""
        if self._gradients is None:
            self._prepare()
        if self.stack is None:
            self._train_one(draw)
        else:
            for t in range(self.steps):
                self._step(draw, t)

    def _train_one(self, draw: Draw) -> None:
        """Train one run; layers that draw random numbers find the same ones in every process."""
        self.model.train()
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            stream = streams.generator(self.configs[0].seed, "layers", draw.epoch)
            torch.manual_seed(int(stream.integers(2**63)))
            for t in range(self.steps):
                self._step(draw, t)
        self.model.eval()

    def _step(self, draw: Draw, t: int) -> None:
        torch.index_select(draw.images, 0, draw.order[t].flatten(), out=self._raw)
        self._x.copy_(self._raw.view(self._x.shape)).div_(draw.largest)
        if self._written is not None:
            self._written(self._x, draw.noise[t], draw.betas[t])
        elif self.stack is None:
            assert self._gradients is not None
            self._gradients.zero_()
            with torch.enable_grad():
                self._loss(self.model, *self._arguments(draw, t)).backward()
        else:
            slopes = self.stack.gradient(self._loss, *self._arguments(draw, t))
            torch._foreach_copy_([self._slopes[n] for n in slopes], list(slopes.values()))
        self._update()

    def _arguments(self, draw: Draw, t: int) -> tuple[Any, ...]:
        coefficients = Coefficients(draw.betas[t], self._free_bits, self._term_weights)
        prior = () if draw.prior is None else (draw.prior[t],)
        return self._images, draw.noise[t], coefficients, draw.progress[t], *prior

    def _loss(
        self,
        model: VAE,
        x: Tensor,
        eps: Tensor,
        coefficients: Coefficients,
        progress: Tensor,
        prior: Tensor | None = None,
    ) -> Tensor:
        batch = model.batch(x, eps, prior, self.training_size, progress)
        return objective(self.configs[0], batch, coefficients, self.terms)

    def capture(self, draw: Draw) -> None:
        """Lay an epoch out for a GPU, and capture the step the first time."""
        if self._gradients is None:
            self._prepare()
        if self._graph is None:
            self._epoch = draw._replace(**{n: v.clone() for n, v in draw.by_step().items()})
            one = {name: torch.zeros_like(v[:1]) for name, v in draw.by_step().items()}
            self._one = draw._replace(**one)
            self._now = torch.zeros(1, dtype=torch.int64, device=self.device)
            changed = [self.weights, self.first, self.second, self.counts, self._now]
            changed += self.stack.constants.values() if self.stack is not None else ()
            self._graph, _ = captured(self._counted, changed)
        else:
            for name, value in draw.by_step().items():
                getattr(self._epoch, name).copy_(value)
            if draw.images is not self._epoch.images:
                self._epoch.images.copy_(draw.images)
        self._now.zero_()

    def _counted(self) -> None:
        """Take the step that the counter on the GPU is at."""
        for name, every in self._epoch.by_step().items():
            torch.index_select(every, 0, self._now, out=getattr(self._one, name))
        self._step(self._one, 0)
        self._now.add_(1)

    def keep(self, rows: Sequence[int]) -> Step:
        """Return the step of some runs of a stack, with their weights and moments."""
        runs = [Run(self.configs[row], self.model_of(row), self.terms) for row in rows]
        self._graph = None
        kept = Step(runs, self.training_size, stacked=True)
        kept.restore([self.states()[row] for row in rows])
        return kept

    def states(self) -> list[dict[str, Tensor]]:
        """Return all that each run goes on from: weights, moments, buffers, steps taken.

        Each as the plain run has it, so that it fits into any stack.
        """
        return [
            {
                name: value.clone(memory_format=torch.contiguous_format)
                for name, value in row.items()
            }
            for row in map(self._state, range(len(self.configs)))
        ]

    def restore(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Set every run to a state that `states` returned."""
        for row, state in enumerate(states):
            for name, value in self._state(row).items():
                value.copy_(state[name])

    def _state(self, row: int) -> dict[str, Tensor]:
        """Return views of what a run goes on from."""
        flats = {"weights": self.weights, "first": self.first, "second": self.second}
        state = {
            f"{kind}.{name}": place.view(flat.view(len(self.configs), -1)[row])
            for kind, flat in flats.items()
            for name, place in self.places.items()
        }
        for name, buffer in self.model.named_buffers():
            state[f"buffers.{name}"] = (
                buffer if self.stack is None else self.stack.constants[name][row]
            )
        return state | {"steps": self.counts[row]}


def _places(model: VAE) -> tuple[dict[str, Place], int]:
    """Return where each trained parameter lies in one buffer, and the length of the buffer.

    Each begins at a multiple of 16 numbers, where matrix products read fastest. One buffer, and so
    padded, decides in which order Adam rounds.
    """
    places, start = {}, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            transposed = parameter.dim() == 2 and parameter.t().is_contiguous()
            places[name] = Place(start, tuple(parameter.shape), transposed)
            start += -(-parameter.numel() // ALIGNED) * ALIGNED
    return places, start


def refusal(run: Run, images: Split) -> str | None:
    """Return why a run cannot be computed in a stack, None if it can: one step is tried on a copy.

    Hooks are not called for the weights of a stack; random layers and branches on values are what
    `torch.vmap` refuses.
    """
    if has_hooks(run.model):
        return "a module or a parameter has a hook"
    step = Step([run], run.config.batch_size, stacked=True)
    batch, latents = run.config.batch_size, run.config.latent_size
    zeros, one = torch.zeros(1, 1, batch, latents), torch.ones(1, 1)
    order = torch.arange(batch).view(1, 1, batch)
    prior = zeros if run.terms else None
    draw = Draw(images.images, images.largest, order, zeros, one, one, prior, 1).to(step.weights)
    try:
        step.take(draw)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any error of a user's layer or of PyTorch
        return str(error).splitlines()[0] if str(error) else repr(error)
    return None


def captured(
    function: Callable[[], Result], changed: Sequence[Tensor] = ()
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture a function as a CUDA graph, which replays it without the Python interpreter.

    Args:
        function: a function of tensors that stay where they are. It must neither wait for the GPU
            nor copy from or to the host.
        changed: tensors that it changes; the calls that warm it up are undone.

    Returns:
        The graph, and the function's result: tensors that every replay writes anew.
    """
    before = [tensor.clone() for tensor in changed]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result
