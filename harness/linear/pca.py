"""Principal components of a dataset's training images, computed once."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from harness.data.dataset import Dataset, Split, in_chunks

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
        sums, rest, others = np.zeros((2, self.components.shape[1])), 0.0, 0
        for some in _in_chunks(split):
            x = some - self.mean
            c = x @ self.components
            sums += [c.sum(0), np.square(c).sum(0)]
            if others := len(self.mean) - len(sums[0]):
                rest += np.square(x - c @ self.components.T).sum(1).sum()
        means, squares = sums / len(split)
        if others:
            means = np.append(means, np.zeros(others))
            squares = np.append(squares, np.full(others, rest / len(split) / others))
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
    sums = np.zeros(size)
    for some in in_chunks(split.images):
        sums += some.cpu().numpy().sum(0, dtype=np.float64)
    mean = sums / images / split.largest
    if 2 * images <= size:  # twice as fast at this limit, a third as fast at N = D
        _, scales, rows = np.linalg.svd(pixels(split) - mean, full_matrices=False)
        variances = _cleared(np.append(np.square(scales) / images, np.zeros(size - images)))
        return PCA(mean, rows[: np.count_nonzero(variances)].T, variances)
    variances, components = np.linalg.eigh(_covariance(split, mean))
    return PCA(mean, components[:, ::-1], _cleared(variances)[::-1])


def _cleared(variances: np.ndarray) -> np.ndarray:
    rounding = variances.max() * len(variances) * np.finfo(np.float64).eps
    return np.where(variances > rounding, variances, 0.0)


def _covariance(split: Split, mean: np.ndarray) -> np.ndarray:
    # Sums of whole numbers are exact: in float32, twice as fast, over so few images that they are
    # below 2^24; N sum(x x^T) - sum(x) sum(x)^T in float64, below 2^53 for up to 372,000 images.
    images, size = split.images.shape
    products, sums = np.zeros((size, size)), np.zeros(size)
    if split.images.is_floating_point():
        for x in _in_chunks(split):
            products += (x - mean).T @ (x - mean)
        return products / images
    product = np.empty_like(products, dtype=np.float32)
    for some in in_chunks(split.images):
        grey = some.cpu().numpy()
        sums += grey.sum(0, dtype=np.float64)
        together = 2**24 // int(grey.max(initial=1)) ** 2
        for start in range(0, len(grey), together):
            x = grey[start : start + together].astype(np.float32)
            products += np.matmul(x.T, x, out=product)
    return (images * products - np.outer(sums, sums)) / (images * split.largest) ** 2


def _in_chunks(split: Split) -> Iterator[np.ndarray]:
    # Pixels in [0, 1], float64; of one chunk the sums are those of the whole to the last bit.
    for some in in_chunks(split.images):
        yield some.cpu().numpy().astype(np.float64) / split.largest


def pixels(split: Split) -> np.ndarray:
    """Return a split's pixels in [0, 1] as float64, shape (N, D)."""
    return np.concatenate(list(_in_chunks(split)))
