"""What an epoch of training takes from the data and from the random streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness import objective, streams
from harness.config import RunConfig
from harness.data.dataset import Split


class Draw(NamedTuple):
    """All that one epoch of a run takes from the data and the random streams.

    That of a stack has an axis S behind the axis of steps.

    Attributes:
        images: training images, uint8, shape (N, D).
        largest: grey value that stands for 1.
        order: rows of the images, int64, shape (steps, B).
        noise: of the posterior samples, shape (steps, B, L).
        betas: weight of the rate at each step, shape (steps,).
        progress: of training at each step, in [0, 1], shape (steps,).
        prior: latents from N(0, I) for loss terms, shape (steps, B, L); None without terms.
        epoch: counted from 1.
    """

    images: Tensor
    largest: int
    order: Tensor
    noise: Tensor
    betas: Tensor
    progress: Tensor
    prior: Tensor | None
    epoch: int

    def by_step(self) -> dict[str, Tensor]:
        """Return all tensors that have an axis of steps."""
        names = ("order", "noise", "betas", "progress", "prior")
        return {name: v for name in names if (v := getattr(self, name)) is not None}

    def to(self, like: Tensor) -> Draw:
        """Return the draw on the device of a tensor, its floating-point numbers in its type."""
        moved: dict[str, Any] = {
            name: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
            for name, value in self.by_step().items()
        }
        return self._replace(**moved)


def draw(config: RunConfig, images: Split, epoch: int) -> Draw:
    """Return the draw of a run; its random pixels are drawn anew every epoch.

    Args:
        config: the run.
        images: training images.
        epoch: counted from 1.
    """
    batch, steps = config.batch_size, len(images) // config.batch_size
    size = len(images)
    if config.binarization == "stochastic":
        stream = streams.generator(config.seed, "binarize", epoch)
        images = images.binarized("stochastic", stream)

    def noise(purpose: str) -> Tensor:
        drawn = streams.noise(config.seed, purpose, steps * batch, config.latent_size, epoch)
        return drawn.view(steps, batch, -1)

    done = (epoch - 1) * steps + torch.arange(steps, dtype=torch.float64)
    return Draw(
        images.images,
        images.largest,
        streams.batches(config, size, epoch).view(steps, batch),
        noise("noise"),
        _betas(config, images, epoch),
        done / (config.epochs * steps),
        noise("prior") if config.terms else None,
        epoch,
    )


def draw_stack(configs: Sequence[RunConfig], images: Split, epoch: int) -> Draw:
    """Return the draws of the runs of a stack as one; runs with equal seeds share theirs.

    Random pixels differ between seeds: there is a copy of the images for each.
    """
    by_seed = {config.seed: draw(config, images, epoch) for config in configs}
    draws = [by_seed[config.seed] for config in configs]
    copies = list({id(one.images): one.images for one in draws}.values())
    first_rows = {id(copy): k * len(images) for k, copy in enumerate(copies)}
    betas = [_betas(config, images, epoch) for config in configs]
    priors = [one.prior for one in draws if one.prior is not None]
    return draws[0]._replace(
        images=copies[0] if len(copies) == 1 else torch.cat(copies),
        order=torch.stack([one.order + first_rows[id(one.images)] for one in draws], 1),
        noise=torch.stack([one.noise for one in draws], 1),
        betas=torch.stack(betas, 1),
        progress=torch.stack([one.progress for one in draws], 1),
        prior=torch.stack(priors, 1) if priors else None,
    )


def _betas(config: RunConfig, images: Split, epoch: int) -> Tensor:
    """Return the weight of the rate at each step of an epoch, float64, shape (steps,)."""
    warmup = objective.kl_warmup(config, epoch, len(images) // config.batch_size)
    return warmup * objective.beta(config, images.images.shape[1])
