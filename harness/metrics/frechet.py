"""Fréchet distances between the features of generated and of real images.

Two sets of images are compared as Gaussians in the feature space of a small convolutional
classifier, trained on the CPU by one thread, so that it depends on the training split and on the
constants below alone. With the features of another network the distance is the FID (Heusel et al.
2017, 1706.08500), whose numbers, as those of another dataset, cannot be compared with these.
"""

import contextlib
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim.adam import adam

from harness import streams
from harness.config import RunConfig
from harness.data.dataset import Dataset, Split, digest
from harness.metrics.evaluate import chunks, pixels
from harness.models import networks
from harness.models.files import put_sealed, read_sealed
from harness.models.stack import kernels
from harness.models.vae import VAE
from harness.processes import one_thread

log = logging.getLogger(__name__)

IMAGES = 10_000  # of a set, at most; compared sets have equal size, since few images have a bias

VERSION = 1  # of the classifier: raise it with any change that the constants below do not show
CHANNELS, FEATURES = (16, 32), 64
STEPS, EPOCHS = 1_200, 40  # the training ends with the first of the two
BATCH, LEARNING_RATE = 128, 5e-3  # Adam's step size falls linearly to 0
RECIPE = (VERSION, CHANNELS, FEATURES, STEPS, EPOCHS, BATCH, LEARNING_RATE)


class Gaussian(NamedTuple):
    """Mean (F,) and covariance (F, F) of a set's features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(embedded: Tensor) -> Gaussian:
    """Return mean and covariance (1/N) of features of shape (N, F)."""
    values = embedded.cpu().double().numpy()
    mean = values.mean(0)
    centred = values - mean
    return Gaussian(mean, centred.T @ centred / len(values))


def distance(first: Gaussian, second: Gaussian) -> float:
    """Return the Fréchet distance of two Gaussians: ||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    NaN if a moment is not finite. The trace of the root is the sum of the singular values of
    C1^(1/2) C2^(1/2). (Dowson & Landau 1982.)
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


