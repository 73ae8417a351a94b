"""Stateless random streams of one run: no draw depends on earlier draws.

A stream is keyed by (seed, purpose, epoch, latent size) and always drawn on the CPU; noise is drawn
in float32, and weights are rounded to it. So a run has the same weights, batches and noise alone
or in a stack, on CPU or GPU, in float32 or float64, and from any epoch on without generator state.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from harness.config import RunConfig


def generator(seed: int, purpose: str, epoch: int = 0, latent_size: int = 0) -> np.random.Generator:
    """Return the generator of the stream of a run's seed and a purpose, e.g. "weights" or "noise".

    The 128-bit key of NumPy's Philox (Salmon et al. 2011) is the head of SHA-256 of its name.
    """
    name = f"{seed}/{purpose}/{epoch}/{latent_size}".encode()
    key = int.from_bytes(hashlib.sha256(name).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def batches(config: RunConfig, images: int, epoch: int) -> Tensor:
    """Return the order of training images in the whole batches of an epoch: int64, (steps B,)."""
    order = generator(config.seed, "batches", epoch).permutation(images)
    return torch.from_numpy(order[: images - images % config.batch_size])


def noise(seed: int, purpose: str, images: int, latent_size: int, epoch: int = 0) -> Tensor:
    """Return standard normal noise of a run, float32, shape (images, L)."""
    return normal(generator(seed, purpose, epoch, latent_size), images, latent_size)


def normal(stream: np.random.Generator, images: int, latent_size: int) -> Tensor:
    """Return the next standard normal numbers of a stream, float32, shape (images, L)."""
    return torch.from_numpy(stream.standard_normal((images, latent_size), dtype=np.float32))
