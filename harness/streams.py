"""Stateless random streams: every draw is named, so no draw depends on what was drawn before.

A stream is keyed by (seed, purpose, epoch, latent size) and always drawn on the CPU; noise is drawn
in float32, and weights are rounded to it. So a run sees the same weights, batches and noise alone
or in a stack, on CPU or GPU, in float32 or float64, and from any epoch on without generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from harness.config import RunConfig


def generator(seed: int, purpose: str, epoch: int = 0, latent_size: int = 0) -> np.random.Generator:
    """Return the generator of one stream.

    The 128-bit key of NumPy's Philox (Salmon et al. 2011) is the head of SHA-256 of the stream's
    name; PyTorch's CPU generator would keep only 32 bits of it.

    Args:
        seed: the run's seed.
        purpose: what is drawn, e.g. "weights", "batches", "noise".
        epoch: epoch of the draw, 0 for draws that belong to none.
        latent_size: number of latents where the draw's shape depends on it, else 0.
    """
    name = f"{seed}/{purpose}/{epoch}/{latent_size}".encode()
    key = int.from_bytes(hashlib.sha256(name).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def batches(configs: Sequence[RunConfig], images: int, epoch: int) -> Tensor:
    """Draw the order in which each run sees the training images in an epoch.

    Returns:
        Indices, int64, shape (S, steps * batch_size), without repetition; what does not fill a
        batch is left out.
    """
    used = images - images % configs[0].batch_size
    orders = {
        seed: generator(seed, "batches", epoch).permutation(images)[:used]
        for seed in {c.seed for c in configs}
    }
    return torch.from_numpy(np.stack([orders[c.seed] for c in configs]))


def noise(
    configs: Sequence[RunConfig], purpose: str, images: int, epoch: int = 0, width: int = 0
) -> Tensor:
    """Draw standard normal noise for each run, each image and each latent.

    Returns:
        float32, shape (S, images, L) with L the largest latent size, or `width` if that is more;
        zero beyond a run's own latent size.
    """
    widest = max(width, *(c.latent_size for c in configs))
    out = np.zeros((len(configs), images, widest), dtype=np.float32)
    drawn: dict[tuple[int, int], np.ndarray] = {}
    for row, config in enumerate(configs):
        key = (config.seed, config.latent_size)
        if key not in drawn:
            stream = generator(config.seed, purpose, epoch, config.latent_size)
            drawn[key] = stream.standard_normal((images, config.latent_size), dtype=np.float32)
        out[row, :, : config.latent_size] = drawn[key]
    return torch.from_numpy(out)