class Classifier(nn.Module):
    """Two convolutions of stride 2, a layer of F features, and a linear layer on their ReLU."""

    def __init__(self, image_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        # An encoder, whose FEATURES outputs are here no posterior's.
        self.features, _ = networks.conv(image_shape, FEATURES // 2, channels=CHANNELS)
        self.head = nn.Linear(FEATURES, classes)

    def embed(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W), clipped to [0, 1], to their features before the ReLU, (B, F)."""
        return self.features(images.float().clamp(0, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to unnormalised log-probabilities of the classes."""
        return self.head(self.embed(images).relu())


def user_cache() -> Path | None:
    """Return the folder where studies keep classifiers, in XDG_CACHE_HOME or ~/.cache, if any."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return base / "vae-sweep-harness" if base.is_absolute() else None


def classifier(data: Dataset, folder: Path | None = None) -> Classifier:
    """Return the classifier of a dataset's training split, from the folder if it is there."""
    if folder is None:
        return _trained(data)
    # Not the dataset's digest, which is that of its source even when it was cut.
    train = data.train.to(torch.device("cpu"))
    about = [RECIPE, data.image_shape, data.classes, train.largest, len(train)]
    key = digest(train.images, train.labels, about=json.dumps(about))[:32]
    file = folder / f"{data.name}-{key}.classifier"
    try:
        net = _untrained(data)
        net.load_state_dict(load(read_sealed(file)))
    except (OSError, ValueError, SafetensorError, RuntimeError):
        net = _trained(data)
        with contextlib.suppress(OSError):  # the folder is a cache
            folder.mkdir(parents=True, exist_ok=True)
            put_sealed(file, save(net.state_dict()))
    return net


def _untrained(data: Dataset) -> Classifier:
    with torch.random.fork_rng(devices=[]):  # leaves PyTorch's global random state alone
        net = Classifier(data.image_shape, data.classes)
    networks.draw((*net.features, net.head), streams.generator(0, "features/weights"))
    return net


@torch.enable_grad()  # the caller may compute without
def _trained(data: Dataset) -> Classifier:
    log.info("training the classifier of the Fréchet distances on %s, once a dataset", data.name)
    net, train = _untrained(data), data.train.to(torch.device("cpu"))
    batches = list(itertools.islice(_batches(len(train)), STEPS))
    # The function of torch.optim.Adam, which imports torch.compile at its first use, for seconds.
    weights: list[Tensor] = [*net.parameters()]
    lr = LEARNING_RATE
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    counts = [torch.zeros(()) for _ in weights]
    same: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    same |= {"amsgrad": False, "maximize": False, "foreach": False}
    with one_thread():
        for done, rows in enumerate(batches):
            loss = nn.functional.cross_entropy(net(_images(data, train, rows)), train.labels[rows])
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                adam(weights, [*gradients], first, second, [], counts, lr=lr, **same)
            lr *= 1 - 1 / (len(batches) - done)  # as LinearLR(optimizer, 1.0, 0.0, len(batches))
        _normalize(net, _images(data, train, slice(10 * BATCH)))
    return net


@torch.no_grad()
def _normalize(net: Classifier, images: Tensor) -> None:
    # To a mean variance of 1 over the images; the next layer takes the factor, so no class changes.
    scale = net.embed(images).var(0).mean().sqrt()
    for parameter in net.features[-1].parameters():
        parameter.div_(scale)
    net.head.weight.mul_(scale)


def _batches(images: int) -> Iterator[Tensor]:
    size = min(BATCH, images)
    for epoch in range(EPOCHS):
        order = streams.generator(0, "features/batches", epoch).permutation(images)
        yield from torch.from_numpy(order[: images - images % size]).split(size)


def _images(data: Dataset, split: Split, rows: Tensor | slice) -> Tensor:
    return split.pixels(rows, torch.float32).unflatten(1, data.image_shape)


class Reference(NamedTuple):
    """The real images of a dataset, which the images of its runs are compared with."""

    net: Classifier  # on the data's device
    test: Gaussian  # features of the first test images
    images: int  # of every set
    floor: float  # distance from as many training images
    accuracy: float  # share of those test images that the classifier assigns to their class


@kernels()
@torch.no_grad()
def reference(data: Dataset, folder: Path | None = None) -> Reference:
    """Return the reference of a dataset; `folder` is that of its `classifier`."""
    device = data.test.labels.device
    net = classifier(data, folder).to(device)
    images = min(len(data.test), len(data.train), IMAGES)
    known, seen = (part.head(images).loaded(device) for part in (data.test, data.train))
    with one_thread():
        test, train = (_embed(net, part, partial(_images, data, part)) for part in (known, seen))
        guesses = net.head(test.relu()).argmax(1)
    accuracy = float((guesses == known.labels).double().mean())
    floor = distance(moments(train), moments(test))
    return Reference(net, moments(test), images, floor, accuracy)


@kernels()
@torch.no_grad()
def measure_images(
    config: RunConfig, model: VAE, data: Dataset, known: Reference
) -> dict[str, float]:
    """Compare the images that a run draws, and its reconstructions, with the test images."""
    split = data.test.head(known.images)
    eps = streams.noise(config.seed, "frechet", known.images, config.latent_size)
    z = eps.to(model.device, model.dtype)
    drawn = _embed(known.net, split, lambda rows: model.decoder_mean(z[rows]))
    again = _embed(known.net, split, lambda rows: model(pixels(model, split, rows)))
    return {
        "frechet": distance(moments(drawn), known.test),
        "frechet_reconstructions": distance(moments(again), known.test),
        "frechet_floor": known.floor,
        "feature_accuracy": known.accuracy,
    }


def _embed(net: Classifier, split: Split, draw: Callable[[slice], Tensor]) -> Tensor:
    return torch.cat([net.embed(draw(rows)) for rows in chunks(*split.images.shape)])
