"""The training objective and the quantities around it, as pure functions.

Symbols as everywhere in the project: D pixels, L latents, B images of a batch, S stacked runs.
The loss of a run is SSE / (B D) + kl_weight * KL / c with KL summed over batch and latents and c
set by `kl_normalization`; times D it is SSE + beta * rate per image, which is an exact negative
ELBO, up to scale and constant, for a Gaussian decoder of variance beta / 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from harness.config import RunConfig, UserError
from harness.nn import constant

CPU = torch.device("cpu")

ACTIVE_VARIANCE = 0.01
"""A latent is active if its posterior mean varies more than this over the data (Burda 2015)."""


def kl_per_latent(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of a diagonal Gaussian posterior from N(0, I), latent by latent.

    KL = (mean^2 + exp(log_variance) - log_variance - 1) / 2   (Kingma & Welling 2013, appendix B)

    Args:
        mean: posterior means, shape (S, B, L).
        log_variance: logarithms of the posterior variances, shape (S, B, L).

    Returns:
        KL in nats, shape (S, B, L), never negative beyond rounding.

    Examples:
        A latent at the prior costs nothing; one moved by 2 standard deviations costs 2 nats.

        >>> kl_per_latent(torch.tensor([0.0, 2.0]), torch.zeros(2))
        tensor([0., 2.])
    """
    return (mean.square() + log_variance.exp() - log_variance - 1) / 2


def squared_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Squared error of each image, summed over its pixels: SSE = sum_d (x_d - y_d)^2.

    Args:
        x: pixels in [0, 1], shape (S, B, D).
        reconstruction: decoder means, shape (S, B, D).

    Returns:
        SSE in pixel^2, shape (S, B).
    """
    return (x - reconstruction).square().sum(-1)


def cross_entropy(x: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy of each image under independent Bernoulli pixels, summed over them.

    CE = sum_d ln(1 + exp(a_d)) - x_d a_d = -ln p(x|z) if x is binary   (Kingma & Welling 2013,
    appendix C.1)

    Args:
        x: pixels, 0 or 1 (grey ones give a loss that is no likelihood), shape (S, B, D).
        logits: decoder output a before its sigmoid, shape (S, B, D).

    Returns:
        nats, shape (S, B).
    """
    return (functional.softplus(logits) - x * logits).sum(-1)


def kl_scale(config: RunConfig, pixels: int) -> float:
    """Return c, what the KL sum over batch and latents is divided by in the loss.

    pixels: B D; batch: B; latent: B L; sum: 1.
    """
    return {
        "pixels": config.batch_size * pixels,
        "batch": config.batch_size,
        "latent": config.batch_size * config.latent_size,
        "sum": 1,
    }[config.kl_normalization]


def beta(config: RunConfig, pixels: int) -> float:
    """Return the weight that the KL really has beside the summed squared error.

    beta = kl_weight * D * B / c, with c = `kl_scale` (Higgins et al. 2017, up to their 1/2).

    Examples:
        >>> beta(RunConfig(kl_weight=0.5, kl_normalization="batch"), pixels=784)
        392.0
    """
    return config.kl_weight * pixels * config.batch_size / kl_scale(config, pixels)


def decoder_variance(config: RunConfig, pixels: int) -> float:
    """Return the variance of the Gaussian decoder that makes the loss an ELBO: beta / 2, pixel^2.

    NaN where the KL weight does not set it: `sigma` is not "fixed", or the decoder is Bernoulli.
    (Lucas et al. 2019; Rybkin et al. 2021.)

    Examples:
        The same weight 1 on MNIST, under four names:

        >>> for name in ("pixels", "latent", "batch", "sum"):
        ...     print(name, decoder_variance(RunConfig(kl_normalization=name), pixels=784))
        pixels 0.5
        latent 39.2
        batch 392.0
        sum 12544.0
    """
    if config.sigma != "fixed" or config.likelihood != "gaussian":
        return math.nan
    return beta(config, pixels) / 2


