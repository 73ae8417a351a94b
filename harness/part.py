"""Runs that are computed together: all of a stack on a GPU, one on a core of a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from harness import objective, streams
from harness.config import RunConfig, UserError
from harness.data.dataset import Dataset, Split
from harness.gauge import Arrays, Gauge
from harness.step import Step
from harness.vae import VAE, untrained

MARGIN = 0.05
"""Share of a GPU's memory that is left free, for metrics of finished runs and for neighbours."""


class Epoch(NamedTuple):
    """All that an epoch takes from the data and from the random streams, as `Step.load` has it."""

    images: Tensor
    largest: int
    order: Tensor
    noise: Tensor
    betas: Tensor


@dataclass(frozen=True)
class Part:
    """Some runs of a stack on their way through training.

    Attributes:
        step: their training step, and the model that it trains.
        gauge: what is measured of them after every epoch.
        images: training images as they are drawn from, anew every epoch where pixels are random.
        rows: positions of the runs in the list that `train` was given.
        ahead: epochs drawn while a GPU was busy with the one before.
    """

    step: Step
    gauge: Gauge
    images: Split
    rows: tuple[int, ...]
    ahead: dict[int, Epoch] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> VAE:
        """The stack of these runs."""
        return self.step.model

    @property
    def _on_gpu(self) -> bool:
        return self.model.device.type == "cuda"

    def epoch(self, epoch: int) -> tuple[float, float, Arrays, Arrays]:
        """Train one epoch and measure; return the seconds of both, and train and val metrics."""
        start = time.perf_counter()
        self.train(epoch)
        if self._on_gpu:
            if epoch < self.model.configs[0].epochs:
                self.ahead[epoch + 1] = self._draw(epoch + 1)
            torch.cuda.synchronize(self.model.device)
        between = time.perf_counter()
        metrics = self.gauge.read()
        return between - start, time.perf_counter() - between, *metrics

    def train(self, epoch: int) -> None:
        """Train one epoch; a GPU may still be at it on return."""
        drawn = self.ahead.pop(epoch, None) or self._draw(epoch)
        self.ahead.clear()
        self.step.load(*drawn)
        self.step.epoch()

    def rehearse(self) -> None:
        """Take all the memory that an epoch takes on a GPU, and change nothing.

        Raises:
            torch.OutOfMemoryError: it is not there, or less than `MARGIN` is left.
        """
        if not self._on_gpu:
            return
        self.step.load(*self._draw(1))
        self.step.capture()
        self.gauge.read()
        self.ahead[1] = self._draw(1)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.model.device)
        if free < MARGIN * total:
            raise torch.OutOfMemoryError(f"{free} bytes of {total} are left")

    def _draw(self, epoch: int) -> Epoch:
        model, configs = self.model, self.model.configs
        order = streams.batches(configs, len(self.images), epoch)
        noise = streams.noise(configs, "noise", order.shape[1], epoch, model.latent_size)
        warmup = objective.kl_warmup(configs, epoch, len(self.step.order))
        betas = warmup * objective.betas(configs, model.pixels)
        split, order = _seen(self.images, order, configs, epoch)
        return Epoch(split.images, split.largest, order, noise, betas)

    def keep(self, rows: Sequence[int]) -> Part:
        """Return the part with some of its runs."""
        step = self.step.keep(rows)
        kept = tuple(self.rows[row] for row in rows)
        return Part(step, self.gauge.keep(step.model, rows), self.images, kept)


def begin(
    configs: Sequence[RunConfig],
    rows: Sequence[int],
    grey: Dataset,
    data: Dataset,
    linear: Tensor,
    dtype: torch.dtype,
) -> list[Part]:
    """Return untrained runs together, or in halves that take turns if memory is short.

    All of them stay in memory: halves share only what an epoch takes for a while.

    Args:
        configs: every run of the stack.
        rows: which of them make the part.
        grey: the dataset as it is, on the device.
        data: the dataset as the runs are measured on it, pixels drawn once where they are random.
        linear: loss of the exact linear model for every run of the stack, shape (2, S).
        dtype: torch.float32 or torch.float64.

    Raises:
        UserError: there is no room for one run.
    """
    part = _fitting(lambda: _untrained(configs, rows, grey, data, linear, dtype))
    if part is not None:
        return [part]
    if len(rows) == 1:
        widths = "channels" if configs[0].model == "conv" else "hidden"
        raise UserError(
            f"batch_size={configs[0].batch_size}, {widths}={getattr(configs[0], widths)}: one run "
            "needs more memory than is free on the GPU; give smaller ones, or --device cpu"
        )
    torch.cuda.empty_cache()
    middle = len(rows) // 2
    halves = (rows[:middle], rows[middle:])
    return [part for half in halves for part in begin(configs, half, grey, data, linear, dtype)]


def _fitting(make: Callable[[], Part]) -> Part | None:
    """Return what is made if it fits; else None, and nothing of it is kept."""
    try:
        part = make()
        part.rehearse()
    except RuntimeError as error:
        if not _lacks_memory(error):
            raise
        return None
    return part


def _lacks_memory(error: RuntimeError) -> bool:
    """Say whether a GPU is full: its libraries and its recordings have errors of their own."""
    words = ("out of memory", "ALLOC_FAILED", "StreamCaptureInvalidated")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _untrained(
    configs: Sequence[RunConfig],
    rows: Sequence[int],
    grey: Dataset,
    data: Dataset,
    linear: Tensor,
    dtype: torch.dtype,
) -> Part:
    chosen = [configs[row] for row in rows]
    model = untrained(chosen, data.image_shape).to(data.train.images.device, dtype)
    if model.log_decoder_variance is not None:
        # The mse of a decoder that knows the mean image alone.
        torch.nn.init.constant_(model.log_decoder_variance, math.log(data.pixel_variance))
    step = Step(model, len(grey.train) // chosen[0].batch_size)
    images = grey.train if chosen[0].binarization == "stochastic" else data.train
    return Part(step, Gauge(model, data, linear[:, list(rows)]), images, tuple(rows))


def _seen(
    split: Split, order: Tensor, configs: Sequence[RunConfig], epoch: int
) -> tuple[Split, Tensor]:
    """Return the training images as an epoch shows them, and where each run finds its batches.

    Pixels drawn for the epoch differ from seed to seed, so there is a copy of the split a seed.
    """
    kind = configs[0].binarization
    if kind != "stochastic":
        return split, order
    seeds, size = sorted({c.seed for c in configs}), len(split)
    copies = split.images.repeat(len(seeds), 1)
    for own, seed in zip(copies.split(size), seeds, strict=True):
        own.copy_(split.binarized(kind, streams.generator(seed, "binarize", epoch)).images)
    first = torch.tensor([[seeds.index(c.seed) * size] for c in configs])
    return replace(split, images=copies, largest=1), order + first
