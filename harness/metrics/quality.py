"""Quality of finished runs' latents and images: all metrics that are computed once, at the end."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.config import RunConfig
from harness.data.dataset import Dataset
from harness.metrics import evaluate, frechet, information, likelihood, probes
from harness.metrics.evaluate import Run, as_measured, finite, to_floats
from harness.models.stack import kernels
from harness.models.vae import VAE

log = logging.getLogger(__name__)


def measure_quality(
    runs: Sequence[Run], data: Dataset, folder: Path | None = None
) -> list[dict[str, float]]:
    """Return information, log-likelihood, Fréchet distances and accuracy of probes of each run.

    They are of the test split (docs/metrics.md). Those that are not defined for the run or not
    finite are left out, as are the last two if the dataset has fewer than two classes, and the
    distances if it holds no images. `folder` is where the classifier of the distances is kept;
    without one it is trained.
    """
    return list(in_turn(runs, data, folder))


def in_turn(
    runs: Sequence[Run], data: Dataset, folder: Path | None = None
) -> Iterator[dict[str, float]]:
    """Yield what `measure_quality` returns, while later runs are measured."""
    if not runs:
        return
    has_classifier = data.is_image and data.has_classes
    with kernels():
        known = {  # the dataset by drawing, and the reference of its Fréchet distances
            kind: (drawn, frechet.reference(drawn, folder) if has_classifier else None)
            for kind, drawn in as_measured(runs, data).items()
        }
        distances = "Fréchet distances, " if data.is_image else ""
        log.info("measuring finished runs (log-likelihood, %sprobes)", distances)
        yield from evaluate.in_turn(_measured, runs, known)


def _measured(
    config: RunConfig, model: VAE, known: tuple[Dataset, frechet.Reference | None]
) -> dict[str, float]:
    data, reference = known
    found = to_floats(information.measure_information(config, model, data.test))
    found |= likelihood.likelihood_metrics(config, model, data)
    if reference is not None:
        found |= frechet.measure_images(config, model, data, reference)
    if data.has_classes:
        found |= probes.probe_metrics(model, data)
    return finite(found)