def with_decoder_variance(config: RunConfig, variance: float, pixels: int) -> RunConfig:
    """Return the configuration with the KL weight whose decoder variance is the given one.

    kl_weight = 2 * variance * c / (D B): the inverse of `decoder_variance` in any normalisation.

    Raises:
        UserError: the configuration's KL weight sets no decoder variance.

    Examples:
        >>> undivided = RunConfig(kl_normalization="sum")
        >>> round(with_decoder_variance(undivided, 0.025, pixels=784).kl_weight, 9)
        1.993e-06
    """
    unit = decoder_variance(config.replace(kl_weight=1.0), pixels)
    if math.isnan(unit):
        raise UserError(
            f"sigma={config.sigma!r}, likelihood={config.likelihood!r}: the KL weight sets the "
            "decoder variance only with sigma='fixed' and likelihood='gaussian'"
        )
    return config.replace(kl_weight=variance / unit)


def betas(configs: Sequence[RunConfig], pixels: int, device: torch.device = CPU) -> Tensor:
    """Return `beta` of each run, float64, shape (S,); made once, so not to be written to."""
    return constant(tuple(beta(c, pixels) for c in configs), torch.float64, device)


def kl_warmup(configs: Sequence[RunConfig], epoch: int, steps: int) -> Tensor:
    """Return the factor of beta at each step of an epoch: min(1, t / T), linear warm-up.

    t counts steps from the start of the cycle, T is the number of steps in the warm-up epochs;
    without warm-up the factor is 1. A training has `kl_cycles` cycles of equal length, one being
    the usual linear warm-up (Bowman et al. 2016) and more the cyclical one (Fu et al. 2019).

    Args:
        configs: the runs.
        epoch: epoch, counted from 1.
        steps: steps of an epoch.

    Returns:
        float64, shape (steps, S).
    """
    done = (epoch - 1) * steps + torch.arange(steps, dtype=torch.float64).unsqueeze(1)
    cycle = torch.tensor([c.epochs * steps / c.kl_cycles for c in configs], dtype=torch.float64)
    length = torch.tensor([c.kl_warmup_epochs * steps for c in configs], dtype=torch.float64)
    return torch.where(length > 0, done % cycle / length.clamp(min=1), 1.0).clamp(max=1.0)


def free_rate(kl: Tensor, free_bits: Tensor) -> Tensor:
    """Return the rate that the loss sees: sum over latents of max(free_bits, KL of the latent).

    With free_bits = 0 it is the rate itself. (Kingma et al. 2016, 1606.04934, appendix C.8.)

    Args:
        kl: KL of each latent, mean over the batch, nats, shape (S, L).
        free_bits: nats of each latent that cost nothing, shape (S, 1) or (S, L).

    Returns:
        nats, shape (S,).
    """
    return kl.maximum(free_bits).sum(-1)


def data_term(error: Tensor, variance: Tensor, fixed: Tensor, pixels: int) -> Tensor:
    """Return the part of the loss, times D, that comes from the reconstruction.

    The squared error itself where the KL weight sets the decoder variance, else `distortion` with
    the run's own variance (Rybkin et al. 2021, 2006.13202).

    Args:
        error: SSE of an image, mean over the batch, shape (S,).
        variance: decoder variance in pixel^2, positive, ignored where fixed, shape (S,).
        fixed: whether the KL weight sets the variance, bool, shape (S,).
        pixels: D.

    Returns:
        pixel^2 where fixed, else nats, shape (S,).
    """
    return torch.where(fixed, error, distortion(error / pixels, variance, pixels))


def loss(error: Tensor, rate: Tensor, beta: Tensor, pixels: int) -> Tensor:
    """Return what is minimised, per pixel: (error + beta * rate) / D.

    With the squared error it is SSE / (B D) + kl_weight * KL / c of the whole batch, in pixel^2;
    with a negative log-likelihood it is the negative ELBO per pixel at beta = 1.

    Args:
        error: `data_term` or `cross_entropy`, mean over the batch, shape (S,).
        rate: KL of an image summed over latents, mean over the batch, nats, shape (S,).
        beta: shape (S,).
        pixels: D.

    Returns:
        pixel^2 with the squared error, else nats per pixel; shape (S,), one loss per run.
    """
    return (error + beta * rate) / pixels


def distortion(mse: Tensor, variance: Tensor, pixels: int) -> Tensor:
    """Negative log-likelihood of an image under a Gaussian decoder of the given variance.

    -E_q log p(x|z) = D/2 * (ln(2 pi variance) + mse / variance)

    Args:
        mse: squared error per pixel, z drawn from q(z|x), shape (S,).
        variance: decoder variance in pixel^2, shape (S,).
        pixels: D.

    Returns:
        nats per image, shape (S,).
    """
    return pixels / 2 * (torch.log(2 * math.pi * variance) + mse / variance)
