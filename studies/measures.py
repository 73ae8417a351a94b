"""What is logged of a run, epoch by epoch and at its end; a replay computes the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import harness
from harness.data.dataset import Dataset
from harness.linear.vae import linear_metrics
from harness.places import project_root
from harness.training.engine import best_epoch, flat_record

if TYPE_CHECKING:
    from harness.training.engine import EpochRecord
    from studies.question import Study, Trained

Metrics = dict[str, float]

WALL_CLOCK = ("progress/epoch_seconds", "progress/images_per_second")
"""Metrics that measure the machine, so that no two trainings share them."""


LARGEST_ERROR = 1.0
"""Squared error, pixel^2, above which a run has diverged."""

LARGEST_RATE = 1e4
"""Rate, nats a latent, above which a run has diverged whose loss counts it."""


def objective(study: Study | None) -> str:
    """Return the metric that the best epoch of a run is chosen by, on validation data."""
    return "val/neg_elbo" if study is None else study.objective


def course_value(metrics: Metrics, study: Study | None) -> float:
    """Return the objective of an epoch; infinite for a run that has none."""
    return metrics.get(objective(study), math.inf)


def epoch_metrics(record: EpochRecord, row: int) -> Metrics:
    """Return all that is logged of one run's epoch."""
    progress = (record.seconds, record.images_per_second, float(record.kl_warmup[row]))
    names = (*WALL_CLOCK, "progress/kl_warmup")
    return flat_record(record, row) | dict(zip(names, progress, strict=True))


def divergence(record: EpochRecord, row: int) -> str | None:
    """Say why a run has diverged in an epoch, None if it has not.

    It has where its loss is no number or infinite, where its squared error is above 1, for pixels
    lie in [0, 1] and no constant image errs more, or where its rate is above 10,000 nats a latent
    although the loss counts it: posterior means lie 141 standard deviations of the prior from 0.
    """
    config = record.configs[row]
    limits = {"loss": math.inf, "mse": LARGEST_ERROR}
    if config.kl_weight > 0:
        limits["rate"] = LARGEST_RATE * config.latent_size
    for part, metrics in (("training", record.train), ("validation", record.val)):
        for name, limit in limits.items():
            value = float(metrics[name][row]) if name in metrics else 0.0
            if not abs(value) < math.inf:
                return f"{part} {name} is {value}"
            if value > limit:
                return f"{part} {name} is {value:.3g}, above {limit:,.0f}"
    return None


def finals(record: EpochRecord, data: Dataset) -> list[tuple[int, Metrics]]:
    """Measure the rows that are left after the last epoch.

    Returns:
        Row and metrics: `evaluate`, and on test data the quality of latents and images.
    """
    rows = [row for row in range(len(record.rows)) if row not in record.dropped]
    runs = [(record.configs[row], record.model(row)) for row in rows]
    cache = project_root() / "cache" / "features"
    both = harness.evaluate(runs, data), harness.measure_quality(runs, data, cache)
    measured = zip(*both, strict=True)
    named = (ends | {f"test/{k}": v for k, v in quality.items()} for ends, quality in measured)
    return list(zip(rows, named, strict=True))


def final_metrics(
    run: Trained, metrics: Metrics, course: Sequence[float], data: Dataset, study: Study | None
) -> Metrics:
    """Return all that is logged once of a finished run.

    Args:
        run: the trained run.
        metrics: of `finals`; those of the test split are logged.
        course: the study's objective, epoch by epoch.
        data: its dataset.
        study: what it is a point of, None for a search.

    Returns:
        The test metrics, the best epoch and the objective there (`best/epoch`, `best/val/...`),
        the exact linear model's metrics, and the study's extras.
    """
    final = {name: value for name, value in metrics.items() if name.startswith("test/")}
    epoch = best_epoch(course)
    if math.isfinite(best := course[epoch - 1]):
        final |= {"best/epoch": float(epoch), f"best/{objective(study)}": best}
    final |= linear_metrics(run.config, data)
    if study is not None and study.extras is not None:
        final |= study.extras(run, data)
    return final
