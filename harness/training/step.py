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
from typing import Any, TypeVar

import torch
from torch import Tensor

# The class torch.optim.Adam imports torch.compile at its first use, which takes seconds.
from torch.optim.adam import adam

from harness import streams
from harness.data.dataset import Split
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
        self.steps = training_size // config.batch_size
        seen = config.batch_size * len(state.configs)
        self._grey = new(seen, state.model.pixels, dtype=torch.uint8)
        lead = () if state.stack is None else (len(state.configs),)
        self.x = new(*lead, config.batch_size, state.model.pixels)
        self._images = self.x.unflatten(-1, state.model.data_shape)
        free = [c.free_bits for c in state.configs] if config.free_bits else None
        self._free_bits = None if free is None else self._by_run(free)
        self._term_weights = {
            name: self._by_run([c.terms[name] for c in state.configs]) for name in state.terms
        }
        self._gradient = torch.zeros_like(state.weights)
        self._slopes = state.views(self._gradient)
        self._groups = self._by_learning_rate()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._written: MLPGradient | None = None
        if state.stack is not None:
            return
        if not state.on_gpu and covers(config, state.model, state.terms):
            self._written = MLPGradient(config, state.model, self._slopes)
        else:
            for name, parameter in state.trained().items():
                parameter.grad = self._slopes[name]

    def _by_run(self, values: list[float]) -> Tensor:
        made = self.state.weights.new_tensor(values)
        return made[0] if self.state.stack is None else made

    def _by_learning_rate(self) -> list[tuple[float, list[list[Tensor]]]]:
        """Return each learning rate with weights, gradients, moments and steps of its runs."""
        state, count = self.state, len(self.state.configs)
        flat = (state.weights, self._gradient, state.first, state.second)
        rows = [*(buffer.view(count, -1) for buffer in flat), state.counts]
        rates = [config.learning_rate for config in state.configs]
        return [
            (rate, [[part[s] for s in range(count) if rates[s] == rate] for part in rows])
            for rate in dict.fromkeys(rates)
        ]

    def epoch(self, images: Split, draw: Draw, epoch: int) -> None:
        """Take every step of an epoch; a GPU may still compute on return.

        Args:
            images: training images.
            draw: the epoch's draws.
            epoch: counted from 1.
        """
        with kernels(self.state.configs[0].precision):
            if self.state.stack is not None and self.state.on_gpu:
                self.capture(images, draw)
                assert self._graph is not None
                for _ in range(self.steps):
                    self._graph.replay()
            else:
                with self._layers_in_training(epoch):
                    for t in range(self.steps):
                        self._take(images, draw, t)

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

    def _take(self, images: Split, draw: Draw, t: int) -> None:
        """Take step t of an epoch."""
        state = self.state
        torch.index_select(images.images, 0, draw.order[t].flatten(), out=self._grey)
        self.x.copy_(self._grey.view(self.x.shape)).div_(images.largest)
        if self._written is not None:
            self._written(self.x, draw.noise[t], draw.betas[t])
        elif state.stack is None:
            self._gradient.zero_()
            with torch.enable_grad():
                self._loss(state.model, *self._arguments(draw, t)).backward()
        else:
            slopes = state.stack.gradient(self._loss, *self._arguments(draw, t))
            torch._foreach_copy_([self._slopes[name] for name in slopes], list(slopes.values()))
        self._update()

    def _arguments(self, draw: Draw, t: int) -> tuple[Any, ...]:
        coefficients = Coefficients(draw.betas[t], self._free_bits, self._term_weights)
        prior = None if draw.prior is None else draw.prior[t]
        return self._images, draw.noise[t], coefficients, draw.progress[t], prior

    def _loss(
        self,
        model: VAE,
        x: Tensor,
        eps: Tensor,
        coefficients: Coefficients,
        progress: Tensor,
        prior: Tensor | None,
    ) -> Tensor:
        batch = model.batch(x, eps, prior, self.training_size, progress)
        return objective(self.state.configs[0], batch, coefficients, self.state.terms)

    @torch.no_grad()
    def _update(self) -> None:
        """Update the weights by Adam (Kingma & Ba 2014), with PyTorch's constants."""
        for rate, (weights, gradients, first, second, counts) in self._groups:
            adam(
                *(weights, gradients, first, second, [], counts),
                fused=True,
                capturable=self.state.on_gpu,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )

    def capture(self, images: Split, draw: Draw) -> None:
        """Lay an epoch out for a GPU, and capture the step the first time."""
        if self._graph is None:
            self._epoch: tuple[Split, Draw] = images, map_tensors(torch.clone, draw)
            self._one: Draw = map_tensors(lambda every: torch.zeros_like(every[:1]), draw)
            self._now = torch.zeros(1, dtype=torch.int64, device=self.x.device)
            state = self.state
            changed = [state.weights, state.first, state.second, state.counts, self._now]
            changed += state.stack.constants.values() if state.stack is not None else ()
            self._graph, _ = captured(self._counted, changed)
        else:
            map_tensors(torch.Tensor.copy_, self._epoch[1], draw)
            if images.images is not self._epoch[0].images:
                self._epoch[0].images.copy_(images.images)
        self._now.zero_()

    def _counted(self) -> None:
        """Take the step that the counter on the GPU is at."""

        def select(every: Tensor, one: Tensor) -> None:
            torch.index_select(every, 0, self._now, out=one)

        images, draw = self._epoch
        map_tensors(select, draw, self._one)
        self._take(images, self._one, 0)
        self._now.add_(1)


def refusal(run: Run, images: Split) -> str | None:
    """Return why a run cannot be computed in a stack, None if it can.

    A step and a reconstruction are tried on a copy. Hooks on weights are not called in a stack;
    random layers, branches on values and some recurrent layers are what `torch.vmap` refuses. On a
    GPU a function that waits for it, or copies a constant to it, cannot be captured.
    """
    if has_hooks(run.model):
        return "a module or a parameter has a hook, a parametrization or a replaced forward"
    if uses_a_module_twice(run.model):  # functional_call does not give its weights back
        return "a module is used twice"
    state, config = State([run], stacked=True), run.config
    step = Step(state, config.batch_size)
    assert state.stack is not None
    shown, drawn = draw([config], images.head(config.batch_size), 1, stacked=True)
    given = shown, drawn.to(step.x), 0
    try:
        step._take(*given)
        with _refused_to_wait(step.x.device):
            step._take(*given)
        with torch.no_grad():
            state.stack.lift(VAE.forward)(step._images)
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

    Args:
        function: a function of tensors that stay where they are. It must neither wait for the GPU
            nor copy from or to the host.
        changed: tensors that it changes; the calls that warm it up are undone.

    Returns:
        The graph, and the function's result: tensors that every replay writes anew.
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
