"""Training of a stack of runs: device, precision and the optimiser live here and only here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from harness import objective, streams
from harness.config import RunConfig, UserError
from harness.data import Dataset
from harness.evaluate import evaluation_noise, measure, to_arrays
from harness.vae import VAE, initial

Device = Literal["auto", "cpu", "cuda"]

THREADED_WORK = 2**25
"""Multiplications of a stack's largest layer from which a second CPU thread pays; measured."""

STACK_WIDTH = {"cpu": 16, "cuda": 64}
"""Runs trained together by default; measured on the CPU (benchmarks/RESULTS.md)."""


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch of a stack gave; arrays are float64 of shape (S,).

    Attributes:
        epoch: epochs finished, counted from 1.
        seconds: wall time of the epoch's training, evaluation excluded.
        images: training images seen in the epoch by all runs of the stack together.
        train: metric name -> values on the first training images, as many as `val` has.
        val: metric name -> values on the validation split.
        kl_warmup: factor of beta at the epoch's last step.
        model: the live stack; its weights change when the next record is asked for.
    """

    epoch: int
    seconds: float
    images: int
    train: dict[str, np.ndarray]
    val: dict[str, np.ndarray]
    kl_warmup: np.ndarray
    model: VAE = field(repr=False)

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
    """Train a stack of runs with Adam, one record an epoch.

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
    data = data.to(target)
    model = VAE([initial(c, data.image_shape) for c in configs]).to(target, dtype)
    update = _adam(model)
    with _cpu_settings(configs, data.pixels):
        for epoch in range(1, configs[0].epochs + 1):
            start = time.perf_counter()
            images, warmup = _epoch(model, update, data, epoch)
            _synchronize(target)
            seconds = time.perf_counter() - start
            yield EpochRecord(epoch, seconds, images, *_measure(model, data), warmup.numpy(), model)


def _measure(model: VAE, data: Dataset) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the metrics on the first training images and on validation, in one transfer."""
    probe = data.train.head(len(data.val))
    noise = evaluation_noise(model, "val", len(data.val))
    val = measure(model, data.val, noise, data.classes)
    noise = evaluation_noise(model, "train", len(probe))
    train = measure(model, probe, noise, data.classes, variance=val["mse"])
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


def _epoch(
    model: VAE, update: Callable[[], object], data: Dataset, epoch: int
) -> tuple[int, Tensor]:
    """Train one epoch; return the images seen by all runs and the last warm-up factors."""
    configs, batch = model.configs, model.configs[0].batch_size
    device, dtype = model.device, model.dtype
    order = streams.batches(configs, len(data.train), epoch)
    noise = streams.noise(configs, "noise", order.shape[1], epoch).to(device, dtype)
    warmup = objective.kl_warmup(configs, epoch, order.shape[1] // batch)
    betas = (warmup * objective.betas(configs, data.pixels)).to(device, dtype)
    rows = order.to(device)
    for step, beta in enumerate(betas):
        now = slice(step * batch, (step + 1) * batch)
        x = data.train.pixels(rows[:, now], dtype)
        losses(model, x, noise[:, now], beta).sum().backward()
        update()
        model.zero_grad()
    return rows.numel(), warmup[-1]


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
    posterior = model.encode(x)
    reconstruction = model.decode(model.reparameterize(posterior, eps))
    error = objective.squared_error(x, reconstruction).mean(-1)
    if model.configs[0].latent == "deterministic":
        return error / x.shape[-1]
    kl = objective.kl_per_latent(posterior.mean, posterior.log_variance)
    return objective.loss(error, kl.sum(-1).mean(-1), beta, x.shape[-1])


def _adam(model: VAE) -> Callable[[], object]:
    """Return the Adam update of all runs (Kingma & Ba 2014); elementwise, it couples no runs.

    PyTorch's optimiser takes one learning rate per tensor, so runs that differ in it are updated
    through views of their rows.
    """
    parameters = list(model.parameters())
    rates = [c.learning_rate for c in model.configs]
    if len(set(rates)) == 1:
        return torch.optim.Adam(parameters, lr=rates[0], fused=True).step
    rows = [[p.detach()[s] for p in parameters] for s in range(len(rates))]
    groups = [{"params": row, "lr": rate} for row, rate in zip(rows, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, fused=True)

    def update() -> None:
        for s, row in enumerate(rows):
            for view, parameter in zip(row, parameters, strict=True):
                assert parameter.grad is not None
                view.grad = parameter.grad[s]
        optimizer.step()

    return update


@contextmanager
def _cpu_settings(configs: Sequence[RunConfig], pixels: int) -> Iterator[None]:
    """Set what a CPU computes small layers fastest with, and undo it at the end of training."""
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
