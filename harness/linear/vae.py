"""The exact linear VAE in closed form: metrics and losses; `examples/linear_vae.py` has weights.

With a linear encoder and decoder and a Gaussian decoder of variance s2 the VAE's optimum is
probabilistic PCA (Tipping & Bishop 1999; Lucas et al. 2019, 1911.02469). Along a component i of the
training covariance that is active (lambda_i > s2), with coordinate c_i = u_i . (x - mean), it has

    posterior mean       sqrt(lambda_i - s2) / lambda_i * c_i
    posterior variance   s2 / lambda_i
    decoder column       sqrt(lambda_i - s2) * u_i, and the training mean as bias

and a latent with lambda_i <= s2 collapses onto the prior. On other images than those of training
only the second moments E[c_i^2] take the place of the lambda_i that stem from the data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from harness import objective
from harness.config import RunConfig
from harness.data.dataset import Dataset, Split
from harness.linear.pca import PCA, Moments, is_small, pca

Loss = TypeVar("Loss", float, torch.Tensor)

SMALLEST_VARIANCE = 1e-12  # of the decoder, pixel^2, where no component is discarded


@dataclass(frozen=True)
class LinearOptimum:
    """The exact optimum of a linear VAE on the training split, measured on any split.

    Metrics have the names and units of a run's. The limit s2 = 0 is without KL, plain PCA.
    """

    known: PCA  # of the training split
    latent_size: int  # L; latents beyond D collapse
    decoder_variance: float  # s2 = beta / 2, pixel^2
    split: Split | None = None  # of the metrics; None is the training split

    @property
    def active(self) -> np.ndarray:
        """Whether a component is one of the first L with lambda_i > s2, bool, shape (D,)."""
        first = np.arange(self._pixels) < self.latent_size
        return first & (self.known.variances > self.decoder_variance)

    @property
    def kl(self) -> np.ndarray:
        """KL of each latent, mean over the split, nats, shape (min(L, D),).

        (g E[c_i^2] / lambda_i - g - ln(1 - g)) / 2 with g = 1 - s2 / lambda_i, 0 if collapsed.
        """
        gain = self._gain
        with np.errstate(divide="ignore"):
            kl = (gain * self._over_variances(self._moments.squares) - gain - np.log1p(-gain)) / 2
        return kl[: self.latent_size]

    @property
    def rate(self) -> float:
        """KL summed over latents, nats / image; infinite at s2 = 0."""
        return float(self.kl.sum())

    @property
    def mse(self) -> float:
        """E[SSE] / D over posterior samples, pixel^2.

        An active component leaves (s2 / lambda_i)^2 E[c_i^2] of bias and (lambda_i - s2) s2 /
        lambda_i of noise; any other leaves E[c_i^2].
        """
        bias = np.square(1 - self._gain) * self._moments.squares
        noise = self._gain * np.where(self.active, self.decoder_variance, 0.0)
        return float((bias + noise).sum() / self._pixels)

    @property
    def loss(self) -> float:
        """(E[SSE] + beta * rate) / D with beta = 2 s2, pixel^2; without KL it is the mse."""
        if self.decoder_variance == 0:
            return self.mse
        return self.mse + 2 * self.decoder_variance * self.rate / self._pixels

    @property
    def active_units(self) -> int:
        """Count latents whose posterior mean varies, by g Var[c_i] / lambda_i > 0.01."""
        variances = self._moments.squares - np.square(self._moments.means)
        means = self._over_variances(self._gain * variances)
        return int((means > objective.ACTIVE_VARIANCE).sum())

    def distortion(self, variance: float | None = None) -> float:
        """D/2 (ln(2 pi v) + mse / v), nats / image; without a variance v is the mse, its best."""
        fitted = self.mse if variance is None else variance
        return self._pixels / 2 * (math.log(2 * math.pi * fitted) + self.mse / fitted)

    def neg_elbo(self, variance: float | None = None) -> float:
        """`distortion` + `rate`, nats / image."""
        return self.distortion(variance) + self.rate

    @property
    def log_likelihood(self) -> float:
        """Exact log p(x) of the generative model, mean over the split, nats / image.

        x ~ N(mean, C) with eigenvalues C_i = lambda_i if active, else s2:
        -sum_i (ln(2 pi C_i) + E[c_i^2] / C_i) / 2. The ELBO with decoder variance s2 equals it.
        """
        c = np.where(self.active, self.known.variances, self.decoder_variance)
        return float(-(np.log(2 * math.pi * c) + self._moments.squares / c).sum() / 2)

    @property
    def _pixels(self) -> int:
        return len(self.known.variances)

    @property
    def _moments(self) -> Moments:
        return self.known.moments(self.split)

    @property
    def _gain(self) -> np.ndarray:
        """g_i = 1 - s2 / lambda_i, the part of a coordinate that is decoded; 0 if collapsed."""
        return self.active - self._over_variances(self.decoder_variance)

    def _over_variances(self, values: np.ndarray | float) -> np.ndarray:
        zeros = np.zeros_like(self.known.variances)
        return np.divide(values, self.known.variances, out=zeros, where=self.active)


def gap_to_linear(linear_loss: Loss, loss: Loss) -> Loss:
    """Return how far a loss is below that of the exact linear model, in percent of the latter."""
    return 100 * (linear_loss - loss) / linear_loss


def linear_losses(
    configs: Sequence[RunConfig], data: Dataset, split: Split | None = None
) -> np.ndarray:
    """Return each run's loss on a split of the exact linear model, pixel^2, shape (S,).

    None is the training split. NaN for large images, and where a loss has another optimum or unit.
    """
    losses = np.full(len(configs), np.nan)
    for i, config in enumerate(configs):
        if _comparable(config) and is_small(data):
            variance = objective.decoder_variance(config, data.pixels)
            losses[i] = LinearOptimum(pca(data), config.latent_size, variance, split).loss
    return losses


def linear_metrics(config: RunConfig, data: Dataset) -> dict[str, float]:
    """Return the test metrics of the exact linear model at a run's KL weight and latent size.

    The decoder variance of `neg_elbo` is fitted on validation data; `test/pca_floor` is the mse of
    as many principal components. Infinite values are left out; a deterministic latent, a Bernoulli
    decoder, dequantised pixels and large images have no metrics.
    """
    if not (_has_optimum(config) and is_small(data)):
        return {}
    known, variance = pca(data), objective.decoder_variance(config, data.pixels)
    if config.sigma != "fixed":
        variance = matched_variance(known, config, data.pixels)
    floor = {"test/pca_floor": known.floor(data.test, config.latent_size)}
    if math.isnan(variance):  # a term sets the rate
        return floor
    val, test = (
        LinearOptimum(known, config.latent_size, variance, split) for split in (data.val, data.test)
    )
    values = {
        "loss": test.loss if _comparable(config) else math.nan,
        "mse": test.mse,
        "rate": test.rate,
        "neg_elbo": test.neg_elbo(val.mse) if val.mse > 0 else math.nan,
        "active_units": float(test.active_units),
        "collapse_variance": float(known.variances[0]),  # no latent is active at larger ones
        "latents_above_variance": float((known.variances > variance).sum()),  # of any latent size
    }
    finite = {f"linear/{name}": value for name, value in values.items() if math.isfinite(value)}
    return finite | floor


def matched_variance(known: PCA, config: RunConfig, pixels: int) -> float:
    """Return the decoder variance of the linear optimum of a sigma-VAE, pixel^2.

    A sigma-VAE minimises D/2 ln s2 + SSE / (2 s2) + beta * rate over s2 as well, so s2 = mse, and
    its linear optimum has v = beta * s2: the solution of v = beta * mse(v) on the training split.
    """
    from scipy.optimize import brentq  # half a second that few runs need

    beta = objective.beta(config, pixels)

    def excess(log_variance: float) -> float:
        variance = math.exp(log_variance)
        return variance - beta * LinearOptimum(known, config.latent_size, variance).mse

    low = math.log(SMALLEST_VARIANCE)
    high = math.log(beta * known.variances.mean() + 2 * SMALLEST_VARIANCE)
    if excess(low) >= 0:
        return SMALLEST_VARIANCE
    return math.exp(brentq(excess, low, high, xtol=1e-14))


def _has_optimum(config: RunConfig) -> bool:
    is_gaussian = config.likelihood == "gaussian" and config.dequantize == "none"
    return is_gaussian and config.latent == "stochastic"


def _comparable(config: RunConfig) -> bool:
    plain = config.sigma == "fixed" and config.free_bits == 0 and not config.terms
    return plain and _has_optimum(config)
