"""What linear algebra says about a dataset: the exact linear VAE and its floors (numpy).

With a linear encoder and decoder and a Gaussian decoder of variance s2 the VAE's optimum is
probabilistic PCA, whose every metric is a function of the eigenvalues lambda_1 >= lambda_2 >= ...
of the training covariance (Tipping & Bishop 1999; Lucas et al. 2019, 1911.02469). Along an active
component i (lambda_i > s2) with coordinate c_i = u_i . (x - mean) it has

    posterior mean       sqrt(lambda_i - s2) / lambda_i * c_i
    posterior variance   s2 / lambda_i
    decoder column       sqrt(lambda_i - s2) * u_i, and the training mean as bias

and a latent with lambda_i <= s2 collapses onto the prior. On other images than those of training
only the second moments E[c_i^2] take the place of the lambda_i that stem from the data.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

import numpy as np

from harness import objective
from harness.data.dataset import Dataset, Split


@dataclass(frozen=True)
class Moments:
    """A split along the principal components of training: moments of each coordinate c_i.

    Attributes:
        means: E[c_i], 0 over the training split, shape (D,).
        squares: E[c_i^2], lambda_i over the training split, pixel^2, shape (D,).
    """

    means: np.ndarray
    squares: np.ndarray

    @property
    def variances(self) -> np.ndarray:
        """Var[c_i] = E[c_i^2] - E[c_i]^2, pixel^2, shape (D,)."""
        return self.squares - np.square(self.means)


@dataclass(frozen=True)
class PCA:
    """Principal components of the training pixels in [0, 1].

    Attributes:
        mean: shape (D,).
        components: orthonormal columns by falling variance, shape (D, D).
        variances: eigenvalues of the covariance (1/N), falling, pixel^2, shape (D,); exactly 0
            where only rounding is left.
    """

    mean: np.ndarray
    components: np.ndarray
    variances: np.ndarray
    _moments: dict[str, Moments] = field(default_factory=dict, repr=False)

    def coordinates(self, split: Split) -> np.ndarray:
        """Return c = components^T (x - mean) of each image, shape (N, D)."""
        return (pixels(split) - self.mean) @ self.components

    def moments(self, split: Split) -> Moments:
        """Return the moments of a split's coordinates; computed once for the same images."""
        if split.digest not in self._moments:
            c = self.coordinates(split)
            self._moments[split.digest] = Moments(c.mean(0), np.square(c).mean(0))
        return self._moments[split.digest]

    def floor(self, split: Split, latent_size: int) -> float:
        """Return the mse of projecting a split onto the first components: the PCA floor.

        mse = sum_{i > L} E[c_i^2] / D, pixel^2 per pixel; over the training split it is
        sum_{i > L} lambda_i / D. (Tipping & Bishop 1999.)
        """
        return float(self.moments(split).squares[latent_size:].sum() / len(self.mean))

    def optimum(self, split: Split, latent_size: int, decoder_variance: float) -> LinearOptimum:
        """Return what the exact linear VAE of the training split gives on a split."""
        return LinearOptimum(self.variances, self.moments(split), latent_size, decoder_variance)

    def trained_optimum(self, latent_size: int, decoder_variance: float) -> LinearOptimum:
        """Return what the exact linear VAE gives on the training split itself.

        There E[c_i] = 0 and E[c_i^2] = lambda_i, so no image is read.
        """
        moments = Moments(np.zeros_like(self.variances), self.variances)
        return LinearOptimum(self.variances, moments, latent_size, decoder_variance)

    def likeliest_variance(self, latent_size: int) -> float:
        """Return the maximum-likelihood decoder variance of pPCA, pixel^2.

        s2 = sum_{i > L} lambda_i / (D - L)   (Tipping & Bishop 1999, equation 8)
        """
        return float(self.variances[latent_size:].mean())


