"""Train one stack of runs and track every one of them: metrics, pictures, model, true status."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import harness
from harness.config import RunConfig
from harness.data.dataset import Dataset
from harness.metrics import pictures
from harness.metrics.evaluate import as_measured
from harness.models.vae import build
from harness.tracking import RunLog, Store
from harness.training.engine import EpochRecord, together
from studies import companions
from studies.measures import (
    Metrics,
    course_value,
    divergence,
    epoch_metrics,
    final_metrics,
    finals,
)
from studies.origin import description, log_origin, made_with
from studies.place import Place
from studies.question import Trained
from studies.runner import stopping

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness.training.checkpoint import Checkpoints
    from studies.plan import Point

logger = logging.getLogger(__name__)

LONGEST_PARAM = 6_000
"""Characters of a parameter that MLflow keeps."""

WRITING = "writing finished runs to MLflow: %d of %d"

PICTURES = 10
"""Images of a reconstruction picture, the same validation images for every run."""


class End(NamedTuple):
    """Why a run is ended before its last epoch: status FAILED or KILLED, and the reason."""

    status: str
    reason: str
    pruned: bool = False


Judge = Callable[[EpochRecord], Mapping[int, End]]
"""Which rows of a record are to be ended, asked after every epoch."""


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
    plan = place.plan
    assert plan is not None
    planned = [
        (config, plan.coordinates(point), plan.tags(point, trial))
        for point, trial in zip(points, trials, strict=True)
        for config in plan.configs[point]
    ]
    results: dict[int, Metrics | None] = {}
    configs = [config for config, *_ in planned]
    for rows in together(configs, len(planned)):
        finals = train_stack([planned[row] for row in rows], place)
        results |= dict(zip(rows, finals, strict=True))
    seeds = plan.seeds
    return [[results[i * seeds + s] for s in range(seeds)] for i in range(len(points))]


Planned = tuple[RunConfig, dict[str, Any], dict[str, str]]
"""A run to be: configuration, coordinates of its point, MLflow tags."""


def train_stack(
    planned: Sequence[Planned], place: Place, judge: Judge = lambda record: {}
) -> list[Metrics | None]:
    """Train one stack, one MLflow run for each of its runs.

    A run that diverges, or that the judge ends, leaves the stack at once.

    Returns:
        The final metrics of each run, None for one that was ended.
    """
    configs = [config for config, *_ in planned]
    results: list[Metrics | None] = [None] * len(planned)
    courses: list[list[float]] = [[] for _ in planned]
    stack = companions.Companions.of(configs)
    with _open_logs(planned, place) as every:
        kept = place.checkpoints
        for record in harness.train(configs, place.data, place.device, checkpoints=kept):
            logs = [every[row] for row in record.rows]
            if record.epoch == 1:
                _log_resumption(record, logs)
                _log_reconstructions(every, _untrained(configs, place.data), place.data, 0)
            for row, origin in enumerate(record.rows):
                metrics = epoch_metrics(record, row)
                every[origin].metrics(metrics, record.epoch)
                courses[origin].append(course_value(metrics, place.study))
            if record.epoch in picture_epochs(configs[0].epochs):
                # Not of a model that has gone on since: those are with its earlier run.
                rows = [row for row, epoch in enumerate(record.resumed) if epoch <= record.epoch]
                runs = [Trained(record.configs[row], record.model(row)) for row in rows]
                _log_reconstructions([logs[row] for row in rows], runs, place.data, record.epoch)
            for row, end in {**_diverged(record), **judge(record)}.items():
                _log_end(logs[row], end)
                record.drop([row])
            stack.note(record)
            place.on_epoch(record)
            stopping.check()
        measured = finals(record, place.data)
        for done, (row, final) in enumerate(measured, 1):
            logger.info(WRITING, done, len(measured), extra={"progress": True})
            origin, run = record.rows[row], Trained(record.configs[row], record.model(row))
            logged = final_metrics(run, final, courses[origin], place.data, place.study)
            stack.log(every[origin], origin, place.device)
            _log_final(every[origin], run, logged)
            results[origin] = final
    return results


def _diverged(record: EpochRecord) -> dict[int, End]:
    found = {row: divergence(record, row) for row in range(len(record.rows))}
    said = f"diverged in epoch {record.epoch}"
    return {row: End("FAILED", f"{said}: {why}") for row, why in found.items() if why}


def _log_resumption(record: EpochRecord, logs: Sequence[RunLog]) -> None:
    for log, epoch in zip(logs, record.resumed, strict=True):
        if epoch:
            log.tag("resumed_from_epoch", str(epoch))


def _log_end(log: RunLog, end: End) -> None:
    log.tag("reason", end.reason)
    if end.pruned:
        log.tag("pruned", "true")
    log.end(end.status)


def picture_epochs(epochs: int) -> set[int]:
    """Return the epochs after which there is a picture: the first, a fifth of the way, the last."""
    return {1, max(1, epochs // 5), epochs}


@contextmanager
def _open_logs(planned: Sequence[Planned], place: Place) -> Iterator[list[RunLog]]:
    """Start the stack's MLflow runs; whatever interrupts training leaves them a true status."""
    logs: list[RunLog] = []
    try:
        made = made_with(place)
        found = harness.provenance.tags(made)
        describe = partial(description, tracking_uri=place.store.uri)
        for config, coordinates, tags in planned:
            params = _params(config, place.data) | coordinates
            params |= {"device": place.device, "stack_width": len(planned)}
            name = f"{tags['configuration']} seed={config.seed}"
            log = RunLog(
                place.store, place.experiment_id, name, {**tags, **found}, params, describe
            )
            logs.append(log)
            log.dataset(place.data)
            log_origin(log, made)
        yield logs
    except BaseException as error:
        _end_all(logs, place, error)
        raise


