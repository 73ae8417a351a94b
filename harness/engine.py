"""Training of a stack of runs, epoch by epoch, on the device that is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from harness import objective
from harness.autograd import may_fork
from harness.checkpoint import Checkpoints
from harness.config import Precision, RunConfig, UserError, check_static
from harness.cores import crew
from harness.courses import Courses, Measured
from harness.data.dataset import Dataset
from harness.evaluate import losses_of_linear
from harness.gauge import Arrays, first_training_images
from harness.part import Part, begin
from harness.vae import VAE

STACK_WIDTH = {"cpu": 16, "cuda": 64}
"""Runs trained together by default; measured on the CPU (benchmarks/RESULTS.md)."""


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch of a stack gave; arrays are float64 of shape (S,).

    The caller can end the training of some runs before the others: `record.drop([0, 2])` takes
    rows 0 and 2 of this record out of the stack before the next epoch. The other runs go on as if
    nothing had happened, and the next record is over them alone.

    Attributes:
        epoch: epochs finished, counted from 1.
        seconds: wall time of the epoch's training, evaluation excluded; where runs are computed
            side by side, training's share of the epoch's wall time.
        images: training images seen in the epoch by all runs of the stack together.
        train: metric name -> values on the first training images, as many as `val` has.
        val: metric name -> values on the validation split.
        kl_warmup: factor of beta at the epoch's last step.
        models: the live runs in their parts, in the order of `rows`; their weights change when the
            next record is asked for.
        rows: positions of the runs in the list that `train` was given, shape (S,).
        resumed: epoch after which each run was taken up again from a checkpoint, 0 for one that
            began here, shape (S,). Up to it a record repeats what was measured before, and the
            run's model is that of this epoch.
        dropped: rows of this record that go no further.
    """

    epoch: int
    seconds: float
    images: int
    train: dict[str, np.ndarray]
    val: dict[str, np.ndarray]
    kl_warmup: np.ndarray
    models: tuple[VAE, ...] = field(repr=False)
    rows: tuple[int, ...]
    resumed: tuple[int, ...]
    dropped: set[int] = field(default_factory=set)

    def drop(self, rows: Iterable[int]) -> None:
        """End the training of some rows of this record; dropping all of them ends it all.

        Raises:
            UserError: a row that the record does not have.
        """
        chosen = set(rows)
        if unknown := chosen.difference(range(len(self.rows))):
            last = len(self.rows) - 1
            raise UserError(f"drop({sorted(unknown)}): the rows of this record are 0 to {last}")
        self.dropped.update(chosen)

    @cached_property
    def model(self) -> VAE:
        """All runs as one stack: the live one, or a copy where they are computed in parts."""
        if len(self.models) == 1:
            return self.models[0]
        runs = [part.run(row) for part in self.models for row in range(len(part.configs))]
        return VAE(runs).to(self.models[0].device)

    @property
    def images_per_second(self) -> float:
        """Training images per second, summed over the runs of the stack."""
        return self.images / self.seconds


