"""Loss terms that are built in, each a function of a batch that a user could write.

Symbols: B images of a batch, N of training, L latents; q(z|x) is an image's posterior, and q(z) its
average over the training images, the aggregate posterior.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness import registry
from harness.errors import UserError

if TYPE_CHECKING:
    from harness.objective import Batch

SMALLEST = -60.0  # ln(variance) of a density: the square of a distance over it has to be finite


def total_correlation(batch: Batch) -> Tensor:
    """Estimate KL(q(z) to prod_l q(z_l)) by stratified sampling: 0 if latents are independent.

    mean_i [ln q(z_i) - sum_l ln q(z_il)], q(z_i) = sum_j w_ij q(z_i|x_j), where w_ij is 1 / N for
    the own image, j = i, and (N - 1) / (N (B - 1)) for each other. Nats per image. (Chen et al.
    2018, 1802.04942, appendix C.2.) It needs posterior, z and training_size; its bias depends on B
    and N (docs/terms.md).
    """
    images, size = len(batch.z), batch.training_size
    if size < 1:
        raise UserError(f"training_size={size}: total_correlation needs that of training, >= 1")
    other = (size - 1) / (size * max(images - 1, 1))
    is_own = torch.eye(images, dtype=batch.z.dtype, device=batch.z.device)
    return _total_correlation(batch, (other + (1 / size - other) * is_own).log())


def total_correlation_weighted(batch: Batch) -> Tensor:
    """Estimate the total correlation by weighted sampling: every image of the batch counts 1 / B.

    The formula is that of `total_correlation` with w_ij = 1 / B. Chen et al. (2018, 1802.04942,
    appendix C.1) have 1 / (N B), which adds (L - 1) ln N: nats without a gradient, left out here.
    Nats per image. It needs posterior and z; it is too large in a small batch (docs/terms.md).
    """
    images = len(batch.z)
    return _total_correlation(batch, batch.z.new_full((images, images), 1 / images).log())


def _total_correlation(batch: Batch, log_weights: Tensor) -> Tensor:
    mean, log_variance = batch.posterior
    log_variance = log_variance.clamp(min=SMALLEST)
    distance = (batch.z.unsqueeze(1) - mean) * (-log_variance / 2).exp()
    log_density = -(distance.square() + log_variance) / 2  # (B, B, L); ln(2 pi) cancels out
    joint = (log_weights + log_density.sum(-1)).logsumexp(1)
    marginals = (log_weights.unsqueeze(-1) + log_density).logsumexp(1)
    return (joint - marginals.sum(-1)).mean()


def mmd(batch: Batch, *, bandwidth: float = 1.0) -> Tensor:
    """Return the squared maximum mean discrepancy between z and draws p from the prior.

    mean k(z, z') + mean k(p, p') - 2 mean k(z, p), k(a, b) = exp(-|a - b|^2 / (2 L bandwidth^2)),
    averages over all B^2 pairs (V-statistic), those of a draw with itself included; 2 L is the mean
    squared distance of two draws from the prior. In [0, 2], no unit. (Gretton et al. 2012; InfoVAE,
    Zhao et al. 2017, 1706.02262.) It needs z and prior.
    """
    if batch.prior is None:
        raise UserError("prior=None: mmd needs draws from the prior, of the shape of z")
    if not bandwidth > 0:
        raise UserError(f"bandwidth={bandwidth!r}: mmd divides by its square, give a number > 0")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = (a.unsqueeze(1) - b).square().mean(-1)
        return (-distance / (2 * bandwidth**2)).exp().mean()

    z, prior = batch.z, batch.prior
    return kernel(z, z) + kernel(prior, prior) - 2 * kernel(z, prior)


def dip_i(batch: Batch, *, ratio: float = 10.0) -> Tensor:
    """Return the distance of the covariance of posterior means from I (DIP-VAE-I).

    sum_(i != j) C_ij^2 + ratio * sum_i (C_ii - 1)^2, C = Cov(mean) over the batch, divided by B. No
    unit. (Kumar et al. 2018, 1711.00848, equation 6.) It needs posterior.
    """
    return _from_identity(_covariance(batch.posterior.mean), ratio)


def dip_ii(batch: Batch, *, ratio: float = 1.0) -> Tensor:
    """Return the distance of the covariance of the aggregate posterior from I (DIP-VAE-II).

    The formula is that of `dip_i`, C = Cov(mean) + diag(mean of the posterior variances). No unit.
    (Kumar et al. 2018, 1711.00848, equation 7.) It needs posterior.
    """
    mean, log_variance = batch.posterior
    return _from_identity(_covariance(mean) + log_variance.exp().mean(0).diag(), ratio)


def capacity(
    batch: Batch, *, nats: float = 25.0, share: float = 1.0, per_image: bool = False
) -> Tensor:
    """Return the distance of the rate from a capacity that rises linearly: |rate - C|.

    C = nats * min(1, progress / share). Nats. Meant with kl_weight 0, in whose place its weight is
    that of a rate above C. The rate is the mean over images, or with `per_image` that of each, and
    the distance is averaged. (Burgess et al. 2018, 1804.03599, equation 8.) It needs posterior and
    progress.
    """
    if not share > 0:
        raise UserError(f"share={share!r}: capacity rises over a share of the training, > 0")
    done = batch.progress / share  # a number where runs are measured
    risen = done.clamp(max=1.0) if isinstance(done, Tensor) else min(done, 1.0)
    rate = batch.posterior.rate()
    return ((rate if per_image else rate.mean()) - nats * risen).abs().mean()


def rate_floor(batch: Batch, *, nats: float = 16.0) -> Tensor:
    """Return the mean over images of max(rate, nats): no image is pressed below so many nats.

    Nats. Meant with kl_weight 0, in whose place its weight is. (Ha & Schmidhuber 2018, 1803.10122,
    have half a nat for each of 32 latents.) It needs posterior.
    """
    return batch.posterior.rate().clamp(min=nats).mean()


def _covariance(mean: Tensor) -> Tensor:
    centred = mean - mean.mean(0)
    return centred.T @ centred / len(mean)


def _from_identity(covariance: Tensor, ratio: float) -> Tensor:
    diagonal = covariance.diagonal()
    others = covariance - diagonal.diag()
    return others.square().sum() + ratio * (diagonal - 1).square().sum()


_TERMS = (total_correlation, total_correlation_weighted, mmd, dip_i, dip_ii, capacity, rate_floor)
registry.TERMS |= {function.__name__: function for function in _TERMS}
