"""The training objective of one run and the quantities around it, as pure functions.

Symbols: D pixels (all channels), L latents, B images of a batch. The loss of a run is
SSE / (B D) + kl_weight * KL / c, with KL summed over batch and latents and c set by
`kl_normalization`. Times D it is SSE + beta * rate per image, which is an exact negative ELBO, up
to scale and a constant, for a Gaussian decoder of variance beta / 2. Other likelihoods have another
error in place of the SSE (`harness/likelihoods.py`).

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

from harness import likelihoods, registry
from harness import terms as _built_in  # noqa: F401 - registers the built-in terms
from harness.config import RunConfig
from harness.errors import UserError
from harness.likelihoods import Kind

ACTIVE_VARIANCE = 0.01  # of a posterior mean over the data, above which a latent is active
MIN_VARIANCE = 1e-8  # of a posterior with `head="relu"`, inside the logarithm as in the blog
SET_RATE = {"capacity", "rate_floor"}  # terms that take the place of the KL weight


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

    def rate(self) -> Tensor:
        """Return the KL divergence from N(0, I) of each image, nats, shape (B,)."""
        return kl_per_latent(*self).sum(-1)


class Batch(NamedTuple):
    """One batch of a run and the model's output on it: the argument of a loss term.

    `z` are the latents that are decoded: a sample, or the mean if the latent is deterministic.
    """

    x: Tensor  # pixels in [0, 1], shape (B, *data_shape)
    posterior: Posterior  # of each image, shape (B, L)
    z: Tensor  # shape (B, L)
    output: Tensor  # of the decoder, before the non-linearity, shape (B, *data_shape)
    reconstruction: Tensor  # decoder means, shape (B, *data_shape)
    scale: Tensor | None = None  # learned decoder variance, pixel^2, or scale; shape ()
    prior: Tensor | None = None  # draws from N(0, I), shape (B, L), for a run with terms
    training_size: int = 0  # number of training images N
    progress: Tensor | float = 1.0  # of training, in [0, 1], shape ()
    decoded: Tensor | None = None  # as the likelihood takes it; None: reconstruction, or output


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

    error: Tensor  # of the likelihood: SSE, pixel^2, for a Gaussian decoder; shape ()
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


def likelihood_of(config: RunConfig) -> Kind:
    """Return the likelihood of a run: a class, whose functions are static."""
    kind: Kind = registry.LIKELIHOODS[config.likelihood].load()
    return kind


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

    NaN where the KL weight does not set it: `sigma` is not "fixed", the decoder is not Gaussian, or
    a term of `SET_RATE` does. (Lucas et al. 2019; Rybkin et al. 2021.)

    Examples:
        >>> decoder_variance(RunConfig(kl_normalization="batch"), pixels=784)
        392.0
    """
    return decoder_scale(config, pixels) if config.likelihood == "gaussian" else math.nan


def decoder_scale(config: RunConfig, pixels: int) -> float:
    """Return the scale of the decoder that makes the loss an ELBO: beta * `likelihoods.unit`.

    beta / 2 of a Gaussian, its variance, and beta of a Laplace decoder: S1 + beta * rate is beta
    times S1 / beta + rate. NaN where the KL weight does not set it.
    """
    if config.sigma != "fixed" or not config.has_scale or not SET_RATE.isdisjoint(config.terms):
        return math.nan
    return beta(config, pixels) * likelihoods.unit(likelihood_of(config), pixels)


def decoder_std(config: RunConfig, pixels: int) -> float:
    """Return the standard deviation of a pixel at that scale; NaN where it is not known."""
    std = vars(likelihood_of(config)).get("std")
    return math.nan if std is None else float(std(decoder_scale(config, pixels)))


def acts_as(config: RunConfig, pixels: int) -> str:
    """Return which decoder standard deviation a KL weight acts as, "" where there is none.

    Examples:
        >>> acts_as(RunConfig(kl_weight=0.02), pixels=784)
        'kl_weight 0.02 acts as a decoder standard deviation of 0.1 (25.5 grey levels of 255)'
    """
    std = decoder_std(config, pixels)
    if not std > 0:  # NaN too
        return ""
    acts = f"acts as a decoder standard deviation of {std:.3g}"
    return f"kl_weight {config.kl_weight:.3g} {acts} ({255 * std:.3g} grey levels of 255)"


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


def per_image(config: RunConfig, batch: Batch, kind: Kind | None = None) -> Parts:
    """Return the parts of the loss of each image of a batch.

    A worker process has no names of a user's likelihoods: there the `kind` is that of the model.
    """
    kind = kind or likelihood_of(config)
    given = batch.output if kind.logits else batch.reconstruction
    error = kind.error(batch.x, given if batch.decoded is None else batch.decoded)
    return Parts(error, kl_per_latent(*batch.posterior) if config.latent == "stochastic" else None)


def loss(
    config: RunConfig,
    means: Parts,
    coefficients: Coefficients,
    scale: Tensor | None,
    pixels: int,
    kind: Kind | None = None,
) -> Tensor:
    """Return the loss computed from means over images, without a user's terms, shape ().

    (data + beta * rate) / D, where data is the error of the likelihood with sigma="fixed": the SSE
    of a Gaussian decoder, the cross-entropy of a Bernoulli decoder; and else its negative
    log-density at the scale that it fits to the error (sigma="optimal") or learns (`scale`; Rybkin
    et al. 2021, 2006.13202). Pixel^2 with the SSE, else nats per pixel. Of `config`, only settings
    that all runs of a stack share are read.
    """
    data = means.error
    if config.sigma != "fixed":
        data = likelihoods.distortion(kind or likelihood_of(config), means.error, scale, pixels)
    if means.kl is None:
        return data / pixels
    free = coefficients.free_bits
    rate = means.kl.sum(-1) if free is None else free_rate(means.kl, free)
    return (data + coefficients.beta * rate) / pixels


def objective(
    config: RunConfig,
    batch: Batch,
    coefficients: Coefficients,
    terms: Terms | None = None,
    kind: Kind | None = None,
) -> Tensor:
    """Return the loss that training minimises on a batch, shape ().

    `loss` of the batch's averages + sum_k weight_k * term_k(batch) / D
    """
    pixels, means = batch.x[0].numel(), per_image(config, batch, kind).mean()
    total = loss(config, means, coefficients, batch.scale, pixels, kind)
    for name, term in (terms or {}).items():
        total = total + coefficients.weights[name] * term(batch) / pixels
    return total
