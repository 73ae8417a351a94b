"""Training of a stack of runs: device, precision and the optimiser live here and only here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from harness import elbo, objective, oracle, streams
from harness.config import RunConfig, UserError
from harness.data import Dataset, Split
from harness.evaluate import evaluation_noise, linear_losses, measure, to_arrays
from harness.optimizer import Adam
from harness.streams import generator
from harness.vae import VAE, initial

Device = Literal["auto", "cpu", "cuda"]

THREADED_WORK = 2**25
"""Multiplications of a stack's largest layer from which a second CPU thread pays; measured."""

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
        seconds: wall time of the epoch's training, evaluation excluded.
        images: training images seen in the epoch by all runs of the stack together.
        train: metric name -> values on the first training images, as many as `val` has.
        val: metric name -> values on the validation split.
        kl_warmup: factor of beta at the epoch's last step.
        model: the live stack; its weights change when the next record is asked for.
        rows: positions of the runs in the list that `train` was given, shape (S,).
        dropped: rows of this record that go no further.
    """

    epoch: int
    seconds: float
    images: int
    train: dict[str, np.ndarray]
    val: dict[str, np.ndarray]
    kl_warmup: np.ndarray
    model: VAE = field(repr=False)
    rows: tuple[int, ...]
    dropped: set[int] = field(default_factory=set)

    def drop(self, rows: Iterable[int]) -> None:
        """End the training of some rows of this record; dropping all of them ends it all."""
        self.dropped.update(rows)

    @property
    def images_per_second(self) -> float:
        """Training images per second, summed over the runs of the stack."""
        return self.images / self.seconds


def resolve_device(name: str) -> torch.device:
    """Return the device that a name stands for; "auto" is CUDA where there is one.

    Raises:
        UserError: unknown name, or CUDA asked for where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name!r}: choose one of auto, cpu, cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda': no CUDA device is usable here; use --device cpu or auto")
    return torch.device(name)


