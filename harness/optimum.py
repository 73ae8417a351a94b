"""The exact linear VAE as a model: the closed form of `oracle` written into weights."""

from __future__ import annotations

import numpy as np
import torch

from harness import objective, oracle
from harness.config import RunConfig, UserError
from harness.data.dataset import Dataset
from harness.vae import SingleVAE, initial


def linear_vae(config: RunConfig, data: Dataset) -> SingleVAE:
    """Return the linear VAE that minimises a run's loss on the training split, in float64.

    Latent i lies along principal component i: encoder row sqrt(lambda_i - s2) / lambda_i * u_i,
    log-variance ln(s2 / lambda_i), decoder column sqrt(lambda_i - s2) * u_i, biases such that the
    training mean is the origin; a collapsed latent has weights 0. The optimum is unique up to
    signs, and where decoder variances coincide up to rotations. (Lucas et al. 2019, 1911.02469.)

    Raises:
        UserError: the closed form is not that of the run's loss, or the run has no KL, or more
            latents than pixels.
    """
    variance = objective.decoder_variance(config, data.pixels)
    linear = config.model == "linear" and config.head == "gaussian" and config.free_bits == 0
    if not linear or not variance > 0 or config.latent_size > data.pixels:  # NaN too
        raise UserError(
            "the exact optimum needs model='linear', head='gaussian', likelihood='gaussian', "
            "sigma='fixed', free_bits=0, kl_weight > 0 and at most "
            f"{data.pixels} latents; given {config}"
        )
    known = oracle.pca(data)
    best = known.trained_optimum(config.latent_size, variance)
    basis = known.components[:, : config.latent_size]
    posterior = best.posterior_variances
    columns = basis * np.sqrt(known.variances[: config.latent_size] * (1 - posterior))
    rows = (columns / np.where(best.active, known.variances, 1.0)[: config.latent_size]).T
    run = initial(config, data.image_shape).double()
    weights = {
        "encoder.0.weight": np.concatenate([rows, np.zeros_like(rows)]),
        "encoder.0.bias": np.concatenate([-rows @ known.mean, np.log(posterior)]),
        "decoder.0.weight": columns,
        "decoder.0.bias": known.mean,
    }
    run.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    return run
