"""Pictures of a model's images, as arrays: uint8, (height, width) or (height, width, 3)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from harness import objective
from harness.data.dataset import Dataset, Split
from harness.metrics.evaluate import pixels, posteriors
from harness.models.stack import kernels
from harness.models.vae import VAE

CELL = 56  # least side of one image on a picture, in screen pixels; small images are enlarged


@kernels()
def reconstructions(models: Sequence[VAE], split: Split, images: int = 10) -> np.ndarray:
    """Draw originals above their reconstructions from the posterior mean, a model a row."""
    x = pixels(models[0], split, slice(images))
    return grid(torch.stack([x, *(model.reconstruct(x) for model in models)]))


def sample_rows(models: Sequence[VAE], seed: int = 0, columns: int = 10) -> np.ndarray:
    """Draw decoder means of z from N(0, I), a model a row; equal latent sizes have equal z."""
    return np.concatenate([prior_samples(model, seed, 1, columns) for model in models])


@kernels()
def prior_samples(model: VAE, seed: int, rows: int = 4, columns: int = 10) -> np.ndarray:
    """Draw decoder means of z from N(0, I); the same z at every call for one seed and size."""
    return grid(model.sample(rows * columns, seed=seed).unflatten(0, (rows, columns)))


@kernels()
@torch.no_grad()
def traversals(model: VAE, data: Dataset, span: float = 3.0, columns: int = 9) -> np.ndarray:
    """Draw one row per latent: that latent from -span to span, the others at 0.

    Rows are ordered by the latent's KL, largest first; without KL by the variance of its mean.
    """
    mean, log_variance = posteriors(model, data.val)
    if model.latent == "deterministic":
        order = mean.var(0, correction=0).argsort(descending=True)
    else:
        order = objective.kl_per_latent(mean, log_variance).mean(0).argsort(descending=True)
    z = mean.new_zeros(len(order), columns, len(order))
    for row, latent in enumerate(order):
        z[row, :, latent] = torch.linspace(-span, span, columns)
    return grid(model.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2]))


@kernels()
def interpolations(model: VAE, split: Split, rows: int = 5, columns: int = 9) -> np.ndarray:
    """Draw straight lines between the posterior means of pairs of images, a pair a row."""
    first, second = pixels(model, split, slice(2 * min(rows, len(split) // 2))).chunk(2)
    return grid(model.interpolate(first, second, columns))


def grid(images: Tensor) -> np.ndarray:
    """Lay images (rows, columns, channels, height, width) out with a white line between them."""
    rows, columns = images.shape[:2]
    zoom = max(1, CELL // min(images.shape[3:]))
    cells = images.detach().cpu().float().clamp(0, 1)
    cells = cells.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    framed = torch.nn.functional.pad(cells, (1, 1, 1, 1), value=1.0)
    channels, height, width = framed.shape[2:]
    picture = framed.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    array = (picture * 255).round().to(torch.uint8).numpy()
    return array[..., 0] if channels == 1 else array
