"""Runs that are computed together, epoch by epoch: a stack on a GPU, one run on a CPU."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness import registry
from harness.config import RunConfig
from harness.data.dataset import Dataset, Split
from harness.errors import UserError
from harness.metrics.evaluate import conditions, measure
from harness.models.stack import kernels
from harness.models.vae import VAE, build
from harness.training.draws import Draw, draw
from harness.training.state import Run, State
from harness.training.step import Step, captured, refusal

MARGIN = 0.05
"""Share of a GPU's memory that is left free, for metrics of finished runs and other programs."""


Metrics = tuple[dict[str, float], dict[str, float]]
"""A run's metrics on the first training images and on validation images."""


class Measured(NamedTuple):
    """One epoch of a group: seconds of training and of measuring, and the metrics of each run."""

    training: float
    measuring: float
    metrics: list[Metrics]


class Group:
    """Runs that are computed together: a stack, or one run.

    Args:
        state: their weights and moments.
        rows: their positions in the list that `train` was given.
        images: training images that batches are taken from.
        data: the dataset as the runs are measured on it.
        linear: loss of the exact linear model of each run on both splits that are measured, (S, 2).
    """

    def __init__(
        self, state: State, rows: Sequence[int], images: Split, data: Dataset, linear: Tensor
    ) -> None:
        self.state, self.rows, self.images, self.data = state, tuple(rows), images, data
        self.linear = linear
        self._captured: tuple[torch.cuda.CUDAGraph, Any] | None = None
        self._ahead: dict[int, tuple[Split, Draw]] = {}

    @cached_property
    def step(self) -> Step:
        """The training step, made in the process that trains."""
        return Step(self.state, len(self.images))

    def epoch(self, epoch: int) -> Measured:
        """Train one epoch and measure the runs."""
        start = time.perf_counter()
        drawn = self._ahead.pop(epoch, None) or self.draw_epoch(epoch)
        self._ahead.clear()
        self.step.epoch(*drawn, epoch)
        if self.state.on_gpu:
            del drawn  # on a GPU the next draw takes its memory
            if epoch < self.state.configs[0].epochs:  # drawn while the GPU computes
                self._ahead[epoch + 1] = self.draw_epoch(epoch + 1)
            torch.cuda.synchronize(self.state.weights.device)
        between = time.perf_counter()
        metrics = self.measure()
        return Measured(between - start, time.perf_counter() - between, metrics)

    def draw_epoch(self, epoch: int) -> tuple[Split, Draw]:
        """Return the images and the draws of an epoch, on the device."""
        images, draws = draw(self.state.configs, self.images, epoch)
        return images, self.state.join(draws, 1).to(self.state.weights)

    def measure(self) -> list[Metrics]:
        """Return each run's metrics; a GPU captures their computation once and replays it."""
        compute = self._metrics
        with kernels(), torch.no_grad():
            if self.state.is_captured:
                self._captured = self._captured or captured(compute)
                graph, metrics = self._captured
                graph.replay()
            else:
                metrics = compute()
        splits = []
        for named in metrics:
            table = torch.stack([value.reshape(-1) for value in named.values()], 1).tolist()
            splits.append([dict(zip(named, values, strict=True)) for values in table])
        return list(zip(*splits, strict=True))

    @property
    def _metrics(self) -> Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """What computes the metrics, those of a stack with a leading axis S."""
        return partial(self.state.lift(self._of_run), *self._given)

    @cached_property
    def _given(self) -> tuple[dict[str, Any], ...]:
        """Arguments of `measure` that differ between runs, for both splits."""
        sizes = {"train": len(first_training_images(self.data)), "val": len(self.data.val)}
        return self.state.join(
            [
                tuple(
                    conditions(config, self.state.model, part, images, loss)
                    for (part, images), loss in zip(sizes.items(), losses, strict=True)
                )
                for config, losses in zip(self.state.configs, self.linear, strict=True)
            ]
        )

    def _of_run(
        self, model: VAE, train: dict[str, Any], val: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        config, data = self.state.configs[0], self.data
        same: dict[str, Any] = {"terms": self.state.terms, "training_size": len(self.images)}
        on_val = measure(config, model, data.val, data.classes, **val, **same)
        first, variance = first_training_images(data), on_val["mse"]
        on_train = measure(config, model, first, data.classes, variance=variance, **train, **same)
        return on_train, on_val

    def rehearse(self) -> None:
        """Take all the memory that an epoch takes on a GPU, and change nothing.

        Raises:
            torch.OutOfMemoryError: it is not there, or less than `MARGIN` would be left.
        """
        if not self.state.is_captured:
            return
        with kernels(self.state.configs[0].precision):
            self.step.capture(*self.draw_epoch(1))
        self.measure()
        self._ahead[1] = self.draw_epoch(1)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.state.weights.device)
        if free < MARGIN * total:
            raise torch.OutOfMemoryError(f"{free} bytes of {total} are left")

    def keep(self, kept: Sequence[int]) -> Group:
        """Return the group with some of its runs; what a GPU captured is freed first."""
        self._captured, self._ahead = None, {}
        vars(self).pop("step", None)
        rows = [self.rows[s] for s in kept]
        state = self.state.keep(kept)
        return Group(state, rows, self.images, self.data, self.linear[list(kept)])


