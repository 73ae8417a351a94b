"""Train one stack of runs and track every one of them: metrics, pictures, model, true status."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import harness
from harness.config import RunConfig
from harness.data import Dataset
from harness.engine import EpochRecord
from harness.sweep import flat_record
from harness.tracking import RunLog, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.vae import VAE

PICTURES = 10
"""Images of a reconstruction picture, the same validation images for every run."""


@dataclass(frozen=True)
class Place:
    """Where a stack of runs is trained and recorded."""

    data: Dataset
    device: str
    store: Store
    experiment_id: str
    on_epoch: Callable[[EpochRecord], None] = field(repr=False)


def train_tracked(
    configs: Sequence[RunConfig], tags: Sequence[dict[str, str]], place: Place
) -> list[dict[str, float] | None]:
    """Train a stack, one MLflow run for each of its runs.

    Args:
        configs: the runs.
        tags: MLflow tags of each run; `configuration` also names it.
        place: data, device and tracking.

    Returns:
        Final metrics of each run, None for one that diverged.
    """
    with _open_logs(configs, tags, place) as logs:
        diverged: dict[int, str] = {}
        for record in harness.train(configs, place.data, place.device):
            _log_epoch(record, logs, diverged)
            if record.epoch in picture_epochs(configs[0].epochs):
                _log_reconstructions(record, logs, place.data)
            place.on_epoch(record)
        finals = harness.evaluate(record.model, place.data)
        for row, log in enumerate(logs):
            if row in diverged:
                log.tag("reason", diverged[row])
                log.end("FAILED")
            else:
                _log_final(log, record.model, row, finals[row])
    return [None if row in diverged else metrics for row, metrics in enumerate(finals)]


def picture_epochs(epochs: int) -> set[int]:
    """Return the epochs with a picture: the first, a fifth of the way, and the last."""
    return {1, max(1, epochs // 5), epochs}


@contextmanager
def _open_logs(
    configs: Sequence[RunConfig], tags: Sequence[dict[str, str]], place: Place
) -> Iterator[list[RunLog]]:
    """Start the stack's MLflow runs; whatever interrupts training leaves them a true status."""
    logs: list[RunLog] = []
    try:
        for config, own in zip(configs, tags, strict=True):
            name = f"{own['configuration']} seed={config.seed}"
            log = RunLog(
                place.store, place.experiment_id, name, own, _params(config, place, configs)
            )
            log.dataset(place.data)
            logs.append(log)
        yield logs
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        for log in logs:
            log.flush()
        status = "KILLED" if interrupted else "FAILED"
        harness.ledger.end_own_runs(place.store, place.experiment_id, status, repr(error))
        raise


def _params(config: RunConfig, place: Place, stack: Sequence[RunConfig]) -> dict[str, object]:
    pixels = place.data.pixels
    return {
        **asdict(config),
        "beta": harness.objective.beta(config, pixels),
        "decoder_variance": harness.objective.decoder_variance(config, pixels),
        "dataset": place.data.name,
        "dataset_digest": place.data.digest,
        "device": harness.engine.resolve_device(place.device).type,
        "stack_width": len(stack),
    }


def _log_epoch(record: EpochRecord, logs: list[RunLog], diverged: dict[int, str]) -> None:
    for row, log in enumerate(logs):
        mse = float(record.train["mse"][row])
        if not math.isfinite(mse) and row not in diverged:
            diverged[row] = f"diverged in epoch {record.epoch}: training mse is {mse}"
        progress = {
            "progress/epoch_seconds": record.seconds,
            "progress/images_per_second": record.images_per_second,
            "progress/kl_warmup": float(record.kl_warmup[row]),
        }
        log.metrics(flat_record(record, row) | progress, record.epoch)


def _log_reconstructions(record: EpochRecord, logs: list[RunLog], data: Dataset) -> None:
    val = data.to(record.model.device).val
    pictures = harness.pictures.reconstructions(record.model, val, PICTURES)
    for log, picture in zip(logs, pictures, strict=True):
        log.picture("reconstructions", picture, record.epoch)


def _log_final(log: RunLog, model: VAE, row: int, metrics: dict[str, float]) -> None:
    run = model.run(row)
    epochs = run.config.epochs
    log.metrics({k: v for k, v in metrics.items() if k.startswith("test/")}, epochs)
    log.picture("prior_samples", harness.pictures.prior_samples(run), epochs)
    log.model(run)
    log.end()
