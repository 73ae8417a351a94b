"""How good a trained run's latents and images are: all that is measured once, at the end."""

from __future__ import annotations

from pathlib import Path

from harness import doing, frechet, latents, likelihood, probe
from harness.cores import crew
from harness.data.dataset import Dataset
from harness.evaluate import apart, finite, of_run, prepared
from harness.vae import VAE, SingleVAE

WHAT = "measuring finished runs (log-likelihood, Fréchet distances, probes)"


def measure_quality(
    model: VAE | SingleVAE, data: Dataset, folder: Path | None = None
) -> list[dict[str, float]]:
    """Return the quality of each run's latents and images on the test split.

    Args:
        model: a stack, or one run.
        data: its dataset.
        folder: cache of the classifier behind `frechet`; None means the repository's.

    Returns:
        One dict per run: metrics of `likelihood.likelihood_metrics`, `latents.measure_latents` and
        `frechet.measure_images`, `probe_accuracy` and `knn_accuracy`. Metrics that the run does not
        have are absent; so are all that need classes, if the dataset has not two of them.
    """
    stack, data = prepared(model, data)
    known = frechet.reference(data, folder) if data.has_classes else None
    parts = apart(stack)
    with crew(lambda i: _measured(parts[i][0], data, known), len(parts), stack.device) as cores:
        doing.say(WHAT)
        return [metrics for own in cores.map(range(len(parts)), WHAT) for metrics in own]


def _measured(stack: VAE, data: Dataset, known: frechet.Reference | None) -> list[dict[str, float]]:
    runs = range(len(stack.configs))
    informed = latents.measure_latents(stack, data.test)
    likely = likelihood.likelihood_metrics(stack, data)
    found = [of_run(informed, run) | likely[run] for run in runs]
    if known is not None:
        images = frechet.measure_images(stack, data, known)
        found = [found[run] | images[run] | _probed(stack.run(run), data) for run in runs]
    return [finite(metrics) for metrics in found]


def _probed(run: SingleVAE, data: Dataset) -> dict[str, float]:
    return {
        "probe_accuracy": probe.linear_probe_accuracy(run, data),
        "knn_accuracy": probe.knn_accuracy(run, data),
    }
