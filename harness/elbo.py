"""One forward pass of a stack and the loss made of it: what training and evaluation share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from harness import objective
from harness.nn import constant
from harness.vae import VAE


class Terms(NamedTuple):
    """What one forward pass gives.

    Attributes:
        error: SSE of each image, pixel^2, shape (S, B).
        cross_entropy: nats of each image, shape (S, B); None for a Gaussian decoder.
        kl: KL of each latent, nats, shape (S, B, L); None for a deterministic latent.
        mean: posterior means, shape (S, B, L).
    """

    error: Tensor
    cross_entropy: Tensor | None
    kl: Tensor | None
    mean: Tensor


def terms(model: VAE, x: Tensor, eps: Tensor) -> Terms:
    """Encode, sample, decode.

    Args:
        model: the stack.
        x: pixels in [0, 1], shape (S, B, D).
        eps: standard normal noise, shape (S, B, L).
    """
    posterior = model.encode(x)
    z = model.reparameterize(posterior, eps)
    deterministic = model.configs[0].latent == "deterministic"
    kl = None if deterministic else objective.kl_per_latent(posterior.mean, posterior.log_variance)
    if model.configs[0].likelihood == "gaussian":
        error = objective.squared_error(x, model.decode(z))
        return Terms(error, None, kl, posterior.mean)
    logits = model.decoder_output(z)
    error = objective.squared_error(x, logits.sigmoid())
    return Terms(error, objective.cross_entropy(x, logits), kl, posterior.mean)


def loss(
    model: VAE,
    error: Tensor,
    cross_entropy: Tensor | None,
    kl: Tensor | None,
    beta: Tensor,
    pixels: int,
) -> Tensor:
    """Return what each run minimises, from the terms of `terms` averaged over images.

    Args:
        model: the stack, for `sigma` and `free_bits` of its runs.
        error: SSE of an image, shape (S,).
        cross_entropy: nats of an image, shape (S,), or None.
        kl: KL of each latent, nats, shape (S, L), or None.
        beta: weight of the rate, shape (S,).
        pixels: D.

    Returns:
        Per pixel, as `objective.loss`: pixel^2 with the squared error, else nats; shape (S,).
    """
    reconstruction = _data_term(model, error, pixels) if cross_entropy is None else cross_entropy
    if kl is None:
        return reconstruction / pixels
    return objective.loss(reconstruction, _rate(model, kl), beta, pixels)


def losses(model: VAE, x: Tensor, eps: Tensor, beta: Tensor) -> Tensor:
    """Return the training loss of each run on its batch.

    Args:
        model: the stack.
        x: pixels in [0, 1], shape (S, B, D).
        eps: standard normal noise, shape (S, B, L).
        beta: weight of the rate, shape (S,).

    Returns:
        Shape (S,). Summing it gives every run exactly its own gradient.
    """
    return mean_loss(model, terms(model, x, eps), beta, x.shape[-1])


def mean_loss(model: VAE, seen: Terms, beta: Tensor, pixels: int) -> Tensor:
    """Return `loss` of the terms of a batch, shape (S,)."""
    error, cross_entropy, kl, _ = seen
    return loss(
        model,
        error.mean(-1),
        None if cross_entropy is None else cross_entropy.mean(-1),
        None if kl is None else kl.mean(1),
        beta,
        pixels,
    )


def _data_term(model: VAE, error: Tensor, pixels: int) -> Tensor:
    """Return `objective.data_term`, without its work where every run has a fixed variance."""
    fixed = tuple(c.sigma == "fixed" for c in model.configs)
    if all(fixed):
        return error
    variance = model.decoder_variances(error / pixels)
    which = constant(fixed, torch.bool, error.device)
    return objective.data_term(error, variance, which, pixels)


def _rate(model: VAE, kl: Tensor) -> Tensor:
    floors = tuple(c.free_bits for c in model.configs)
    if not any(floors):
        return kl.sum(-1)
    floor = constant(floors, kl.dtype, kl.device).unsqueeze(1)
    return objective.free_rate(kl, floor * model.used_latents.squeeze(1))