def train(
    configs: Sequence[RunConfig],
    data: Dataset,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Iterator[EpochRecord]:
    """Train a stack of runs with Adam, one record an epoch; it can drop runs (`EpochRecord`).

    Args:
        configs: the runs; they may differ in the fields of `harness.config.SWEPT` only.
        data: the dataset; it is moved to the device.
        device: "auto", "cpu" or "cuda".
        dtype: torch.float32 or torch.float64.

    Raises:
        UserError: the runs cannot share a stack, the device is not there, or a batch is larger
            than the training split.
    """
    check_stack(configs, data)
    target = resolve_device(device)
    grey = data.to(target)
    data = grey.binarized(configs[0].binarization)
    model = VAE([initial(c, data.image_shape) for c in configs]).to(target, dtype)
    _start_learned_variances(model, data)
    update, rows = Adam(model), tuple(range(len(configs)))
    linear = [linear_losses(model, data, split) for split in (_probe(data), data.val)]
    with _cpu_settings(configs, data.pixels):
        for epoch in range(1, configs[0].epochs + 1):
            start = time.perf_counter()
            images, warmup = _epoch(model, update, grey.train, epoch)
            _synchronize(target)
            seconds = time.perf_counter() - start
            metrics = _measure(model, data, *linear)
            record = EpochRecord(epoch, seconds, images, *metrics, warmup.numpy(), model, rows)
            yield record
            if record.dropped:
                left = [row for row in range(len(rows)) if row not in record.dropped]
                if not left:
                    return
                model, rows = model.keep(left), tuple(rows[row] for row in left)
                update = update.keep(left, model)
                linear = [part[left] for part in linear]


def _probe(data: Dataset) -> Split:
    """Return the training images that train metrics are measured on."""
    return data.train.head(len(data.val))


def _measure(
    model: VAE, data: Dataset, train_linear: Tensor, val_linear: Tensor
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the metrics on the first training images and on validation, in one transfer."""
    probe = _probe(data)
    noise = evaluation_noise(model, "val", len(data.val))
    val = measure(model, data.val, noise, data.classes, None, val_linear)
    noise = evaluation_noise(model, "train", len(probe))
    train = measure(model, probe, noise, data.classes, val["mse"], train_linear)
    arrays = to_arrays({f"train/{k}": v for k, v in train.items()} | val)
    return {k: arrays.pop(f"train/{k}") for k in train}, arrays


def check_stack(configs: Sequence[RunConfig], data: Dataset) -> None:
    """Raise UserError unless the runs can be trained together on the data."""
    if not configs:
        raise UserError("configs is empty: give at least one RunConfig")
    if len({c.static() for c in configs}) > 1:
        raise UserError("runs of one stack must agree in every field that is not swept")
    if configs[0].batch_size > len(data.train):
        raise UserError(
            f"batch_size={configs[0].batch_size}: {data.name} has {len(data.train)} training "
            "images; give a smaller batch"
        )


def _epoch(model: VAE, update: Adam, split: Split, epoch: int) -> tuple[int, Tensor]:
    """Train one epoch; return the images seen by all runs and the last warm-up factors."""
    configs, batch = model.configs, model.configs[0].batch_size
    device, dtype = model.device, model.dtype
    order = streams.batches(configs, len(split), epoch)
    noise = streams.noise(configs, "noise", order.shape[1], epoch, model.latent_size)
    noise = noise.to(device, dtype)
    warmup = objective.kl_warmup(configs, epoch, order.shape[1] // batch)
    betas = (warmup * objective.betas(configs, split.images.shape[1])).to(device, dtype)
    split, rows = _seen(split, order.to(device), configs, epoch)
    for step, beta in enumerate(betas):
        now = slice(step * batch, (step + 1) * batch)
        x = split.pixels(rows[:, now], dtype)
        losses(model, x, noise[:, now], beta).sum().backward()
        update.step()
        model.zero_grad()
    return rows.numel(), warmup[-1]


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
    copies = [split.binarized(kind, generator(seed, "binarize", epoch)) for seed in seeds]
    images = torch.cat([copy.images for copy in copies])
    first = torch.tensor([[seeds.index(c.seed) * len(split)] for c in configs])
    return replace(copies[0], images=images), order + first.to(order.device)


def _start_learned_variances(model: VAE, data: Dataset) -> None:
    """Start learned decoder variances at the mse of a decoder that knows the mean image alone."""
    if model.log_decoder_variance is not None:
        variance = oracle.pca(data).likeliest_variance(0)
        torch.nn.init.constant_(model.log_decoder_variance, math.log(variance))


def losses(model: VAE, x: Tensor, eps: Tensor, beta: Tensor) -> Tensor:
    """Return the training loss of each run on its batch.

    Args:
        model: the stack.
        x: pixels in [0, 1], shape (S, B, D).
        eps: standard normal noise, shape (S, B, L).
        beta: weight of the rate, shape (S,).

    Returns:
        Shape (S,). Summing it gives every run exactly its own gradient.
    """
    error, cross_entropy, kl, _ = elbo.terms(model, x, eps)
    return elbo.loss(
        model,
        error.mean(-1),
        None if cross_entropy is None else cross_entropy.mean(-1),
        None if kl is None else kl.mean(1),
        beta,
        x.shape[-1],
    )


@contextmanager
def _cpu_settings(configs: Sequence[RunConfig], pixels: int) -> Iterator[None]:
    """Flush denormals from here on, and use one thread for small layers until training ends."""
    sizes = (pixels, *configs[0].hidden, configs[0].latent_size)
    largest = max(inputs * outputs for inputs, outputs in pairwise(sizes))
    threads = torch.get_num_threads()
    torch.set_flush_denormal(True)  # Adam's moments decay into denormals, which a CPU is slow at
    if len(configs) * configs[0].batch_size * largest < THREADED_WORK:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
