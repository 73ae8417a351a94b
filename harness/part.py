"""Runs that are computed together: all of a stack on a GPU, one on a core of a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from harness import objective, streams
from harness.config import RunConfig, UserError
from harness.data import Dataset, Split
from harness.evaluate import Metrics, evaluation_noise, measure, to_arrays
from harness.step import Step
from harness.vae import VAE, initial

Arrays = dict[str, np.ndarray]
"""Metric name -> float64 values of shape (S,)."""


@dataclass(frozen=True)
class Part:
    """Some runs of a stack on their way through training.

    Attributes:
        step: their training step, and the model that it trains.
        grey: training images as they are in the dataset.
        data: the dataset as the runs are measured on it.
        linear: loss of the exact linear model at each run's knob, on `probe` and validation
            images, shape (2, S).
        rows: positions of the runs in the list that `train` was given.
    """

    step: Step
    grey: Split
    data: Dataset
    linear: Tensor
    rows: tuple[int, ...]

    @property
    def model(self) -> VAE:
        """The stack of these runs."""
        return self.step.model

    def epoch(self, epoch: int) -> tuple[float, float, Arrays, Arrays]:
        """Train one epoch and measure; return the seconds of both, and train and val metrics."""
        start = time.perf_counter()
        self.train(epoch)
        self._synchronize()
        between = time.perf_counter()
        metrics = self.measure()
        return between - start, time.perf_counter() - between, *metrics

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def train(self, epoch: int) -> None:
        """Train one epoch."""
        self._lay_out(epoch)
        self.step.epoch()

    def rehearse(self) -> None:
        """Take all the memory that an epoch takes on a GPU, and change nothing."""
        if self.model.device.type != "cuda":
            return
        self._lay_out(1)
        self.step.capture()
        self.measure()

    def _lay_out(self, epoch: int) -> None:
        model, configs = self.model, self.model.configs
        steps = len(self.step.order)
        order = streams.batches(configs, len(self.grey), epoch)
        noise = streams.noise(configs, "noise", order.shape[1], epoch, model.latent_size)
        warmup = objective.kl_warmup(configs, epoch, steps)
        betas = warmup * objective.betas(configs, model.pixels)
        split, order = _seen(self.grey, order, configs, epoch)
        self.step.load(split.images, split.largest, order, noise, betas)

    def measure(self) -> tuple[Arrays, Arrays]:
        """Return the metrics on the first training images and on validation, in one transfer."""
        data, model = self.data, self.model
        first = probe(data)
        noise = evaluation_noise(model, "val", len(data.val))
        val = measure(model, data.val, noise, data.classes, None, self.linear[1])
        noise = evaluation_noise(model, "train", len(first))
        train = measure(model, first, noise, data.classes, val["mse"], self.linear[0])
        arrays = to_arrays(_prefixed(train) | val)
        return {name: arrays.pop(f"train/{name}") for name in train}, arrays

    def keep(self, rows: Sequence[int]) -> Part:
        """Return the part with some of its runs."""
        return replace(
            self,
            step=self.step.keep(rows),
            linear=self.linear[:, list(rows)],
            rows=tuple(self.rows[row] for row in rows),
        )


def _prefixed(metrics: Metrics) -> Metrics:
    return {f"train/{name}": values for name, values in metrics.items()}


def probe(data: Dataset) -> Split:
    """Return the training images that train metrics are measured on: as many as validation has."""
    return data.train.head(len(data.val))


def begin(
    configs: Sequence[RunConfig],
    rows: Sequence[int],
    grey: Dataset,
    data: Dataset,
    linear: Tensor,
    dtype: torch.dtype,
) -> list[Part]:
    """Return untrained runs together, or in halves that follow one another if memory is short.

    Args:
        configs: every run of the stack.
        rows: which of them make the part.
        grey: the dataset as it is, on the device.
        data: the dataset as the runs are measured on it.
        linear: loss of the exact linear model for every run of the stack, shape (2, S).
        dtype: torch.float32 or torch.float64.

    Raises:
        UserError: there is no room for one run.
    """
    try:
        part = _untrained(configs, rows, grey, data, linear, dtype)
        part.rehearse()
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            widths = "channels" if configs[0].model == "conv" else "hidden"
            raise UserError(
                f"batch_size={configs[0].batch_size}, {widths}={getattr(configs[0], widths)}: one "
                "run needs more memory than is free on the GPU; give smaller ones, or --device cpu"
            ) from None
    else:
        return [part]
    torch.cuda.empty_cache()  # outside the handler, which holds what did not fit
    middle = len(rows) // 2
    halves = (rows[:middle], rows[middle:])
    return [part for half in halves for part in begin(configs, half, grey, data, linear, dtype)]


def _untrained(
    configs: Sequence[RunConfig],
    rows: Sequence[int],
    grey: Dataset,
    data: Dataset,
    linear: Tensor,
    dtype: torch.dtype,
) -> Part:
    chosen = [configs[row] for row in rows]
    model = VAE([initial(c, data.image_shape) for c in chosen])
    model = model.to(data.train.images.device, dtype)
    if model.log_decoder_variance is not None:
        # The mse of a decoder that knows the mean image alone.
        torch.nn.init.constant_(model.log_decoder_variance, math.log(data.pixel_variance))
    step = Step(model, len(grey.train) // chosen[0].batch_size)
    return Part(step, grey.train, data, linear[:, list(rows)], tuple(rows))


def _seen(
    split: Split, order: Tensor, configs: Sequence[RunConfig], epoch: int
) -> tuple[Split, Tensor]:
    """Return the training images as an epoch shows them, and where each run finds its batches.

    Pixels drawn for the epoch differ from seed to seed, so there is a copy of the split a seed.
    """
    kind = configs[0].binarization
    if kind != "stochastic":
        return split.binarized(kind), order
    seeds = sorted({c.seed for c in configs})
    streamed = [streams.generator(seed, "binarize", epoch) for seed in seeds]
    copies = [split.binarized(kind, stream) for stream in streamed]
    first = torch.tensor([[seeds.index(c.seed) * len(split)] for c in configs])
    return replace(copies[0], images=torch.cat([c.images for c in copies])), order + first
