"""Pictures of what a model does, as image arrays: uint8, (height, width) or (height, width, 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from harness import objective, streams
from harness.data.dataset import Dataset, Split
from harness.evaluate import posteriors
from harness.vae import VAE, SingleVAE

CELL = 56
"""Least side of one image on a picture, in screen pixels; small images are enlarged."""


@torch.no_grad()
def reconstructions(model: VAE, split: Split, images: int = 10) -> list[np.ndarray]:
    """Draw, for each run of a stack, originals above their reconstructions from the mean.

    Returns:
        One picture per run: two rows, as many columns as images.
    """
    x = split.pixels(slice(images), model.dtype)
    decoded = model.decode(model.encode(x.expand(len(model.configs), -1, -1)).mean)
    return [grid(torch.stack([x, one]), model.image_shape) for one in decoded]


@torch.no_grad()
def reconstruction_rows(models: Sequence[SingleVAE], split: Split, images: int = 10) -> np.ndarray:
    """Draw originals in the first row and each model's reconstructions in a row below."""
    x = split.pixels(slice(images), models[0].dtype).cpu()
    return grid(torch.stack([x, *(model(x) for model in models)]), models[0].image_shape)


@torch.no_grad()
def sample_rows(models: Sequence[SingleVAE], columns: int = 10) -> np.ndarray:
    """Draw decoder means of z from N(0, I), a model a row; equal seed and size, equal z."""
    return np.concatenate([prior_samples(model, 1, columns) for model in models])


@torch.no_grad()
def prior_samples(model: SingleVAE, rows: int = 4, columns: int = 10) -> np.ndarray:
    """Draw decoder means of z from N(0, I); the same z at every call for one seed and size."""
    config = model.config
    stream = streams.generator(config.seed, "prior", latent_size=config.latent_size)
    drawn = stream.standard_normal((rows * columns, config.latent_size), dtype=np.float32)
    decoded = model.decode(torch.from_numpy(drawn).to(model.dtype))
    return grid(decoded.unflatten(0, (rows, columns)), model.image_shape)


@torch.no_grad()
def traversals(model: SingleVAE, data: Dataset, span: float = 3.0, columns: int = 9) -> np.ndarray:
    """Draw one row per latent: that latent from -span to span, the others at 0.

    Rows are ordered by the latent's KL over the validation images, largest first; without KL, of a
    deterministic latent, by the variance of its mean.
    """
    posterior = posteriors(VAE([model]), data.val)
    means, log_variances = posterior.mean[0], posterior.log_variance[0]
    if model.config.latent == "deterministic":
        said = means.var(0, correction=0)
    else:
        said = objective.kl_per_latent(means, log_variances).mean(0)
    steps = torch.linspace(-span, span, columns, dtype=model.dtype)
    z = torch.zeros(len(said), columns, len(said), dtype=steps.dtype)
    for row, latent in enumerate(said.argsort(descending=True)):
        z[row, :, latent] = steps
    decoded = model.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    return grid(decoded, model.image_shape)


@torch.no_grad()
def interpolations(model: SingleVAE, split: Split, rows: int = 5, columns: int = 9) -> np.ndarray:
    """Draw straight lines between the posterior means of pairs of images, a pair a row.

    Fewer rows if the split has fewer pairs.
    """
    rows = min(rows, len(split) // 2)
    x = split.pixels(slice(2 * rows), model.dtype).cpu()
    first, last = model.encode(x).mean.chunk(2)
    share = torch.linspace(0, 1, columns, dtype=x.dtype).reshape(1, -1, 1)
    z = torch.lerp(first.unsqueeze(1), last.unsqueeze(1), share)
    decoded = model.decode(z.flatten(0, 1)).unflatten(0, (rows, columns))
    return grid(decoded, model.image_shape)


def grid(images: Tensor, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Lay images out with a white line between them.

    Args:
        images: pixels, clipped to [0, 1], shape (rows, columns, D).
        image_shape: (channels, height, width); one channel gives a grey picture.

    Returns:
        uint8, shape (H, W) or (H, W, 3).
    """
    rows, columns = images.shape[:2]
    pixels = images.detach().cpu().float().clamp(0, 1).reshape(rows, columns, *image_shape)
    zoom = max(1, CELL // min(image_shape[1:]))
    pixels = pixels.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    framed = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=1.0)
    channels, height, width = framed.shape[2:]
    picture = framed.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    array = (picture * 255).round().to(torch.uint8).numpy()
    return array[..., 0] if channels == 1 else array
