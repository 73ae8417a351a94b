"""One training step of a run, or of a stack of runs on a GPU.

A step gathers a batch, differentiates the objective and updates the weights with Adam. A CPU trains
one run and reads each batch from the epoch's draw. A GPU trains a stack: all that a step reads lies
in buffers made once, so that the step is captured as a CUDA graph and replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from harness import streams
from harness.data.dataset import Split
from harness.metrics.evaluate import coefficients
from harness.models.stack import has_hooks, kernels, map_tensors, uses_a_module_twice
from harness.models.vae import VAE
from harness.objective import Coefficients, objective
from harness.training.draws import Draw, draw
from harness.training.mlp_gradient import MLPGradient, covers
from harness.training.state import Run, State

WARM_UP = 3
"""Calls before one is captured, in which libraries choose their kernels."""

Result = TypeVar("Result")


class Step:
    """The training step of a state, with the buffers of a batch and of its gradient.

    Args:
        state: one run, or a stack; its weights and moments are updated in place.
        training_size: number of training images.
    """

    def __init__(self, state: State, training_size: int) -> None:
        self.state, self.training_size = state, training_size
        config, new = state.configs[0], state.weights.new_zeros
        pixels, seen = state.model.pixels, config.batch_size * len(state.configs)
        self.steps = training_size // config.batch_size
        self._grey = new(seen, pixels, dtype=torch.uint8)
        self.x = state.join([new(config.batch_size, pixels) for _ in state.configs])
        self._images = self.x.unflatten(-1, state.model.data_shape)
        self._coefficients: Coefficients = state.join(
            [coefficients(c, pixels, self.x.device, self.x.dtype) for c in state.configs]
        )
        self._gradient = torch.zeros_like(state.weights)
        self._slopes = state.views(self._gradient)
        self._groups = self._by_learning_rate()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._written: MLPGradient | None = None
        if state.stack is None:
            for name, parameter in state.trained().items():
                parameter.grad = self._slopes[name]
            if not state.on_gpu and covers(config, state.model, state.terms):
                self._written = MLPGradient(config, state.model)

    def _by_learning_rate(self) -> list[tuple[float, list[list[Tensor]]]]:
        """Return each learning rate with weights, gradients, moments and steps of its runs."""
        state = self.state
        buffers = (state.weights, self._gradient, state.first, state.second, state.counts)
        rates = [config.learning_rate for config in state.configs]
        return [
            (rate, [[part[s] for s, own in enumerate(rates) if own == rate] for part in buffers])
            for rate in dict.fromkeys(rates)
        ]

    def epoch(self, images: Split, draw: Draw, epoch: int) -> None:
        """Take every step of an epoch, counted from 1; a GPU may still compute on return."""
        with kernels(self.state.configs[0].precision):
            if self.state.is_captured:
                graph = self.capture(images, draw)
                for _ in range(self.steps):
                    graph.replay()
            else:
                with self._layers_in_training(epoch):
                    for t in range(self.steps):
                        self._take(images, draw.at(t))

    @contextmanager
    def _layers_in_training(self, epoch: int) -> Iterator[None]:
        """Set the layers of one run to `train` mode, and PyTorch's generator for those that draw.

        They draw the same numbers in every process. What `covers` accepts has no such layer.
        """
        if self.state.stack is not None or self._written is not None:
            yield
            return
        stream = streams.generator(self.state.configs[0].seed, "layers", epoch)
        with torch.random.fork_rng([self.x.device] if self.state.on_gpu else []):
            torch.manual_seed(int(stream.integers(2**63)))
            self.state.model.train()
            try:
                yield
            finally:
                self.state.model.eval()

    def _take(self, images: Split, now: Draw) -> None:
        """Take one step, with its draws."""
        state = self.state
        torch.index_select(images.images, 0, now.order.flatten(), out=self._grey)
        self.x.copy_(self._grey.view(self.x.shape)).div_(images.largest)
        if self._written is not None:
            self._written(self.x, now.noise, now.betas)
        elif state.stack is None:
            self._gradient.zero_()
            with torch.enable_grad():
                self._loss(state.model, self._images, now, self._coefficients).backward()
        else:
            slopes = state.stack.gradient(self._loss, self._images, now, self._coefficients)
            torch._foreach_copy_([self._slopes[name] for name in slopes], list(slopes.values()))
        self._update()

    def _loss(self, model: VAE, x: Tensor, now: Draw, coefficients: Coefficients) -> Tensor:
        config, terms = self.state.configs[0], self.state.terms
        batch = model.batch(x, now.noise, now.prior, self.training_size, now.progress)
        return objective(config, batch, coefficients._replace(beta=now.betas), terms)

    @torch.no_grad()
    def _update(self) -> None:
        """Update the weights by Adam (Kingma & Ba 2014), with PyTorch's constants.

        By PyTorch's fused kernel itself, as of versions 2.11 to 2.15: `torch.optim.adam.adam` needs
        65 us more a step on a CPU, and the class imports torch.compile at its first use, for
        seconds.
        """
        self.state.counts.add_(1)
        for rate, (weights, gradients, first, second, counts) in self._groups:
            torch._fused_adam_(
                *(weights, gradients, first, second, [], counts),
                lr=rate,
                beta1=0.9,
                beta2=0.999,
                weight_decay=0.0,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )

    def capture(self, images: Split, draw: Draw) -> torch.cuda.CUDAGraph:
        """Lay an epoch out for a GPU, and return the step's graph, captured the first time."""
        if self._graph is None:
            self._epoch: tuple[Split, Draw] = images, map_tensors(torch.clone, draw)
            self._one: Draw = map_tensors(lambda every: torch.zeros_like(every[:1]), draw)
            self._now = torch.zeros(1, dtype=torch.int64, device=self.x.device)
            state = self.state
            changed = [state.weights, state.first, state.second, state.counts, self._now]
            self._graph, _ = captured(self._counted, [*changed, *state.buffers().values()])
        else:
            map_tensors(torch.Tensor.copy_, self._epoch[1], draw)
            if images.images is not self._epoch[0].images:
                self._epoch[0].images.copy_(images.images)
        self._now.zero_()
        return self._graph

    def _counted(self) -> None:
        """Take the step that the counter on the GPU is at."""

        def select(every: Tensor, one: Tensor) -> None:
            torch.index_select(every, 0, self._now, out=one)

        images, draw = self._epoch
        map_tensors(select, draw, self._one)
        self._take(images, self._one.at(0))
        self._now.add_(1)


