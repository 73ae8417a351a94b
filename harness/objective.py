"""The training objective of one run and the quantities around it, as pure functions.

Symbols: D pixels (all channels), L latents, B images of a batch. The loss of a run is
SSE / (B D) + kl_weight * KL / c, with KL summed over batch and latents and c set by
`kl_normalization`. Times D it is SSE + beta * rate per image, which is an exact negative ELBO, up
to scale and a constant, for a Gaussian decoder of variance beta / 2.

Training differentiates `objective`; for plain MLPs on a CPU `training/mlp_gradient.py` has its
gradient written out. Its parts are means over images, so that the same `loss` applies to a batch
and to a whole split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from harness import registry
from harness import terms as _built_in  # noqa: F401 - registers the built-in terms
from harness.config import RunConfig
from harness.errors import UserError

ACTIVE_VARIANCE = 0.01  # of a posterior mean over the data, above which a latent is active
MIN_VARIANCE = 1e-8  # of a posterior with `head="relu"`, inside the logarithm as in the blog


class Posterior(NamedTuple):
    """The posterior q(z|x) = N(mean, diag(exp(log_variance))), both of shape (B, L)."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def from_head(cls, output: Tensor, head: str) -> Posterior:
        """Return the posterior of an encoder's output, shape (B, 2 L).

        gaussian: the halves are mean and log-variance.
        relu: the halves behind a ReLU are mean and standard deviation sigma, as in the blog;
        log_variance = ln(sigma^2 + 1e-8).
        """
        if head == "gaussian":
            return cls(*output.chunk(2, dim=-1))
        mean, sigma = output.relu().chunk(2, dim=-1)
        return cls(mean, (sigma.square() + MIN_VARIANCE).log())

    def sample(self, eps: Tensor) -> Tensor:
        """Return z = mean + exp(log_variance / 2) * eps, shape (B, L) for eps of that shape."""
        return self.mean + (self.log_variance / 2).exp() * eps


class Batch(NamedTuple):
    """One batch of a run and the model's output on it: the argument of a loss term.

    `z` are the latents that are decoded: a sample, or the mean if the latent is deterministic.
    """

    x: Tensor  # pixels in [0, 1], shape (B, *data_shape)
    posterior: Posterior  # of each image, shape (B, L)
    z: Tensor  # shape (B, L)
    output: Tensor  # of the decoder, before the non-linearity, shape (B, *data_shape)
    reconstruction: Tensor  # decoder means, shape (B, *data_shape)
    scale: Tensor | None = None  # learned decoder variance, pixel^2, shape ()
    prior: Tensor | None = None  # draws from N(0, I), shape (B, L), for a run with terms
    training_size: int = 0  # number of training images N
    progress: Tensor | float = 1.0  # of training, in [0, 1], shape ()


class Coefficients(NamedTuple):
    """The numbers of a loss: tensors of shape (), since runs of a stack may differ in them."""

    beta: Tensor  # weight of the rate beside the summed squared error
    free_bits: Tensor | None = None  # nats per latent that are not penalised
    weights: Mapping[str, Tensor] = {}  # of each loss term, in the unit of beta


Terms = Mapping[str, Callable[[Batch], Tensor]]
"""Loss terms of a run by name: functions of a batch with results of shape ()."""

TERMS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(registry.TERMS)
"""The registered loss terms by name, the built-in ones and a user's."""


def terms_of(config: RunConfig) -> Terms:
    """Return the loss terms of a run, with its options."""
    return {
        name: partial(TERMS[name], **config.term_options.get(name, {})) for name in config.terms
    }


class Parts(NamedTuple):
    """The parts of a loss: of each image, with a leading axis B, or averaged over images."""

    error: Tensor  # SSE, pixel^2, shape ()
    cross_entropy: Tensor | None  # nats, shape (); None for a Gaussian decoder
    kl: Tensor | None  # nats of each latent, shape (L,); None if the latent is deterministic

    def mean(self) -> Parts:
        """Return the averages over the images."""
        return Parts(*(None if part is None else part.mean(0) for part in self))  # type: ignore[arg-type]


