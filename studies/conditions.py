"""Settings that several studies compare, and what they measure beside the metrics of every run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.config import RunConfig, UserError
from studies.runner.study import Source

if TYPE_CHECKING:
    from harness.data.dataset import Dataset
    from harness.tracking.record import Trained

BLOG_WEIGHT = 1.0
"""The blog's weight: decoder variance 0.5 pixel² (normalisation "pixels")."""

CALIBRATED_ELBO = "ELBO, calibrated"
BLOG_ELBO = "ELBO, weight 1"
MSE_STOCHASTIC = "MSE only, stochastic"
AUTOENCODER = "MSE only, autoencoder"
BLOG = "blog's recipe"
BLOG_WITHOUT_KL = "blog's recipe, no KL"

CONDITIONS: Mapping[str, Mapping[str, Any]] = {
    CALIBRATED_ELBO: {},
    BLOG_ELBO: {"kl_weight": BLOG_WEIGHT},
    MSE_STOCHASTIC: {"kl_weight": 0.0},
    AUTOENCODER: {"kl_weight": 0.0, "latent": "deterministic"},
    BLOG: {"head": "relu", "kl_weight": BLOG_WEIGHT},
    BLOG_WITHOUT_KL: {"head": "relu", "kl_weight": 0.0},
}
"""What ELBO and MSE-only training are compared by: name -> changes to the calibrated ELBO."""


def weights(base: RunConfig, data: Source) -> Mapping[str, Mapping[str, Any]]:
    """Return the blog's and a calibrated weight as groups of a study.

    Where no weight sets the decoder's variance there is one group, the weight of the exact ELBO.
    """
    if base.kl_normalization == "latent":
        raise UserError(
            "kl_normalization='latent' divides by the number of latents, so that one weight means "
            "another decoder variance at each; choose among pixels, batch, sum"
        )
    if not sets_variance(base):
        return {"exact ELBO's weight": {"kl_weight": exact(base, data).kl_weight}}
    named = {"blog's weight": BLOG_WEIGHT, "calibrated weight": data.calibrated}
    return {
        name: {"kl_weight": weighted(base, weight, data).kl_weight}
        for name, weight in named.items()
    }


def sets_variance(config: RunConfig) -> bool:
    """Say whether the KL weight sets the decoder's variance."""
    return config.sigma == "fixed" and config.likelihood == "gaussian"


def exact(config: RunConfig, data: Source) -> RunConfig:
    """Apply the weight at which beta is 1."""
    from harness.objective import beta  # loads torch

    return config.replace(kl_weight=1 / beta(config.replace(kl_weight=1.0), data.pixels))


def weighted(config: RunConfig, weight: float, data: Source) -> RunConfig:
    """Apply a KL weight of mode "pixels", in other modes the one that means the same variance."""
    return set_decoder_variance(config, weight / 2, data)


def set_condition(config: RunConfig, name: str, data: Source) -> RunConfig:
    """Apply a named condition; its weight is one of mode "pixels", as in `weighted`."""
    if name not in CONDITIONS:
        raise UserError(f"condition={name!r}: choose among {', '.join(CONDITIONS)}")
    changes = {"kl_weight": data.calibrated, **CONDITIONS[name]}
    weight = weighted(config, changes["kl_weight"], data).kl_weight
    return config.replace(**{**changes, "kl_weight": weight})


def set_decoder_variance(config: RunConfig, variance: float, data: Source) -> RunConfig:
    """Apply the KL weight that means a decoder variance in the configuration's normalisation."""
    from harness.objective import with_decoder_variance  # loads torch

    return with_decoder_variance(config, variance, data.pixels)


def pca_floor(run: Trained, data: Dataset) -> dict[str, float]:
    """Measure the test mse of a principal component projection onto as many dimensions.

    Of images that are too large for it, nothing.
    """
    from harness.linear.pca import is_small, pca  # loads torch

    if not is_small(data):
        return {}
    return {"test/pca_floor": pca(data).floor(data.test, run.config.latent_size)}
