"""Quality of finished runs' latents and images: all metrics that are computed once, at the end."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.data.dataset import Dataset
from harness.metrics import frechet, information, likelihood, probes
from harness.metrics.evaluate import Run, as_measured, finite, frozen, on_all_cores, to_floats
from harness.models.stack import kernels

log = logging.getLogger(__name__)


@kernels()
def measure_quality(
    runs: Sequence[Run], data: Dataset, folder: Path | None = None
) -> list[dict[str, float]]:
    """Return information, log-likelihood, Fréchet distances and accuracy of probes of each run.

    They are of the test split (docs/metrics.md). Those that are not defined for the run or not
    finite are left out, as are the last two if the dataset has fewer than two classes, and the
    distances if it holds no images. `folder` is where the classifier of the distances is kept;
    without one it is trained.
    """
    if not runs:
        return []
    known = {  # the dataset by drawing, and the reference of its Fréchet distances
        kind: (
            drawn,
            frechet.reference(drawn, folder) if data.is_image and data.has_classes else None,
        )
        for kind, drawn in as_measured(runs, data).items()
    }
    distances = "Fréchet distances, " if data.is_image else ""
    log.info("measuring finished runs (log-likelihood, %sprobes)", distances)
    return on_all_cores(_measured, (known,), runs, runs[0][1].device)


def _measured(known: dict[str, Any], run: Run) -> dict[str, float]:
    config, model = run[0], frozen(run[1])
    data, reference = known[config.drawing]
    found = to_floats(information.measure_information(config, model, data.test))
    found |= likelihood.likelihood_metrics(config, model, data)
    if reference is not None:
        found |= frechet.measure_images(config, model, data, reference)
    if data.has_classes:
        found |= probes.probe_metrics(model, data)
    return finite(found)
