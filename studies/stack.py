"""Train one stack of runs and track every one of them: metrics, pictures, model, true status."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import harness
from harness.config import RunConfig
from harness.data import Dataset
from harness.engine import EpochRecord
from harness.sweep import flat_record
from harness.tracking import RunLog, Store
from studies import stopping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.vae import SingleVAE
    from studies.options import Plan, Point

PICTURES = 10
"""Images of a reconstruction picture, the same validation images for every run."""


@dataclass(frozen=True)
class Place:
    """Where stacks of a plan are trained and recorded."""

    plan: Plan
    data: Dataset
    device: str
    store: Store
    experiment_id: str
    on_epoch: Callable[[EpochRecord], None] = field(repr=False)


Metrics = dict[str, float]


def train_tracked(
    points: Sequence[Point], trials: Sequence[int], place: Place
) -> list[list[Metrics | None]]:
    """Train all seeds of some points, one MLflow run for each.

    Points that cannot share a stack (another head, say) are trained in stacks of their own.

    Args:
        points: points of the plan.
        trials: their trial numbers in Optuna.
        place: plan, data, device and tracking.

    Returns:
        For each point the final metrics of each seed, None for one that diverged.
    """
    planned = [
        (config, place.plan.coordinates(point), place.plan.tags(point, trial))
        for point, trial in zip(points, trials, strict=True)
        for config in place.plan.configs[point]
    ]
    results: dict[int, Metrics | None] = {}
    for rows in harness.sweep.stacks([config for config, *_ in planned], len(planned)):
        finals = _train_stack([planned[row] for row in rows], place)
        results |= dict(zip(rows, finals, strict=True))
    seeds = place.plan.seeds
    return [[results[i * seeds + s] for s in range(seeds)] for i in range(len(points))]


Planned = tuple[RunConfig, dict[str, Any], dict[str, str]]
"""A run to be: configuration, coordinates of its point, MLflow tags."""


def _train_stack(planned: Sequence[Planned], place: Place) -> list[Metrics | None]:
    configs = [config for config, *_ in planned]
    with _open_logs(planned, place) as logs:
        diverged: dict[int, str] = {}
        for record in harness.train(configs, place.data, place.device):
            _log_epoch(record, logs, diverged)
            if record.epoch in picture_epochs(configs[0].epochs):
                _log_reconstructions(record, logs, place.data)
            place.on_epoch(record)
            stopping.check()
        finals = harness.evaluate(record.model, place.data)
        for row, log in enumerate(logs):
            if row in diverged:
                log.tag("reason", diverged[row])
                log.end("FAILED")
            else:
                _log_final(log, record.model.run(row), finals[row], place)
    return [None if row in diverged else metrics for row, metrics in enumerate(finals)]


def picture_epochs(epochs: int) -> set[int]:
    """Return the epochs with a picture: the first, a fifth of the way, and the last."""
    return {1, max(1, epochs // 5), epochs}


@contextmanager
def _open_logs(planned: Sequence[Planned], place: Place) -> Iterator[list[RunLog]]:
    """Start the stack's MLflow runs; whatever interrupts training leaves them a true status."""
    logs: list[RunLog] = []
    try:
        for config, coordinates, tags in planned:
            params = _params(config, place.data) | coordinates
            params |= {"device": place.device, "stack_width": len(planned)}
            name = f"{tags['configuration']} seed={config.seed}"
            logs.append(RunLog(place.store, place.experiment_id, name, tags, params))
            logs[-1].dataset(place.data)
        yield logs
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        for log in logs:
            log.flush()
        status = "KILLED" if interrupted else "FAILED"
        harness.ledger.end_own_runs(place.store, place.experiment_id, status, repr(error))
        raise


def _params(config: RunConfig, data: Dataset) -> dict[str, object]:
    return {
        **asdict(config),
        "beta": harness.objective.beta(config, data.pixels),
        "decoder_variance": harness.objective.decoder_variance(config, data.pixels),
        "dataset": data.name,
        "dataset_digest": data.digest,
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


def _log_final(log: RunLog, run: SingleVAE, metrics: Metrics, place: Place) -> None:
    """Log test metrics, the study's extras, samples and the model, and close the run."""
    final = {name: value for name, value in metrics.items() if name.startswith("test/")}
    if place.plan.study.extras is not None:
        final |= place.plan.study.extras(run, place.data)
    log.metrics(final, run.config.epochs)
    log.picture("prior_samples", harness.pictures.prior_samples(run), run.config.epochs)
    log.model(run)
    log.end()
