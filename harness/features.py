"""A small convolutional classifier, trained here and kept in a cache: the features of a dataset.

Distances between sets of images are taken between its features, which tell classes apart, rather
than between pixels. It is a function of the training split and of the constants below: trained on
the CPU by one thread, so that it does not depend on the number of cores.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness import doing, networks, streams
from harness.cores import one_thread
from harness.data.dataset import Dataset, Split
from harness.data.validate import digest
from harness.places import project_root

CHANNELS = (16, 32)
"""Channels of the two convolutions, each 3 x 3 with stride 2."""

FEATURES = 64
"""Width of the feature layer F."""

STEPS, EPOCHS = 1_200, 40
"""Length of the training: at most so many steps, and at most so many epochs."""

BATCH, LEARNING_RATE = 128, 5e-3
"""Images per step; Adam's step size at first, which falls linearly to 0."""

VERSION = 1
"""To be raised with any change of architecture or training that the constants do not show."""

RECIPE = {
    "version": VERSION,
    "channels": CHANNELS,
    "features": FEATURES,
    "steps": STEPS,
    "epochs": EPOCHS,
    "batch": BATCH,
    "learning_rate": LEARNING_RATE,
}
"""What a cached classifier is a function of, beside the training split."""


class Classifier(nn.Module):
    """Two convolutions of stride 2, a layer of F = 64 features, and a linear layer on their ReLU.

    Args:
        image_shape: (channels, height, width); below 8 x 8 hardly more than one place is left.
        classes: number of classes.
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.image_shape = image_shape
        channels, height, width = image_shape
        first, second = CHANNELS
        places = math.prod(-(-side // 4) for side in (height, width))
        self.features = nn.Sequential(
            nn.Conv2d(channels, first, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(second * places, FEATURES),
        )
        self.head = nn.Linear(FEATURES, classes)

    def embed(self, images: Tensor) -> Tensor:
        """Map images (B, D), clipped to [0, 1], to their features before the ReLU, (B, F)."""
        return self.features(images.float().clamp(0, 1).unflatten(1, self.image_shape))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, D) to unnormalised log-probabilities of the classes, (B, classes)."""
        return self.head(self.embed(images).relu())


def classifier(data: Dataset, folder: Path | None = None) -> Classifier:
    """Return the classifier of a dataset's training split, from the cache if it is there.

    Args:
        data: the dataset; its training images, their labels and the constants of this module are
            the key of the cache, since a dataset that was cut has its source's digest.
        folder: of the cache; None means `cache/features` in the repository. A file in it that
            cannot be read is written anew; a folder that cannot be written to is left alone.
    """
    folder = folder or project_root() / "cache" / "features"
    train = data.train.to(torch.device("cpu"))
    file = folder / f"{data.name}-{_key(data, train)}.safetensors"
    net = _untrained(data)
    try:
        net.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError):
        doing.say(f"training the classifier behind frechet on {data.name}, once a dataset")
        net = _trained(_untrained(data), train)
        with contextlib.suppress(OSError):
            _save(net, file)
    return net


def _key(data: Dataset, train: Split) -> str:
    about = [RECIPE, data.image_shape, data.classes, train.largest, len(train)]
    return digest(train.images, train.labels, about=json.dumps(about))[:32]


def _untrained(data: Dataset) -> Classifier:
    """Return the net with weights and biases U(-1, 1) / sqrt(inputs), PyTorch's default."""
    with torch.random.fork_rng(devices=[]):  # leaves PyTorch's global random state alone
        net = Classifier(data.image_shape, data.classes)
    stream = streams.generator(0, "features/weights")
    networks.draw([*networks.layers(net.features), net.head], stream)
    return net


@torch.enable_grad()  # whoever asks may be measuring
def _trained(net: Classifier, train: Split) -> Classifier:
    """Train with cross-entropy, then scale the features to a mean variance of 1 over the images."""
    batches = list(itertools.islice(_batches(len(train)), STEPS))
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    with one_thread():
        for rows in batches:
            logits = net(train.pixels(rows, torch.float32))
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, train.labels[rows]).backward()
            optimizer.step()
            schedule.step()
        _normalize(net, train.head(10 * BATCH))
    return net


@torch.no_grad()
def _normalize(net: Classifier, split: Split) -> None:
    """Divide the features by one number and multiply what follows by it: no class changes."""
    scale = net.embed(split.pixels(slice(None), torch.float32)).var(0).mean().sqrt()
    for parameter in net.features[-1].parameters():
        parameter.div_(scale)
    net.head.weight.mul_(scale)


def _batches(images: int) -> Iterator[Tensor]:
    """Yield the rows of each step: epoch after epoch, what does not fill a batch left out."""
    size = min(BATCH, images)
    for epoch in range(EPOCHS):
        order = streams.generator(0, "features/batches", epoch).permutation(images)
        yield from torch.from_numpy(order[: images - images % size]).split(size)


def _save(net: Classifier, file: Path) -> None:
    """Write the weights beside their place and move them there, so that no reader sees half."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(net.state_dict(), beside, metadata={"recipe": json.dumps(RECIPE)})
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