def refusal(run: Run, images: Split) -> str | None:
    """Return why a run cannot be computed in a stack; None if it can.

    A step and a reconstruction are tried on a copy. `torch.vmap` refuses random layers, branches on
    values and some recurrent layers. What waits for a GPU, or copies a constant to it, cannot be
    captured.
    """
    if has_hooks(run.model):
        return "a module or a parameter has a hook, a parametrization or a replaced forward"
    if uses_a_module_twice(run.model):  # functional_call does not give its weights back
        return "a module is used twice"
    state, config = State([run], stacked=True), run.config
    step = Step(state, config.batch_size)
    shown, drawn = draw([config], images.head(config.batch_size), 1)
    given = shown, state.join(drawn, 1).to(step.x).at(0)
    try:
        step._take(*given)
        with _refused_to_wait(step.x.device):
            step._take(*given)
        with torch.no_grad():
            state.lift(VAE.forward)(step._images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any error of a user's layer or of PyTorch
        return (str(error) or repr(error)).splitlines()[0]
    return None


@contextmanager
def _refused_to_wait(device: torch.device) -> Iterator[None]:
    """Raise an error where the host waits for a GPU, as copies from and to it do."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def captured(
    function: Callable[[], Result], changed: Sequence[Tensor] = ()
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture a function as a CUDA graph, which replays it without the Python interpreter.

    The function's tensors stay where they are; it must neither wait for the GPU nor copy from or to
    the host. The result is that of the function: tensors that every replay writes anew. Calls that
    warm the function up are undone in the tensors that it changes.
    """
    before = [tensor.clone() for tensor in changed]
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = function()
    return graph, result


@cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one for all, since libraries keep a workspace for each