def resolve_device(name: str, precision: Precision = "float32") -> torch.device:
    """Return the device that a name stands for; "auto" is CUDA where there is one.

    Raises:
        UserError: unknown name, or CUDA asked for where there is none, or a precision that the
            device does not have.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name!r}: choose one of auto, cpu, cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda': no CUDA device is usable here; use --device cpu or auto")
    if precision == "tf32" and name == "cpu":
        raise UserError("precision='tf32' on a CPU: only a GPU has it; use --precision float32")
    return torch.device(name)


def train(
    configs: Sequence[RunConfig],
    data: Dataset,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    checkpoints: Checkpoints | None = None,
) -> Iterator[EpochRecord]:
    """Train a stack of runs with Adam, one record an epoch; it can drop runs (`EpochRecord`).

    On a GPU the runs are computed as one; on a CPU side by side on its cores, a run a core, where
    each gives the same bits whatever its company.

    Args:
        configs: the runs; they may differ in the fields of `harness.config.SWEPT` only.
        data: the dataset; it is moved to the device.
        device: "auto", "cpu" or "cuda".
        dtype: torch.float32 or torch.float64.
        checkpoints: where unfinished runs are kept and taken up again: every so many epochs, after
            the last, and when the caller stops early. On a CPU a run that goes on gives the same
            bits as one that was never stopped.

    Raises:
        UserError: when the first record is asked for: the runs cannot share a stack, the device is
            not there, the dtype is another, or a batch is larger than the training split.
    """
    check_stack(configs, data)
    if dtype not in (torch.float32, torch.float64):
        raise UserError(f"dtype={dtype}: choose torch.float32 or torch.float64")
    target = resolve_device(device, configs[0].precision)
    courses = Courses(configs, data, target, dtype, checkpoints)
    parts = _parts(configs, data.to(target), dtype, courses)

    def epoch_of(item: tuple[int, int]) -> Measured:
        index, epoch = item
        return Measured(*parts[index].epoch(epoch))

    workers = len(parts) if may_fork(configs[0]) else 1
    with crew(epoch_of, workers, target) as cores:
        left = list(range(len(parts)))
        for epoch in range(1, configs[0].epochs + 1):
            live = [index for index in left if epoch > courses.starts[parts[index].rows[0]]]
            start = time.perf_counter()
            done = dict(zip(live, cores.map([(index, epoch) for index in live]), strict=True))
            wall = time.perf_counter() - start
            every = [done.get(i) or courses.recall(parts[i].rows, epoch) for i in left]
            record = _record([parts[index] for index in left], epoch, wall, every, courses)
            try:
                yield record
            except GeneratorExit:
                left = _drop(parts, left, record.dropped)
                courses.stop([parts[index] for index in left], epoch)
                raise
            left = _drop(parts, left, record.dropped)
            courses.save([parts[index] for index in left], epoch)
            if not left:
                return


def _parts(
    configs: Sequence[RunConfig], grey: Dataset, dtype: torch.dtype, courses: Courses
) -> list[Part]:
    data = grey.binarized(configs[0].binarization)
    linear = losses_of_linear(configs, data, (first_training_images(data), data.val))
    device = grey.train.images.device
    together = [
        [row for row in rows if courses.starts[row] == start]
        for rows in groups(len(configs), device)
        for start in sorted({courses.starts[row] for row in rows})
    ]
    begun = (begin(configs, rows, grey, data, linear, dtype) for rows in together)
    parts = [part for parts in begun for part in parts]
    for part in parts:
        courses.restore(part)
    return parts


def groups(runs: int, device: torch.device) -> list[list[int]]:
    """Return which rows of a stack are computed together: all on a GPU, each alone on a CPU."""
    rows = list(range(runs))
    return [[row] for row in rows] if device.type == "cpu" else [rows]


def _record(
    parts: Sequence[Part],
    epoch: int,
    wall: float,
    done: Sequence[Measured],
    courses: Courses,
) -> EpochRecord:
    training, measuring, train, val = zip(*done, strict=True)
    configs = [config for part in parts for config in part.model.configs]
    rows = tuple(row for part in parts for row in part.rows)
    live = sum(epoch > courses.starts[row] for row in rows)
    steps = len(parts[0].step.order)
    if live:
        share = sum(training) / (sum(training) + sum(measuring))
        pace = wall * share, live * steps * configs[0].batch_size
    else:
        pace = courses.pace(rows[0], epoch)
    record = EpochRecord(
        epoch,
        *pace,
        train=_joined(train),
        val=_joined(val),
        kl_warmup=objective.kl_warmup(configs, epoch, steps)[-1].numpy(),
        models=tuple(part.model for part in parts),
        rows=rows,
        resumed=tuple(courses.starts[row] for row in rows),
    )
    courses.note(epoch, rows, pace, record.train, record.val)
    return record


def _joined(every: Sequence[Arrays]) -> Arrays:
    """Join the metrics of parts; NaN where a part has no such metric, for lack of latents, say."""
    names = dict.fromkeys(name for arrays in every for name in arrays)
    sizes = [len(arrays["mse"]) for arrays in every]
    return {
        name: np.concatenate(
            [arrays.get(name, np.full(n, np.nan)) for arrays, n in zip(every, sizes, strict=True)]
        )
        for name in names
    }


def _drop(parts: list[Part], left: Sequence[int], dropped: set[int]) -> list[int]:
    """Take the dropped rows of a record out of their parts; return the parts that go on."""
    going, first = [], 0
    for index in left:
        count = len(parts[index].rows)
        rows = [row for row in range(count) if first + row not in dropped]
        first += count
        if rows:
            going.append(index)
            if len(rows) < count:  # several runs are computed together in this process only
                parts[index] = parts[index].keep(rows)
    return going


def check_stack(configs: Sequence[RunConfig], data: Dataset) -> None:
    """Raise UserError unless the runs can be trained together on the data."""
    if not configs:
        raise UserError("configs is empty: give at least one RunConfig")
    check_static(configs)
    if configs[0].batch_size > len(data.train):
        raise UserError(
            f"batch_size={configs[0].batch_size}: {data.name} has {len(data.train)} training "
            "images; give a smaller batch"
        )