def _end_all(logs: Sequence[RunLog], place: Place, error: BaseException) -> None:
    """Give every open run its status; what cannot be written now, the next start writes."""
    status, reason = harness.ledger.interruption(error)
    for log in logs:
        with suppress(Exception):
            log.flush()
    with suppress(Exception):
        harness.ledger.end_own_runs(place.store, place.experiment_id, status, reason)


def _params(config: RunConfig, data: Dataset) -> dict[str, object]:
    variance = harness.objective.decoder_variance(config, data.pixels)
    names = json.dumps(data.class_names)
    return {
        **asdict(config),
        "beta": harness.objective.beta(config, data.pixels),
        **({} if math.isnan(variance) else {"decoder_variance": variance}),
        "dataset": data.name,
        "dataset_digest": data.digest,
        **({"class_names": names} if data.class_names and len(names) < LONGEST_PARAM else {}),
    }


def _untrained(configs: Sequence[RunConfig], data: Dataset) -> list[Trained]:
    """Return models at step 0, where MLflow's slider stands when a run is opened."""
    shape, largest = data.image_shape, data.train.largest
    return [Trained(c, build(c, shape, largest)) for c in configs]


def _log_reconstructions(
    logs: Sequence[RunLog], runs: Sequence[Trained], data: Dataset, epoch: int
) -> None:
    measured = as_measured(runs, data) if runs else {}
    for log, (config, model) in zip(logs, runs, strict=True):
        val = measured[config.binarization].val
        picture = pictures.reconstructions([model], val, PICTURES)
        log.picture("reconstructions", picture, epoch)


def _log_final(log: RunLog, run: Trained, final: Metrics) -> None:
    """Log final metrics, samples and model; close the run."""
    config, model = run
    samples = pictures.prior_samples(model, config.seed)
    log.metrics(final, config.epochs)
    log.picture("prior_samples", samples, config.epochs)
    log.model(config, model)
    log.end()


def forget_all(store: Store, study: str) -> None:
    """Remove the checkpoints of a study that is finished, whoever kept them."""
    harness.Checkpoints(_kept(store, study), every=1).clear()


def _kept(store: Store, study: str) -> Path:
    return store.home / "cache" / "checkpoints" / study


def keep(store: Store, study: str, every: int) -> Checkpoints | None:
    """Return where a study's unfinished runs are kept every so many epochs, None for 0."""
    return harness.Checkpoints(_kept(store, study), every) if every else None
