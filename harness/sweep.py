"""Many runs, whatever their settings: grouped into stacks, trained, evaluated, in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from harness.config import RunConfig
from harness.data.dataset import Dataset
from harness.engine import STACK_WIDTH, EpochRecord, resolve_device, train
from harness.evaluate import evaluate, of_run
from harness.vae import SingleVAE


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

    @property
    def best_epoch(self) -> int:
        """Epoch with the lowest `val/neg_elbo`, or `val/loss` for a run without ELBO; from 1."""
        return best_epoch(
            [e.get("val/neg_elbo", e.get("val/loss", math.inf)) for e in self.history]
        )


def best_epoch(course: Sequence[float]) -> int:
    """Return the first epoch, counted from 1, at which a metric was lowest.

    Args:
        course: the metric, epoch by epoch.
    """
    return 1 + min(range(len(course)), key=course.__getitem__)


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
    return of_run(named, run)