def first_training_images(data: Dataset) -> Split:
    """Return the training images that train metrics are measured on: as many as validation has."""
    return data.train.head(len(data.val))


def computes_stacks(device: torch.device) -> bool:
    """Return whether runs of equal shapes are computed as one on a device."""
    return device.type == "cuda"


def untrained(
    configs: Sequence[RunConfig],
    rows: Sequence[int],
    grey: Dataset,
    data: Dataset,
    linear: Tensor,
    dtype: torch.dtype,
) -> list[Group]:
    """Return untrained runs as one group, or in halves that take turns if a GPU lacks memory.

    Halves stay in memory together; they share what an epoch takes for a while.

    Args:
        configs: every run.
        rows: positions of the group's runs, which share `stack_key`.
        grey: the dataset as it is, on the device.
        data: the dataset as the runs are measured on it, pixels drawn once where they are random.
        linear: losses of the exact linear model as `Group` has them, of every run.
        dtype: of the weights.
    """
    first = configs[rows[0]]
    images = grey.train if first.binarization == "stochastic" else data.train

    def groups(rows: list[int]) -> list[Group]:
        runs = [_run(configs[row], data, dtype) for row in rows]
        stacked = computes_stacks(images.images.device)
        from_user = first.terms or first.model not in registry.BUILT_IN
        if stacked and from_user and (reason := refusal(runs[0], images)):
            logging.getLogger(__name__).warning("Runs are trained one by one: %s", reason)
            stacked = False
        if stacked:
            group = Group(State(runs, stacked=True), rows, images, data, linear[rows])
            group.rehearse()
            return [group]
        return [
            Group(State([run], stacked=False), [row], images, data, linear[[row]])
            for row, run in zip(rows, runs, strict=True)
        ]

    waiting, made = [list(rows)], []
    while waiting:
        part = waiting.pop(0)
        try:
            made += groups(part)
            continue
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        if len(part) == 1:
            raise UserError(
                f"model={first.model!r}, batch_size={first.batch_size}: one run needs more memory "
                "than is free on the GPU; give a smaller network or batch, or --device cpu"
            )
        torch.cuda.empty_cache()
        middle = len(part) // 2
        waiting[:0] = [part[:middle], part[middle:]]
    return made


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _run(config: RunConfig, data: Dataset, dtype: torch.dtype) -> Run:
    model = build(config, data.image_shape, data.train.largest)
    model.to(data.train.images.device, dtype).eval()
    if config.sigma == "learned":  # the mse of a decoder that knows the mean image alone
        torch.nn.init.constant_(model.log_decoder_variance, math.log(data.pixel_variance))
    return Run(config, model, {name: registry.TERMS[name] for name in config.terms})
