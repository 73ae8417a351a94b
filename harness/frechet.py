"""How near generated images are to real ones: Frechet distances between their features.

Two sets of images are compared as Gaussians in the feature space of `features.classifier`. With
the features of another network this is the FID (Heusel et al. 2017, 1706.08500); its numbers cannot
be compared with these, nor those of one dataset with another's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness import features, streams
from harness.cores import one_thread
from harness.data.dataset import Dataset, Split
from harness.evaluate import chunks
from harness.nn import steady_convolutions
from harness.vae import VAE

IMAGES = 10_000
"""Images of a set, at most. Sets that are compared have equal size, for few images have a bias."""


class Gaussian(NamedTuple):
    """Mean (F,) and covariance (F, F) of a set's features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(embedded: np.ndarray) -> Gaussian:
    """Return mean and covariance (1/N) of features of shape (N, F)."""
    embedded = np.asarray(embedded, dtype=np.float64)
    mean = embedded.mean(0)
    centred = embedded - mean
    return Gaussian(mean, centred.T @ centred / len(embedded))


def distance(first: Gaussian, second: Gaussian) -> float:
    """Frechet distance of two Gaussians: ||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    It is the squared 2-Wasserstein distance. The trace of the root is the sum of the singular
    values of C1^(1/2) C2^(1/2). (Dowson & Landau 1982; Heusel et al. 2017, 1706.08500.)

    Returns:
        Squared unit of the features, never negative beyond rounding; NaN if a moment is not finite.
    """
    if not all(np.isfinite(part).all() for part in (*first, *second)):
        return math.nan
    roots = (_root(gaussian.covariance) for gaussian in (first, second))
    shared = np.linalg.svd(np.matmul(*roots), compute_uv=False).sum()
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * shared
    return float(np.square(first.mean - second.mean).sum() + spread)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(values.clip(min=0)) @ vectors.T


@dataclass(frozen=True)
class Reference:
    """What the images of a dataset's runs are compared with.

    Attributes:
        net: the classifier whose features are compared, on the data's device.
        test: moments of the features of the first test images.
        images: number of images of every set, at most 10,000.
        floor: distance from as many training images, in the variance of a feature over training
            images, mean over the F features.
        accuracy: share of those test images that the classifier tells right.
    """

    net: features.Classifier = field(repr=False)
    test: Gaussian = field(repr=False)
    images: int
    floor: float
    accuracy: float


@torch.no_grad()
def reference(data: Dataset, folder: Path | None = None) -> Reference:
    """Return what generated images are compared with; `folder` is that of the cached classifier."""
    net = features.classifier(data, folder).to(data.test.images.device)
    images = min(len(data.test), len(data.train), IMAGES)
    known, others = data.test.head(images), data.train.head(images)
    with one_thread():
        test, train = (_embed(net, _real(split)).squeeze(0) for split in (known, others))
        guesses = net.head(test.relu()).argmax(1)
    accuracy = float((guesses == known.labels).double().mean())
    floor = distance(_moments(train), _moments(test))
    return Reference(net, _moments(test), images, floor, accuracy)


@torch.no_grad()
def measure_images(model: VAE, data: Dataset, known: Reference) -> list[dict[str, float]]:
    """Compare what each run draws, and how it reconstructs, with the test images.

    Args:
        model: the stack.
        data: its dataset, on the model's device.
        known: `reference` of that dataset.

    Returns:
        One dict per run. `frechet`: decoder means of latents drawn from N(0, I), as many as test
        images, with the noise that the seed fixes; `frechet_reconstructions`: test images decoded
        from their posterior means; `frechet_floor`, `feature_accuracy`: of the reference.
    """
    split = data.test.head(known.images)
    eps = streams.noise(model.configs, "frechet", known.images, width=model.latent_size)
    z = eps.to(model.device, model.dtype)

    def sample(rows: slice) -> Tensor:
        return model.decode(z[:, rows])

    def reconstruct(rows: slice) -> Tensor:
        x = split.pixels(rows, model.dtype).expand(len(model.configs), -1, -1)
        return model.decode(model.encode(x).mean)

    rows = [*chunks(*split.images.shape)]
    drawn = {"frechet": sample, "frechet_reconstructions": reconstruct}
    sets = {name: _embed(known.net, map(draw, rows)) for name, draw in drawn.items()}
    same = {"frechet_floor": known.floor, "feature_accuracy": known.accuracy}
    return [
        {name: distance(_moments(every[run]), known.test) for name, every in sets.items()} | same
        for run in range(len(model.configs))
    ]


def _real(split: Split) -> Iterator[Tensor]:
    for rows in chunks(*split.images.shape):
        yield split.pixels(rows, torch.float32).unsqueeze(0)


def _embed(net: features.Classifier, images: Iterator[Tensor]) -> Tensor:
    """Return the features (S, N, F) of chunks of images (S, B, D), one run at a time."""
    with steady_convolutions():
        found = [torch.stack([net.embed(run) for run in chunk]) for chunk in images]
    return torch.cat(found, dim=1)


def _moments(embedded: Tensor) -> Gaussian:
    return moments(embedded.cpu().numpy())
