"""Training of a stack of runs: device, precision and the optimiser live here and only here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from harness import objective, streams
from harness.config import RunConfig, UserError
from harness.data import Dataset
from harness.evaluate import evaluate, evaluation_noise, finite, measure, to_arrays
from harness.vae import VAE, SingleVAE, initial

Device = Literal["auto", "cpu", "cuda"]

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


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        config: what was run.
        metrics: final metrics, names prefixed `val/` and `test/`, and plain names for test.
        history: one dict per epoch, names prefixed `train/` and `val/`.
        model: the trained run as a plain module on the CPU.
    """

    config: RunConfig
    metrics: dict[str, float]
    history: list[dict[str, float]] = field(repr=False)
    model: SingleVAE = field(repr=False)


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
    torch.set_flush_denormal(
        True
    )  # Adam's moments decay into denormals, which a CPU computes slowly
    model = VAE([initial(c, data.image_shape) for c in configs]).to(target, dtype)
    update = _adam(model)
    probe = data.train.head(len(data.val))
    noise = {part: evaluation_noise(model, part, data) for part in ("train", "val")}
    noise["train"] = noise["train"][:, : len(probe)]
    for epoch in range(1, configs[0].epochs + 1):
        start = time.perf_counter()
        images, warmup = _epoch(model, update, data, epoch)
        _synchronize(target)
        seconds = time.perf_counter() - start
        val = measure(model, data.val, noise["val"], data.classes)
        fitted = measure(model, probe, noise["train"], data.classes, variance=val["mse"])
        both = to_arrays({f"train/{k}": v for k, v in fitted.items()} | val)
        yield EpochRecord(
            epoch=epoch,
            seconds=seconds,
            images=images,
            train={k.removeprefix("train/"): v for k, v in both.items() if k.startswith("train/")},
            val={k: v for k, v in both.items() if not k.startswith("train/")},
            kl_warmup=warmup.numpy(),
            model=model,
        )


def train_and_evaluate(
    configs: Sequence[RunConfig],
    data: Dataset,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> list[RunResult]:
    """Train any list of runs, in as few stacks as their settings allow; results in their order."""
    results: dict[int, RunResult] = {}
    for rows in stacks(configs, STACK_WIDTH[resolve_device(device).type]):
        histories: list[list[dict[str, float]]] = [[] for _ in rows]
        for record in train([configs[i] for i in rows], data, device, dtype):
            for s, history in enumerate(histories):
                history.append(flat_record(record, s))
        for s, metrics in enumerate(evaluate(record.model, data)):
            run = record.model.run(s)
            results[rows[s]] = RunResult(run.config, metrics, histories[s], run)
    return [results[i] for i in range(len(configs))]


def stacks(configs: Sequence[RunConfig], width: int) -> list[list[int]]:
    """Group runs that can share a stack: lists of positions, at most `width` long."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, config in enumerate(configs):
        groups.setdefault(config.static(), []).append(i)
    return [g[i : i + width] for g in groups.values() for i in range(0, len(g), width)]


def flat_record(record: EpochRecord, run: int) -> dict[str, float]:
    """Return one run's metrics of an epoch, names prefixed `train/` and `val/`."""
    named = {f"train/{k}": v for k, v in record.train.items()}
    named |= {f"val/{k}": v for k, v in record.val.items()}
    return finite({k: float(v[run]) for k, v in named.items()})


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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
