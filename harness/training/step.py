"""What an epoch computes: draws, training steps and metrics of one run, or of a stack.

A step gathers a batch, differentiates the objective and updates the weights with Adam. On a GPU all
that steps and metrics of a stack read lies in buffers made once, so that both are captured as CUDA
graphs and replayed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from harness import objective, streams
from harness.data.dataset import Dataset
from harness.metrics.evaluate import coefficients, conditions, measure
from harness.models.stack import kernels, map_tensors
from harness.models.vae import VAE
from harness.objective import Coefficients
from harness.training.mlp_gradient import MLPGradient, covers
from harness.training.state import State

MARGIN = 0.05  # of a GPU's memory left free, for metrics of finished runs and other programs
WARM_UP = 3  # calls before one is captured, in which libraries choose their kernels

Metrics = dict[str, Any]
Measured = tuple[float, float, list[tuple[Metrics, Metrics]]]
"""One epoch: seconds of training and of measuring, and each run's train and val metrics."""

Result = TypeVar("Result")


class Draw(NamedTuple):
    """The draws of an epoch; those of a stack have an axis S behind that of steps."""

    order: Tensor  # rows of the images, int64, shape (steps, B)
    noise: Tensor  # of the posterior samples, shape (steps, B, L)
    betas: Tensor  # weight of the rate, shape (steps,)
    progress: Tensor  # of training, in [0, 1], shape (steps,)
    prior: Tensor | None  # N(0, I) for loss terms, shape (steps, B, L); None without terms


Drawn = tuple[Tensor, Draw]  # images of an epoch, uint8, and its draws