def kl_per_latent(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the KL divergence of a diagonal Gaussian from N(0, I), latent by latent.

    KL = (mean^2 + exp(log_variance) - log_variance - 1) / 2   (Kingma & Welling 2013, appendix B)

    Nats, shape (B, L) as the arguments, never negative beyond rounding.

    Examples:
        >>> kl_per_latent(torch.tensor([0.0, 2.0]), torch.zeros(2))
        tensor([0., 2.])
    """
    return (mean.square() + log_variance.exp() - log_variance - 1) / 2


def squared_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the squared error of each image, summed over its pixels: SSE = sum_d (x_d - y_d)^2.

    Pixel^2, shape (B,), of pixels x and decoder means y of shape (B, ...).
    """
    return (x - reconstruction).square().flatten(1).sum(-1)


def cross_entropy(x: Tensor, logits: Tensor) -> Tensor:
    """Return the cross-entropy of each image under independent Bernoulli pixels.

    CE = sum_d ln(1 + exp(a_d)) - x_d a_d   (Kingma & Welling 2013, appendix C.1)

    Nats, shape (B,), of pixels x and logits a of shape (B, ...). It is -ln p(x|z) for pixels that
    are 0 or 1, and no likelihood for grey ones.
    """
    return (functional.softplus(logits) - x * logits).flatten(1).sum(-1)


def beta(config: RunConfig, pixels: int) -> float:
    """Return the weight of the rate beside the summed squared error.

    beta = kl_weight * D * B / c (Higgins et al. 2017, up to their 1/2), where c divides the KL
    summed over batch and latents in the loss.

    Examples:
        >>> beta(RunConfig(kl_weight=0.5, kl_normalization="batch"), pixels=784)
        392.0
    """
    c = {
        "pixels": config.batch_size * pixels,
        "batch": config.batch_size,
        "latent": config.batch_size * config.latent_size,
        "sum": 1,
    }[config.kl_normalization]
    return config.kl_weight * pixels * config.batch_size / c


def decoder_variance(config: RunConfig, pixels: int) -> float:
    """Return the variance of the Gaussian decoder that makes the loss an ELBO: beta / 2, pixel^2.

    NaN where the KL weight does not set it: `sigma` is not "fixed", or the decoder is Bernoulli.
    (Lucas et al. 2019; Rybkin et al. 2021.)

    Examples:
        >>> decoder_variance(RunConfig(kl_normalization="batch"), pixels=784)
        392.0
    """
    if config.sigma != "fixed" or config.likelihood != "gaussian":
        return math.nan
    return beta(config, pixels) / 2


def with_decoder_variance(config: RunConfig, variance: float, pixels: int) -> RunConfig:
    """Return the configuration with the KL weight whose decoder variance is the given one.

    kl_weight = 2 * variance * c / (D B): the inverse of `decoder_variance` in any normalisation.
    """
    unit = decoder_variance(config.replace(kl_weight=1.0), pixels)
    if math.isnan(unit):
        given = f"sigma={config.sigma!r}, likelihood={config.likelihood!r}"
        needed = "sets the decoder variance only with sigma='fixed' and likelihood='gaussian'"
        raise UserError(f"{given}: the KL weight {needed}")
    return config.replace(kl_weight=variance / unit)


def kl_warmup(config: RunConfig, epoch: int, steps: int) -> Tensor:
    """Return the factor of beta at each step of an epoch: min(1, t / T), linear warm-up.

    t counts steps from the start of the cycle, from 0, and T is the number of steps in the warm-up
    epochs. A training has `kl_cycles` cycles of equal length: one (Bowman et al. 2016) or more (Fu
    et al. 2019). Epochs are counted from 1; float64, shape (steps,).
    """
    length = config.kl_warmup_epochs * steps
    if not length:
        return torch.ones(steps, dtype=torch.float64)
    done = (epoch - 1) * steps + torch.arange(steps, dtype=torch.float64)
    return (done % (config.epochs * steps / config.kl_cycles) / length).clamp(max=1.0)


def free_rate(kl: Tensor, free_bits: Tensor) -> Tensor:
    """Return the rate that the loss counts: sum over latents of max(free_bits, KL of the latent).

    Nats, shape (), of batch means, shape (L,). (Kingma et al. 2016, 1606.04934, appendix C.8.)
    """
    return kl.maximum(free_bits).sum(-1)


def distortion(mse: Tensor, variance: Tensor, pixels: int) -> Tensor:
    """Return the negative log-likelihood of an image under a Gaussian decoder.

    -E_q log p(x|z) = D/2 * (ln(2 pi variance) + mse / variance), mse per pixel with z from q(z|x)

    Nats per image, in the shape of mse and variance, pixel^2.
    """
    return pixels / 2 * (torch.log(2 * math.pi * variance) + mse / variance)


def per_image(config: RunConfig, batch: Batch) -> Parts:
    """Return the parts of the loss of each image of a batch."""
    error, entropy, kl = squared_error(batch.x, batch.reconstruction), None, None
    if config.likelihood == "bernoulli":
        entropy = cross_entropy(batch.x, batch.output)
    if config.latent == "stochastic":
        kl = kl_per_latent(*batch.posterior)
    return Parts(error, entropy, kl)


def loss(
    config: RunConfig, means: Parts, coefficients: Coefficients, scale: Tensor | None, pixels: int
) -> Tensor:
    """Return the loss computed from means over images, without a user's terms, shape ().

    (data + beta * rate) / D, where data is the cross-entropy of a Bernoulli decoder, the SSE of a
    Gaussian decoder with sigma="fixed", and else its `distortion` at the variance that it fits to
    the error (sigma="optimal") or learns (`scale`; Rybkin et al. 2021, 2006.13202). Pixel^2 with
    the SSE, else nats per pixel. Of `config`, only settings that all runs of a
    stack share are read.
    """
    if means.cross_entropy is not None:
        data = means.cross_entropy
    elif config.sigma == "fixed":
        data = means.error
    else:
        mse = means.error / pixels
        data = distortion(mse, mse if scale is None else scale, pixels)
    if means.kl is None:
        return data / pixels
    free = coefficients.free_bits
    rate = means.kl.sum(-1) if free is None else free_rate(means.kl, free)
    return (data + coefficients.beta * rate) / pixels


def objective(
    config: RunConfig, batch: Batch, coefficients: Coefficients, terms: Terms | None = None
) -> Tensor:
    """Return the loss that training minimises on a batch, shape ().

    `loss` of the batch's averages + sum_k weight_k * term_k(batch) / D
    """
    pixels = batch.x[0].numel()
    total = loss(config, per_image(config, batch).mean(), coefficients, batch.scale, pixels)
    for name, term in (terms or {}).items():
        total = total + coefficients.weights[name] * term(batch) / pixels
    return total
