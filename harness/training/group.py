"""Runs that are computed together, epoch by epoch: a stack on a GPU, one run on a CPU."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness import registry
from harness.config import RunConfig
from harness.data.dataset import Dataset, Split
from harness.errors import UserError
from harness.metrics.evaluate import conditions, measure
from harness.models.stack import kernels, map_tensors
from harness.models.vae import VAE, build
from harness.training.draws import Draw, draw
from harness.training.state import Run, State
from harness.training.step import Step, captured, refusal

MARGIN = 0.05
"""Share of a GPU's memory that is left free, for metrics of finished runs and other programs."""


class Measured(NamedTuple):
    """One epoch of a group.

    Attributes:
        training, measuring: seconds.
        metrics: those on training and on validation images, of each run.
    """

    training: float
    measuring: float
    metrics: list[tuple[dict[str, float], dict[str, float]]]


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
        self._step: Step | None = None  # made in the process that trains
        self._given: tuple[dict[str, Any], ...] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: dict[str, Tensor] = {}
        self._ahead: dict[int, tuple[Split, Draw]] = {}

    @property
    def step(self) -> Step:
        """The training step."""
        if self._step is None:
            self._step = Step(self.state, len(self.images))
        return self._step

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
        stacked = self.state.stack is not None
        images, drawn = draw(self.state.configs, self.images, epoch, stacked=stacked)
        return images, drawn.to(self.state.weights)

    def measure(self) -> list[tuple[dict[str, float], dict[str, float]]]:
        """Return each run's metrics on the first training images and on validation images.

        A GPU captures their computation once and replays it.
        """
        if self._given is None:
            self._given = self._arguments()
        with kernels(), torch.no_grad():
            if not self.state.on_gpu or self.state.stack is None:
                metrics = self._metrics()
            else:
                if self._graph is None:
                    self._graph, self._captured = captured(self._metrics)
                self._graph.replay()
                metrics = self._captured
        table = torch.stack([value.reshape(-1) for value in metrics.values()], 1).tolist()
        return [self._split(dict(zip(metrics, values, strict=True))) for values in table]

    def _split(self, metrics: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        prefix = "train/"
        train = {n.removeprefix(prefix): v for n, v in metrics.items() if n.startswith(prefix)}
        return train, {n: v for n, v in metrics.items() if not n.startswith(prefix)}

    def _metrics(self) -> dict[str, Tensor]:
        assert self._given is not None
        if self.state.stack is None:
            return self._of_run(self.state.model, *self._given)
        return self.state.stack.lift(self._of_run)(*self._given)

    def _arguments(self) -> tuple[dict[str, Any], ...]:
        """Return the arguments of `measure` that differ between runs, for both splits."""
        sizes = {"train": len(first_training_images(self.data)), "val": len(self.data.val)}
        each = [
            tuple(
                conditions(config, self.state.model, part, images, loss)
                for (part, images), loss in zip(sizes.items(), losses, strict=True)
            )
            for config, losses in zip(self.state.configs, self.linear, strict=True)
        ]
        if self.state.stack is None:
            return each[0]
        return map_tensors(lambda *values: torch.stack(values), *each)

    def _of_run(self, model: VAE, train: dict[str, Any], val: dict[str, Any]) -> dict[str, Tensor]:
        """Return the validation metrics of one run, and training metrics prefixed `train/`."""
        config, data = self.state.configs[0], self.data
        same: dict[str, Any] = {"terms": self.state.terms, "training_size": len(self.images)}
        on_val = measure(config, model, data.val, data.classes, **val, **same)
        first, variance = first_training_images(data), on_val["mse"]
        on_train = measure(config, model, first, data.classes, variance=variance, **train, **same)
        return {f"train/{name}": value for name, value in on_train.items()} | on_val

    def rehearse(self) -> None:
        """Take all the memory that an epoch takes on a GPU, and change nothing.

        Raises:
            torch.OutOfMemoryError: it is not there, or less than `MARGIN` would be left.
        """
        if not self.state.on_gpu or self.state.stack is None:
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
        self._graph, self._captured, self._step, self._ahead = None, {}, None, {}
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
        dtype: torch.float32 or torch.float64.
    """
    try:
        return _untrained(configs, rows, grey, data, linear, dtype)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
    if len(rows) == 1:
        config = configs[rows[0]]
        raise UserError(
            f"model={config.model!r}, batch_size={config.batch_size}: one run needs more memory "
            "than is free on the GPU; give a smaller network or batch, or --device cpu"
        )
    torch.cuda.empty_cache()
    middle = len(rows) // 2
    halves = (rows[:middle], rows[middle:])
    return [
        group for half in halves for group in untrained(configs, half, grey, data, linear, dtype)
    ]


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _untrained(
    configs: Sequence[RunConfig],
    rows: Sequence[int],
    grey: Dataset,
    data: Dataset,
    linear: Tensor,
    dtype: torch.dtype,
) -> list[Group]:
    device, chosen = data.train.images.device, [configs[row] for row in rows]
    images = grey.train if chosen[0].binarization == "stochastic" else data.train
    runs = [_run(config, data, device, dtype) for config in chosen]
    stacked = computes_stacks(device)
    from_user = chosen[0].terms or chosen[0].model not in registry.BUILT_IN
    if stacked and from_user and (reason := refusal(runs[0], images)):
        logging.getLogger(__name__).warning("Runs are trained one by one: %s", reason)
        stacked = False
    parts = [list(range(len(rows)))] if stacked else [[s] for s in range(len(rows))]
    groups = []
    for part in parts:
        state, places = State([runs[s] for s in part], stacked=stacked), [rows[s] for s in part]
        groups.append(Group(state, places, images, data, linear[places]))
        groups[-1].rehearse()
    return groups


def _run(config: RunConfig, data: Dataset, device: torch.device, dtype: torch.dtype) -> Run:
    model = build(config, data.image_shape, data.train.largest).to(device, dtype).eval()
    if config.sigma == "learned":  # the mse of a decoder that knows the mean image alone
        torch.nn.init.constant_(model.log_decoder_variance, math.log(data.pixel_variance))
    return Run(config, model, {name: registry.TERMS[name] for name in config.terms})
