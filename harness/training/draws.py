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

    def at(self, step: int) -> Draw:
        """Return the draws of one step, without the axis of steps."""
        return Draw(*(None if part is None else part[step] for part in self))  # type: ignore[arg-type]

    def to(self, like: Tensor) -> Draw:
        """Return the draw on the device of a tensor, its floating-point numbers in its type."""
        return map_tensors(
            lambda own: own.to(like if own.is_floating_point() else like.device), self
        )


def draw(configs: Sequence[RunConfig], images: Split, epoch: int) -> tuple[Split, list[Draw]]:
    """Return the images of an epoch, counted from 1, and the draws of each run, on the CPU.

    Random pixels are drawn anew every epoch; the images then hold a copy for each seed.
    """
    pixels, steps = images.images.shape[1], len(images) // configs[0].batch_size
    of_seed = {config.seed: config for config in configs}
    drawn = {seed: _streams(config, len(images), epoch) for seed, config in of_seed.items()}
    first_rows = dict.fromkeys(drawn, 0)
    if configs[0].binarization == "stochastic":
        first_rows = {seed: k * len(images) for k, seed in enumerate(drawn)}
        own = [streams.generator(seed, "binarize", epoch) for seed in drawn]
        copies = [images.binarized("stochastic", stream).images for stream in own]
        images = replace(images, images=torch.cat(copies), largest=1)
    done = (epoch - 1) * steps + torch.arange(steps, dtype=torch.float64)
    draws = []
    for config in configs:
        order, noise, prior = drawn[config.seed]
        betas = objective.kl_warmup(config, epoch, steps) * objective.beta(config, pixels)
        progress = done / (config.epochs * steps)
        draws.append(Draw(order + first_rows[config.seed], noise, betas, progress, prior))
    return images, draws


def _streams(config: RunConfig, images: int, epoch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the order, the noise and the prior of a `Draw`, which a run's seed fixes."""
    size = config.batch_size

    def latents(purpose: str) -> Tensor:
        whole = images - images % size
        noise = streams.noise(config.seed, purpose, whole, config.latent_size, epoch)
        return noise.view(-1, size, config.latent_size)

    order = streams.batches(config, images, epoch).view(-1, size)
    return order, latents("noise"), latents("prior") if config.terms else None
