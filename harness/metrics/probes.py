"""Classifiers fitted on posterior means (scikit-learn), and the plane of the latents."""

import math

import numpy as np

from harness.data.dataset import Dataset, Split
from harness.metrics.evaluate import posteriors
from harness.models.vae import VAE

PROBE_IMAGES = 5_000  # of the training split, on which a probe is fitted, at most


def probe_metrics(model: VAE, data: Dataset) -> dict[str, float]:
    """Return the share of test images whose class probes find from the posterior mean.

    They are fitted on the first 5,000 training images; NaN where a mean is not finite, or those are
    of one class. Means are standardised for the logistic regression (ridge penalty C = 1) and not
    for the neighbours: it would turn a collapsed latent into noise.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    train, test = data.train.head(PROBE_IMAGES), data.test
    seen, new = (posteriors(model, split).mean.cpu().numpy() for split in (train, test))
    labels, expected = (split.labels.cpu().numpy() for split in (train, test))
    probes = {
        "probe_accuracy": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "knn_accuracy": KNeighborsClassifier(min(5, len(train))),
    }
    if len(np.unique(labels)) < 2 or not np.isfinite(seen).all() or not np.isfinite(new).all():
        return dict.fromkeys(probes, math.nan)
    with threadpool_limits(1):  # other runs are measured at the same time
        return {n: float(p.fit(seen, labels).score(new, expected)) for n, p in probes.items()}


def latent_plane(model: VAE, split: Split) -> np.ndarray:
    """Return each image's place (N, 2): its one or two means, or of more their first two PCs."""
    means = posteriors(model, split).mean.cpu().numpy().astype(np.float64)
    if means.shape[1] <= 2:
        return np.pad(means, ((0, 0), (0, 2 - means.shape[1])))
    centred = means - means.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    return centred @ directions[:2].T