class Step:
    """The training step of one run or of a stack, with its buffers, and their metrics.

    Args:
        state: weights and moments of the runs, updated in place.
        data: the dataset for each `binarization`, as runs are measured on it.
        linear: the exact linear model's losses by row of the run, on train and val, (..., 2).
    """

    def __init__(self, state: State, data: Mapping[str, Dataset], linear: Tensor) -> None:
        config, pixels, new = state.configs[0], state.model.pixels, state.weights.new_zeros
        self.state, self.data = state, data[config.binarization]
        self.images = data["none"].train if config.binarization == "stochastic" else self.data.train
        self.steps = len(self.images) // config.batch_size
        self._x = state.join([new(config.batch_size, pixels) for _ in state.configs])
        self._coefficients: Coefficients = state.join(
            [coefficients(c, pixels, self._x.device, self._x.dtype) for c in state.configs]
        )
        gradient = torch.zeros_like(state.weights)
        self._gradient, self._slopes = gradient, state.views(gradient)
        buffers = (state.weights, gradient, state.first, state.second, state.counts)
        rates = [c.learning_rate for c in state.configs]  # one call of Adam has one of them
        self._by_rate = {
            rate: [[b[s] for s, own in enumerate(rates) if own == rate] for b in buffers]
            for rate in dict.fromkeys(rates)
        }
        self._written: MLPGradient | None = None
        if not state.stacked:
            state.attach()
            for name, parameter in state.model.named_parameters():
                parameter.grad = self._slopes[name][0] if name in self._slopes else None
            if not self._x.is_cuda and covers(config, state.model, state.terms):
                self._written = MLPGradient(config, state.model)
        self._first, val = self.data.train.head(len(self.data.val)), self.data.val
        given = []  # to `measure`, of each run on both splits
        for c, losses in zip(state.configs, linear[list(state.rows)], strict=True):
            on_train = conditions(c, state.model, "train", len(self._first), losses[0])
            given.append((on_train, conditions(c, state.model, "val", len(val), losses[1])))
        self._given = state.join(given)
        self._ahead: dict[int, Drawn] = {}
        if state.stacked:
            self.capture()

    def epoch(self, epoch: int) -> Measured:
        """Train an epoch, counted from 1, and measure the runs."""
        start = time.perf_counter()
        self.train(self._ahead.pop(epoch) if epoch in self._ahead else self.draw(epoch), epoch)
        if self.state.stacked and epoch < self.state.configs[0].epochs:
            self._ahead = {epoch + 1: self.draw(epoch + 1)}  # while a GPU computes
        if self._x.is_cuda:
            torch.cuda.synchronize(self._x.device)
        between = time.perf_counter()
        metrics = self.measure()
        return between - start, time.perf_counter() - between, metrics

    def draw(self, epoch: int) -> Drawn:
        """Return the images and the draws of an epoch, on the device.

        Random pixels are drawn anew every epoch; the images then hold a copy for each seed.
        """
        configs, steps, images = self.state.configs, self.steps, self.images.images
        config, of_seed = configs[0], {c.seed: c for c in configs}
        shape = steps, config.batch_size, config.latent_size

        def latents(seed: int, purpose: str) -> Tensor:
            return streams.noise(seed, purpose, steps * shape[1], shape[2], epoch).view(shape)

        order = {
            s: streams.batches(c, len(images), epoch).view(shape[:2]) for s, c in of_seed.items()
        }
        noise = {seed: latents(seed, "noise") for seed in of_seed}
        prior = {seed: latents(seed, "prior") if config.terms else None for seed in of_seed}
        if config.binarization == "stochastic":
            order = {seed: rows + k * len(images) for k, (seed, rows) in enumerate(order.items())}
            drawn = (streams.generator(seed, "binarize", epoch) for seed in of_seed)
            images = torch.cat([self.images.binarized("stochastic", s).images for s in drawn])
        done = (epoch - 1) * steps + torch.arange(steps, dtype=torch.float64)
        draws = []
        for c in configs:
            beta = objective.beta(c, self.state.model.pixels)
            betas = objective.kl_warmup(c, epoch, steps) * beta
            progress = done / (c.epochs * steps)
            draws.append(Draw(order[c.seed], noise[c.seed], betas, progress, prior[c.seed]))

        def moved(part: Tensor) -> Tensor:
            return part.to(self._x if part.is_floating_point() else self._x.device)

        return images, map_tensors(moved, self.state.join(draws, 1))

    def train(self, drawn: Drawn, epoch: int) -> None:
        """Take every step of an epoch; a GPU may still compute on return."""
        with kernels(self.state.configs[0].precision):
            if self.state.stacked:
                map_tensors(Tensor.copy_, self._laid_out, drawn)
                self._now.zero_()
                for _ in range(self.steps):
                    self._replay()
                return
            images, draw = drawn
            parts = (repeat(None) if part is None else part.unbind() for part in draw)
            gpus, may_draw = [self._x.device] if self._x.is_cuda else [], self._written is None
            with torch.random.fork_rng(gpus, enabled=may_draw):
                if may_draw:  # layers draw the same numbers in every process
                    stream = streams.generator(self.state.configs[0].seed, "layers", epoch)
                    torch.manual_seed(int(stream.integers(2**63)))
                self.state.model.train()
                for now in map(Draw, *parts):
                    self._take(images, now)
                self.state.model.eval()

    def _take(self, images: Tensor, now: Draw) -> None:
        state = self.state
        grey = images.index_select(0, now.order.flatten())
        self._x.copy_(grey.view(self._x.shape)).div_(self.data.train.largest)
        if self._written is not None:
            self._written(self._x, now.noise, now.betas)
        else:
            given = self._x.unflatten(-1, state.model.data_shape), now, self._coefficients
            if state.stacked:
                slopes = state.lift(self._loss, gradient=True)(*given)
                torch._foreach_copy_([self._slopes[n] for n in slopes], list(slopes.values()))
            else:
                self._gradient.zero_()
                with torch.enable_grad():
                    self._loss(state.model, *given).backward()
        self._update()

    def _loss(self, model: VAE, x: Tensor, now: Draw, coefficients: Coefficients) -> Tensor:
        batch = model.batch(x, now.noise, now.prior, len(self.images), now.progress)
        coefficients = coefficients._replace(beta=now.betas)
        return objective.objective(self.state.configs[0], batch, coefficients, self.state.terms)

    @torch.no_grad()
    def _update(self) -> None:
        """Update the weights by Adam (Kingma & Ba 2014), with PyTorch's constants."""
        self.state.counts.add_(1)
        # The kernel itself, as of PyTorch 2.11 to 2.15: `torch.optim.adam.adam` needs 65 us more a
        # step on a CPU, and the class imports torch.compile at its first use, for seconds.
        for rate, (weights, gradients, first, second, counts) in self._by_rate.items():
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

    def measure(self) -> list[tuple[Metrics, Metrics]]:
        """Return each run's metrics on the first training images and on validation images."""
        splits = []
        with kernels(), torch.no_grad():
            for named in (self._measure if self.state.stacked else self._metrics)():
                table = torch.stack([value.reshape(-1) for value in named.values()], 1).tolist()
                splits.append([dict(zip(named, values, strict=True)) for values in table])
        return list(zip(*splits, strict=True))

    def _metrics(self) -> tuple[Metrics, Metrics]:
        return self.state.lift(self._of_run)(*self._given)

    def _of_run(self, model: VAE, on_train: Metrics, on_val: Metrics) -> tuple[Metrics, Metrics]:
        config, classes = self.state.configs[0], self.data.classes
        same: dict[str, Any] = {"terms": self.state.terms, "training_size": len(self.images)}
        val = measure(config, model, self.data.val, classes, **on_val, **same)
        same["variance"] = val["mse"]
        return measure(config, model, self._first, classes, **on_train, **same), val

    def capture(self) -> None:
        """Make step and metrics of a stack repeatable, and take the memory of an epoch."""
        state, device = self.state, self._x.device
        self._laid_out, self._now = self.draw(1), torch.zeros(1, dtype=torch.int64, device=device)
        changed = [state.weights, state.first, state.second, state.counts, self._now]
        with kernels(state.configs[0].precision):
            self._replay = repeatable(self._step, device, [*changed, *state.constants.values()])
        with kernels(), torch.no_grad():
            self._measure = repeatable(self._metrics, device)
        self._ahead = {1: self.draw(1)}
        if (free := free_memory(device)) < MARGIN:
            raise torch.OutOfMemoryError(f"{free:.1%} of the memory is left")

    def _step(self) -> None:
        images, draw = self._laid_out
        self._take(images, map_tensors(lambda every: every.index_select(0, self._now)[0], draw))
        self._now.add_(1)


def repeatable(
    function: Callable[[], Result], device: torch.device, changed: Sequence[Tensor] = ()
) -> Callable[[], Result]:
    """Return what repeats a function: on a GPU, a CUDA graph without the Python interpreter.

    The function is tried, and undone in the tensors that it changes; a RuntimeError if it waits for
    the GPU, as copies from and to the host do. A graph reads and writes tensors where they are,
    those of the result too.
    """
    before = [tensor.clone() for tensor in changed]

    def tried() -> None:
        function()
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)

    if device.type != "cuda":
        tried()
        return function
    stream, waits = _capture_stream(), torch.cuda.get_sync_debug_mode()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls the mode a prototype
        tried()
        torch.cuda.set_sync_debug_mode("error")  # before a capture is broken by it
        try:
            for _ in range(WARM_UP - 1):
                tried()
        finally:
            torch.cuda.set_sync_debug_mode(waits)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = function()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


def free_memory(device: torch.device) -> float:
    """Return the share of a GPU's memory that is free; 1 on a CPU."""
    if device.type != "cuda":
        return 1.0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return free / total


@cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one for all, since libraries keep a workspace for each
