"""The exact linear model beside a run: same KL weight, same latent size, closed form (numpy)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from harness import objective
from harness.config import RunConfig
from harness.data.dataset import Dataset, Split
from harness.oracle import PCA, LinearOptimum, is_small, pca

SMALLEST_VARIANCE = 1e-12
"""Decoder variance, pixel^2, that a linear model without discarded components is given."""


def linear_losses(configs: Sequence[RunConfig], data: Dataset, split: Split) -> np.ndarray:
    """Return the loss on a split of the exact linear model at each run's KL weight and latent size.

    The model is that of the training split. Without KL its loss is the PCA floor. NaN where the
    closed form is not that of the run's loss: a deterministic latent, free bits, a Bernoulli
    decoder; and where the loss is a log-likelihood (sigma not fixed), which can be 0 or negative,
    so that a relative gap means nothing; and for images too large for a linear model.

    Returns:
        pixel^2, shape (S,).
    """
    if not is_small(data):
        return np.full(len(configs), np.nan)
    known = pca(data)
    moments = known.moments(split)
    losses = [
        LinearOptimum(
            known.variances, moments, c.latent_size, objective.decoder_variance(c, data.pixels)
        ).loss
        if _comparable(c)
        else np.nan
        for c in configs
    ]
    return np.array(losses)


def linear_metrics(config: RunConfig, data: Dataset) -> dict[str, float]:
    """Return the test metrics of the exact linear model at a run's KL weight and latent size.

    As for a run, the decoder variance of `neg_elbo` is fitted on validation data. With `sigma`
    not fixed the linear model's own variance is `matched_variance`. What is infinite without KL is
    left out; a deterministic latent and a Bernoulli decoder have no linear model, nor have images
    that are too large for it.

    Returns:
        `linear/` before loss, mse, rate, neg_elbo, active_units; and `linear/collapse_variance`:
        the decoder variance lambda_1 from which on no latent is active.
    """
    none = config.latent == "deterministic" or config.likelihood != "gaussian"
    if none or not is_small(data):
        return {}
    known, variance = pca(data), objective.decoder_variance(config, data.pixels)
    if config.sigma != "fixed":
        variance = matched_variance(known, config, data.pixels)
    val, test = (known.optimum(s, config.latent_size, variance) for s in (data.val, data.test))
    values = {
        "loss": test.loss if _comparable(config) else math.nan,
        "mse": test.mse,
        "rate": test.rate,
        "neg_elbo": test.neg_elbo(val.mse) if val.mse > 0 else math.nan,
        "active_units": float(test.active_units),
        "collapse_variance": float(known.variances[0]),
    }
    return {f"linear/{name}": value for name, value in values.items() if math.isfinite(value)}


def matched_variance(known: PCA, config: RunConfig, pixels: int) -> float:
    """Return the decoder variance v at which the linear model leaves the error it assumes, pixel^2.

    A sigma-VAE minimises D/2 ln s2 + SSE / (2 s2) + beta * rate over s2 as well, so s2 = mse, and
    its linear optimum has v = beta * s2: the solution of v = beta * mse(v) on the training split.
    At beta = 1 it is the maximum-likelihood variance of pPCA (Tipping & Bishop 1999).
    """
    from scipy.optimize import brentq  # half a second that few runs need

    beta = objective.beta(config, pixels)

    def excess(log_variance: float) -> float:
        variance = math.exp(log_variance)
        return variance - beta * known.trained_optimum(config.latent_size, variance).mse

    low = math.log(SMALLEST_VARIANCE)
    high = math.log(beta * known.variances.mean() + 2 * SMALLEST_VARIANCE)
    if excess(low) >= 0:
        return SMALLEST_VARIANCE
    return math.exp(brentq(excess, low, high, xtol=1e-14))


def _comparable(config: RunConfig) -> bool:
    """Say whether the closed form's loss is the run's own."""
    gaussian = config.likelihood == "gaussian" and config.sigma == "fixed"
    return gaussian and config.latent == "stochastic" and config.free_bits == 0
