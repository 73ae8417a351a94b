"""What linear algebra says about a dataset: floors for every linear model (numpy)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.data import Dataset, Split


@dataclass(frozen=True)
class PCA:
    """Principal components of the training pixels in [0, 1].

    Attributes:
        mean: shape (D,).
        components: orthonormal columns by falling variance, shape (D, D).
        variances: eigenvalues of the covariance (1/N), falling, pixel^2, shape (D,).
    """

    mean: np.ndarray
    components: np.ndarray
    variances: np.ndarray

    def floor(self, split: Split, latent_size: int) -> float:
        """Return the mse of projecting a split onto the first components: the PCA floor.

        mse = sum of the squared coordinates along the discarded components / (N D), pixel^2 per
        pixel; over the training split it is sum_{i > L} lambda_i / D. (Tipping & Bishop 1999.)
        """
        outside = (pixels(split) - self.mean) @ self.components[:, latent_size:]
        return float(np.square(outside).sum() / split.images.numel())


_KNOWN: dict[str, PCA] = {}
"""Digest of a dataset -> its components, which take a second on MNIST and never change."""


def pca(data: Dataset) -> PCA:
    """Return the principal components of a dataset's training split."""
    if data.digest not in _KNOWN:
        _KNOWN[data.digest] = _decompose(data)
    return _KNOWN[data.digest]


def _decompose(data: Dataset) -> PCA:
    x = pixels(data.train)
    mean = x.mean(0)
    second = x.T @ x / len(x)
    variances, components = np.linalg.eigh(second - np.outer(mean, mean))
    return PCA(mean, components[:, ::-1], variances[::-1].clip(min=0))


def pixels(split: Split) -> np.ndarray:
    """Return a split's pixels in [0, 1] as float64, shape (N, D)."""
    return split.images.cpu().numpy() / split.largest
