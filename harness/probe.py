"""What the latents know of the classes: probes fitted on posterior means (scikit-learn)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.data.dataset import Dataset, Split
from harness.evaluate import posteriors
from harness.vae import VAE, SingleVAE

PROBE_IMAGES = 5_000
"""Training images that a probe is fitted on, at most."""

NEIGHBOURS = 5
"""Training images that vote on the class of a test image."""


@torch.no_grad()
def posterior_means(model: SingleVAE, split: Split) -> np.ndarray:
    """Return the posterior means of a split, shape (N, L)."""
    return posteriors(VAE([model]), split).mean[0].numpy()


def linear_probe_accuracy(model: SingleVAE, data: Dataset) -> float:
    """Share of test images whose class a logistic regression reads off their posterior mean.

    Fitted on the first 5,000 training images; means standardised by their training deviation;
    ridge penalty of scikit-learn's default (C = 1). 1 / classes is chance. NaN where a mean is not
    finite, or those images are of one class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return _score(make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)), model, data)


def knn_accuracy(model: SingleVAE, data: Dataset) -> float:
    """Share of test images whose class the nearest posterior means tell.

    The 5 nearest of the first 5,000 training images vote (all, if there are fewer than 5).
    Distances are Euclidean between means as they are, in units of the prior's deviation: a
    collapsed latent adds nothing, where standardised it would add noise. 1 / classes is chance. NaN
    where a mean is not finite, or those images are of one class.
    """
    from sklearn.neighbors import KNeighborsClassifier

    neighbours = min(NEIGHBOURS, len(data.train))
    return _score(KNeighborsClassifier(neighbours), model, data)


def _score(probe: Any, model: SingleVAE, data: Dataset) -> float:  # noqa: ANN401 - scikit-learn's
    from threadpoolctl import threadpool_limits

    splits = (data.train.head(PROBE_IMAGES), data.test)
    (seen, classes), new = ((posterior_means(model, s), _labels(s.labels)) for s in splits)
    if len(np.unique(classes)) < 2 or not np.isfinite(seen).all() or not np.isfinite(new[0]).all():
        return math.nan
    with threadpool_limits(1):  # runs are measured side by side, in forked processes
        return float(probe.fit(seen, classes).score(*new))


def latent_plane(model: SingleVAE, split: Split) -> np.ndarray:
    """Return each image's place on a plane, shape (N, 2).

    Two latents are shown directly; of more, the first two principal components of the means.
    """
    means = posterior_means(model, split).astype(np.float64)
    if means.shape[1] == 1:
        return np.column_stack([means[:, 0], np.zeros(len(means))])
    if means.shape[1] == 2:
        return means
    centred = means - means.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    return centred @ directions[:2].T


def _labels(labels: Tensor) -> np.ndarray:
    return labels.cpu().numpy()
