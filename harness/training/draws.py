"""What an epoch of training takes from the data and from the random streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from harness import objective, streams
from harness.config import RunConfig
from harness.data.dataset import Split
from harness.models.stack import map_tensors


class Draw(NamedTuple):
    """The draws of one epoch; those of a stack have an axis S behind that of steps.

    Attributes:
        order: rows of the images, int64, shape (steps, B).
        noise: of the posterior samples, shape (steps, B, L).
        betas: weight of the rate, shape (steps,).
        progress: of training, in [0, 1], shape (steps,).
        prior: latents from N(0, I) for loss terms, shape (steps, B, L); None without terms.
    """

    order: Tensor
    noise: Tensor
    betas: Tensor
    progress: Tensor
    prior: Tensor | None

    def to(self, like: Tensor) -> Draw:
        """Return the draw on the device of a tensor, its floating-point numbers in its type."""
        return map_tensors(
            lambda own: own.to(like if own.is_floating_point() else like.device), self
        )


def draw(
    configs: Sequence[RunConfig], images: Split, epoch: int, *, stacked: bool
) -> tuple[Split, Draw]:
    """Return the images of an epoch and the draws of a run, or of the runs of a stack.

    Random pixels are drawn anew every epoch; a stack then has a copy of the images for each seed.

    Args:
        configs: one run, or those of a stack.
        images: training images.
        epoch: counted from 1.
        stacked: whether the draws are those of a stack.
    """
    by_seed = {config.seed: _draw(config, images, epoch) for config in configs}
    first_rows = dict.fromkeys(by_seed, 0)
    if configs[0].binarization == "stochastic":
        first_rows = {seed: k * len(images) for k, seed in enumerate(by_seed)}
        own = [streams.generator(seed, "binarize", epoch) for seed in by_seed]
        copies = [images.binarized("stochastic", stream).images for stream in own]
        images = replace(images, images=torch.cat(copies), largest=1)
    draws = [
        by_seed[c.seed]._replace(
            order=by_seed[c.seed].order + first_rows[c.seed], betas=_betas(c, images, epoch)
        )
        for c in configs
    ]
    return images, map_tensors(lambda *each: torch.stack(each, 1), *draws) if stacked else draws[0]


def _draw(config: RunConfig, images: Split, epoch: int) -> Draw:
    batch, steps = config.batch_size, len(images) // config.batch_size
    drawn = {
        purpose: streams.noise(config.seed, purpose, steps * batch, config.latent_size, epoch)
        for purpose in ("noise", "prior")
        if purpose == "noise" or config.terms
    }
    done = (epoch - 1) * steps + torch.arange(steps, dtype=torch.float64)
    return Draw(
        streams.batches(config, len(images), epoch).view(steps, batch),
        drawn["noise"].view(steps, batch, -1),
        _betas(config, images, epoch),
        done / (config.epochs * steps),
        drawn["prior"].view(steps, batch, -1) if config.terms else None,
    )


def _betas(config: RunConfig, images: Split, epoch: int) -> Tensor:
    warmup = objective.kl_warmup(config, epoch, len(images) // config.batch_size)
    return warmup * objective.beta(config, images.images.shape[1])