@dataclass(frozen=True)
class LinearOptimum:
    """The exact optimum of a linear VAE on the training split, measured on any split.

    Metrics have the names and units of every run's. Over the training split E[c_i^2] = lambda_i,
    and they are the textbook's (docs/science.md): kl of latent i is ln(lambda_i / s2) / 2 and
    E[SSE] is a s2 + sum_{i > a} lambda_i for a active latents.

    Attributes:
        variances: eigenvalues lambda of the training covariance, falling, pixel^2, shape (D,).
        moments: of the split that it is measured on.
        latent_size: L; those beyond D collapse.
        decoder_variance: s2 = beta / 2, pixel^2; 0 is the limit without KL, plain PCA, whose rate
            is infinite.
    """

    variances: np.ndarray
    moments: Moments
    latent_size: int
    decoder_variance: float

    @property
    def pixels(self) -> int:
        """D."""
        return len(self.variances)

    @property
    def active(self) -> np.ndarray:
        """Which components are in use: the first L with lambda_i > s2, bool, shape (D,)."""
        first = np.arange(self.pixels) < self.latent_size
        return first & (self.variances > self.decoder_variance)

    @property
    def posterior_variances(self) -> np.ndarray:
        """s2 / lambda_i of an active latent, 1 of a collapsed one, shape (min(L, D),)."""
        return 1 - self._gain()[: self.latent_size]

    @property
    def kl(self) -> np.ndarray:
        """KL of each latent, mean over the split, nats, shape (min(L, D),).

        (g E[c_i^2] / lambda_i - g - ln(1 - g)) / 2 with g = 1 - s2 / lambda_i, 0 if collapsed;
        ln(lambda_i / s2) / 2 on the training split.
        """
        gain, relative = self._gain(), self._relative_squares()
        with np.errstate(divide="ignore"):
            kl = (gain * relative - gain - np.log1p(-gain)) / 2
        return kl[: self.latent_size]

    @property
    def rate(self) -> float:
        """KL summed over latents, nats / image; infinite at s2 = 0."""
        return float(self.kl.sum())

    @property
    def mse(self) -> float:
        """E[SSE] / D over posterior samples, pixel^2.

        An active component leaves (s2 / lambda_i)^2 E[c_i^2] of bias and (lambda_i - s2) s2 /
        lambda_i of noise, together s2 on the training split; any other leaves E[c_i^2].
        """
        gain, squares = self._gain(), self.moments.squares
        noise = gain * np.where(self.active, self.decoder_variance, 0.0)
        return float((np.square(1 - gain) * squares + noise).sum() / self.pixels)

    @property
    def loss(self) -> float:
        """(E[SSE] + beta * rate) / D with beta = 2 s2, pixel^2; without KL it is the mse."""
        if self.decoder_variance == 0:
            return self.mse
        return self.mse + 2 * self.decoder_variance * self.rate / self.pixels

    @property
    def active_units(self) -> int:
        """Count latents whose posterior mean varies by more than 0.01, as for every run.

        The variance is g Var[c_i] / lambda_i, hence 1 - s2 / lambda_i on the training split: a
        latent with lambda_i less than about 1 % above s2 is in `active` and not counted here.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = self._gain() * self.moments.variances / self.variances
        return int((variance[self.active] > objective.ACTIVE_VARIANCE).sum())

    def distortion(self, variance: float | None = None) -> float:
        """D/2 (ln(2 pi v) + mse / v), nats / image, v the fitted decoder variance.

        Args:
            variance: v, the mse on validation data; None fits v here: the mse of this split.
        """
        fitted = self.mse if variance is None else variance
        return self.pixels / 2 * (math.log(2 * math.pi * fitted) + self.mse / fitted)

    def neg_elbo(self, variance: float | None = None) -> float:
        """`distortion` + `rate`, nats / image."""
        return self.distortion(variance) + self.rate

    @property
    def log_likelihood(self) -> float:
        """Exact log p(x) of the generative model, mean over the split, nats / image.

        x ~ N(mean, C) with eigenvalues C_i = lambda_i if active, else s2:
        -sum_i (ln(2 pi C_i) + E[c_i^2] / C_i) / 2. The ELBO with decoder variance s2 equals it,
        on every split, since the encoder is the exact posterior. (Tipping & Bishop 1999.)
        """
        c = np.where(self.active, self.variances, self.decoder_variance)
        return float(-(np.log(2 * math.pi * c) + self.moments.squares / c).sum() / 2)

    def _gain(self) -> np.ndarray:
        """Return g_i = 1 - s2 / lambda_i, the part of a coordinate that is decoded; 0 if not."""
        safe = np.where(self.active, self.variances, 1.0)
        return np.where(self.active, 1 - self.decoder_variance / safe, 0.0)

    def _relative_squares(self) -> np.ndarray:
        """Return E[c_i^2] / lambda_i of active components, else 0."""
        safe = np.where(self.active, self.variances, 1.0)
        return np.where(self.active, self.moments.squares / safe, 0.0)


MOST_PIXELS = 4_096
"""Values of an image, at most, that a linear model is computed of: the decomposition takes 7.5 s
of a core for 3,072 and grows with the third power (so 18 s here, 8 min for 64 x 64 in colour)."""

_KNOWN: dict[str, PCA] = {}
"""Digest of the training images -> components, which take seconds on MNIST and never change."""


_BUSY = threading.Lock()


def is_small(data: Dataset) -> bool:
    """Say whether the images are small enough for a linear model."""
    return data.pixels <= MOST_PIXELS


def pca(data: Dataset) -> PCA:
    """Return the principal components of a dataset's training split; computed once."""
    key = data.train.digest
    if key not in _KNOWN:  # without the lock, which a forked process could find held for ever
        with _BUSY:
            if key not in _KNOWN:
                _KNOWN[key] = _decompose(data.train)
    return _KNOWN[key]


def begin_pca(data: Dataset) -> None:
    """Find the principal components beside what the caller does next; `pca` waits for them."""
    if is_small(data):
        threading.Thread(target=pca, args=[data], daemon=True).start()


def _decompose(split: Split) -> PCA:
    grey = split.images.cpu().numpy().mean(0, dtype=np.float64)
    variances, components = np.linalg.eigh(_covariance(split))
    rounding = variances[-1] * len(grey) * np.finfo(np.float64).eps
    variances = np.where(variances > rounding, variances, 0.0)
    return PCA(grey / split.largest, components[:, ::-1], variances[::-1])


def _covariance(split: Split) -> np.ndarray:
    """Return the covariance (1/N) of a split's pixels, pixel^2, shape (D, D), rounded only once.

    Grey values are whole numbers. In float32, whose products take half the time, they are summed
    over so few images that every partial sum is below 2^24 and exact; float64 has room for
    N sum(x x^T) - sum(x) sum(x)^T, below 2^53 for up to 372,000 images.
    """
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
    return split.images.cpu().numpy() / split.largest
