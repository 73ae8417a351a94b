"""Principal components of a dataset's training images, computed once."""

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from harness.data.dataset import Dataset, Split

MOST_PIXELS = 4_096  # of an image that has a linear model, which takes 18 s; 8 min for 12,288


class Moments(NamedTuple):
    """Moments of a split's coordinates c_i along the principal components.

    Directions for which `PCA` has no component share the sum of their mean squares equally.
    """

    means: np.ndarray  # E[c_i], shape (D,)
    squares: np.ndarray  # E[c_i^2], pixel^2, shape (D,)


@dataclass(frozen=True)
class PCA:
    """Principal components of the training pixels in [0, 1]."""

    mean: np.ndarray  # shape (D,)
    components: np.ndarray  # orthonormal columns by falling variance, (D, D) or (D, rank)
    variances: np.ndarray  # eigenvalues (1/N), pixel^2, shape (D,); 0 where rounding alone is left
    _moments: dict[str, Moments] = field(default_factory=dict, repr=False)

    def moments(self, split: Split | None = None) -> Moments:
        """Return the moments of a split's coordinates, computed once; None: the training split."""
        if split is None:
            return Moments(np.zeros_like(self.variances), self.variances)
        with _busy:
            if split.digest not in self._moments:
                self._moments[split.digest] = self._measured(split)
            return self._moments[split.digest]

    def _measured(self, split: Split) -> Moments:
        c = (pixels(split) - self.mean) @ self.components
        means, squares = c.mean(0), np.square(c).mean(0)
        if others := len(self.mean) - len(squares):
            rest = pixels(split) - self.mean - c @ self.components.T
            share = np.square(rest).sum(1).mean() / others
            means = np.append(means, np.zeros(others))
            squares = np.append(squares, np.full(others, share))
        return Moments(means, squares)

    def floor(self, split: Split, latent_size: int) -> float:
        """Return the mse of projecting a split onto L components: sum_{i > L} E[c_i^2] / D."""
        return float(self.moments(split).squares[latent_size:].sum() / len(self.mean))

    def likeliest_variance(self, latent_size: int) -> float:
        """Return the decoder variance of pPCA (Tipping & Bishop 1999, equation 8), pixel^2."""
        return float(self.variances[latent_size:].mean())


_known: dict[str, PCA] = {}  # by the digest of the training images: it takes seconds on MNIST
_busy = threading.Lock()


def is_small(data: Dataset) -> bool:
    """Return whether the images are small enough for a linear model."""
    return data.pixels <= MOST_PIXELS


def pca(data: Dataset) -> PCA:
    """Return the principal components of a dataset's training split; computed once."""
    key = data.train.digest
    with _busy:
        if key not in _known:
            _known[key] = _decompose(data.train)
        return _known[key]


def begin_pca(data: Dataset) -> None:
    """Compute components and moments in a thread; `pca` and `moments` wait for it."""

    def compute() -> None:
        for split in (data.train.head(len(data.val)), data.val):
            pca(data).moments(split)

    if is_small(data):
        threading.Thread(target=compute, daemon=True).start()


def _decompose(split: Split) -> PCA:
    images, size = split.images.shape
    mean = split.images.cpu().numpy().mean(0, dtype=np.float64) / split.largest
    if 2 * images <= size:  # twice as fast at this limit, a third as fast at N = D
        _, scales, rows = np.linalg.svd(pixels(split) - mean, full_matrices=False)
        variances = _cleared(np.append(np.square(scales) / images, np.zeros(size - images)))
        return PCA(mean, rows[: np.count_nonzero(variances)].T, variances)
    variances, components = np.linalg.eigh(_covariance(split))
    return PCA(mean, components[:, ::-1], _cleared(variances)[::-1])


def _cleared(variances: np.ndarray) -> np.ndarray:
    rounding = variances.max() * len(variances) * np.finfo(np.float64).eps
    return np.where(variances > rounding, variances, 0.0)


def _covariance(split: Split) -> np.ndarray:
    # Sums of whole numbers are exact: in float32, twice as fast, over so few images that they are
    # below 2^24; N sum(x x^T) - sum(x) sum(x)^T in float64, below 2^53 for up to 372,000 images.
    if split.images.is_floating_point():
        return np.atleast_2d(np.cov(pixels(split), rowvar=False, bias=True))
    images = split.images.cpu().numpy()
    together = 2**24 // int(images.max(initial=1)) ** 2
    products = np.zeros((images.shape[1], images.shape[1]))
    some = np.empty_like(products, dtype=np.float32)
    for start in range(0, len(images), together):
        x = images[start : start + together].astype(np.float32)
        products += np.matmul(x.T, x, out=some)
    sums = images.sum(0, dtype=np.float64)
    return (len(images) * products - np.outer(sums, sums)) / (len(images) * split.largest) ** 2


def pixels(split: Split) -> np.ndarray:
    """Return a split's pixels in [0, 1] as float64, shape (N, D)."""
    return split.images.cpu().numpy().astype(np.float64) / split.largest
