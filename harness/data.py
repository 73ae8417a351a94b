"""Image datasets as uint8 tensors that live on the training device, split once and for all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.config import Binarization, UserError, checked_name
from harness.official import TORCHVISION, read_official
from harness.streams import generator
from harness.tensors import (
    PARTS,
    SPLIT_SEED,
    as_images,
    as_labels,
    digest,
    split_rows,
)

DIGITS_SPLIT = (1280, 256)
"""Training and validation images of digits; the other 261 of the 1,797 are for testing."""

VALIDATION_IMAGES = 5_000
"""Taken from the 60,000 training images of the MNIST family, whose own test split is kept."""

LONGEST_NAME = 60
"""Characters of a dataset's name, which becomes part of a study's."""

CHUNK = 1_000
"""Images that are made floating-point numbers at once."""

DATASETS = ("digits", *TORCHVISION)
FOLDER = "folder:"
"""What stands before the path of a folder of images in the name that `load_dataset` is given."""


@dataclass(frozen=True)
class Split:
    """Images and labels of one part of a dataset.

    Attributes:
        images: uint8, shape (N, D).
        labels: class of each image, int64, shape (N,); 0 if the dataset has no classes.
        largest: grey value that stands for 1.
    """

    images: Tensor
    labels: Tensor
    largest: int

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of these very images: a dataset that was cut has its source's digest."""
        return digest(self.images, about=f"{tuple(self.images.shape)}/{self.largest}/")

    def pixels(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Return the chosen images as pixels in [0, 1]; `rows` of shape (...) gives (..., D)."""
        return self.images[rows].to(dtype) / self.largest

    def head(self, images: int) -> Split:
        """Return the first images of the split, which is in random order."""
        return replace(self, images=self.images[:images], labels=self.labels[:images])

    def binarized(self, kind: Binarization, stream: np.random.Generator | None = None) -> Split:
        """Return the split with pixels 0 or 1.

        "threshold": 1 from half the largest grey value on; "stochastic": 1 with the pixel's value
        as probability, drawn from the stream (Salakhutdinov & Murray 2008); "none": as it is.
        """
        if kind == "none":
            return self
        levels = np.full(1, (self.largest + 1) // 2 - 1, dtype=np.uint8)
        if kind == "stochastic":
            assert stream is not None
            shape = tuple(self.images.shape)
            levels = stream.integers(self.largest, size=shape, dtype=np.uint8)
        ones = self.images > torch.from_numpy(levels).to(self.images.device)
        return replace(self, images=ones.to(torch.uint8), largest=1)

    def to(self, device: torch.device) -> Split:
        """Return the split with its tensors on the device."""
        if self.images.device == device:
            return self
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A dataset in three fixed parts.

    Attributes:
        name: as given to `load_dataset` or `from_tensors`; of own images "folder-NAME".
        image_shape: (channels, height, width).
        classes: number of classes; 0 for images without labels.
        train: what is trained on.
        val: what settings are chosen on.
        test: what is read once, at the end.
        digest: SHA-256 of the pixels of all images, in the source's order; of own images, whose
            parts and labels a name does not fix, of these too.
        class_names: of own images; else () and classes are numbers.
    """

    name: str
    image_shape: tuple[int, int, int]
    classes: int
    train: Split
    val: Split
    test: Split
    digest: str
    class_names: tuple[str, ...] = ()

    @classmethod
    def from_tensors(
        cls,
        name: str,
        images: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | Sequence[int] | None = None,
        *,
        rows: Mapping[str, Iterable[int]] | None = None,
        class_names: Sequence[str] = (),
        largest: int = 255,
    ) -> Dataset:
        """Make a dataset of one's own images.

        Args:
            name: what it is called in MLflow; letters, digits, ".", "_", "-".
            images: shape (N, H, W), grey, or (N, C, H, W) with 1 or 3 channels; uint8, or floats
                in [0, 1], which are rounded to 256 levels.
            labels: class of each image, counted from 0, shape (N,); None leaves out the metrics
                that need classes.
            rows: part ("train", "val", "test") -> its rows. A part that is missing gets a tenth of
                "train"; None splits all images 8 : 1 : 1, always alike.
            class_names: a name for each class.
            largest: grey value of uint8 images that stands for 1.

        Raises:
            UserError: something of this is not as it must be.
        """
        if checked_name(name, "name", LONGEST_NAME) in DATASETS:
            raise UserError(f"dataset name {name!r} is taken by another dataset; choose another")
        pictures = as_images(images, largest)
        classes = torch.zeros(len(pictures), dtype=torch.int64)
        if labels is not None:
            classes = as_labels(labels, len(pictures))
        count = 0 if labels is None else max(int(classes.max()) + 1, len(class_names))
        if class_names and len(class_names) != count:
            raise UserError(f"class_names has {len(class_names)} names: the labels have {count}")
        grey = 255 if torch.as_tensor(images).is_floating_point() else largest
        whole = Split(pictures.flatten(1), classes, grey)
        train, val, test = (
            replace(whole, images=whole.images[own], labels=classes[own])
            for own in split_rows(len(pictures), rows)
        )
        if bool((train.images == train.images[0]).all()):
            raise UserError("all training images are the same: there is nothing to learn of them")
        channels, height, width = pictures.shape[1:]
        shape = channels, height, width
        parts = (train, val, test)
        known = [tensor for part in parts for tensor in (part.images, part.labels)]
        about = json.dumps([shape, grey, count, *map(len, parts)])
        return cls(name, shape, count, *parts, digest(*known, about=about), tuple(class_names))

    @property
    def has_classes(self) -> bool:
        """Whether there are classes to tell apart: at least two among the training images."""
        return self.classes > 1 and len(self.train.labels.unique()) > 1

    @property
    def pixels(self) -> int:
        """D: values of an image, all channels."""
        return math.prod(self.image_shape)

    @cached_property
    def pixel_variance(self) -> float:
        """Variance of a pixel over the training images, mean over pixels, pixel^2.

        It is the mse of a model that knows the mean image alone.
        """
        sums = torch.zeros(2, self.pixels, dtype=torch.float64, device=self.train.images.device)
        for rows in torch.arange(len(self.train)).split(CHUNK):
            x = self.train.pixels(rows, torch.float64)
            sums += torch.stack([x.sum(0), x.square().sum(0)])
        mean, square = sums / len(self.train)
        return float((square - mean.square()).mean())

    def class_name(self, label: int) -> str:
        """Return what a class is called: its name, or its number."""
        return self.class_names[label] if self.class_names else str(label)

    def binarized(self, kind: Binarization) -> Dataset:
        """Return the dataset as runs with this `binarization` are measured on it.

        The drawn pixels are the same for every run and seed; binary images stay as they are.
        """
        if kind == "none":
            return self
        parts = {
            part: getattr(self, part).binarized(kind, generator(SPLIT_SEED, f"binarize/{part}"))
            for part in PARTS
        }
        return replace(self, **parts)

    def to(self, device: torch.device) -> Dataset:
        """Return the dataset with its tensors on the device."""
        parts = {part: getattr(self, part).to(device) for part in PARTS}
        return replace(self, **parts)


def load_dataset(
    name: str = "digits",
    root: str | Path = "data",
    image_size: int | Sequence[int] | None = None,
) -> Dataset:
    """Load a dataset and split it.

    digits: 1,797 scans of 8 x 8 pixels with 17 grey levels, inside scikit-learn; no file needed.
    mnist, fashion_mnist, kmnist: 28 x 28 pixels, read from IDX files under `root`, where
    torchvision downloads them to if missing.
    folder:PATH: own images, grey or colour (`harness.folder.read_folder` says where files lie),
    made `image_size` (height and width, or one number for both) where it is given.

    Raises:
        UserError: the name is unknown, or files are missing and cannot be downloaded, or broken.
    """
    if name.startswith(FOLDER):
        return _folder(Path(name.removeprefix(FOLDER)), image_size)
    if image_size is not None:
        raise UserError(f"image_size={image_size!r}: only images of {FOLDER}PATH are resized")
    if name == "digits":
        return _digits()
    if name in TORCHVISION:
        return _torchvision(name, Path(root))
    raise UserError(f"dataset={name!r}: choose one of {', '.join(DATASETS)}, or {FOLDER}PATH")


def with_official_training(data: Dataset) -> Dataset:
    """Return a dataset of the MNIST family with its official 60,000 training images.

    The validation split is put back behind the training split (and stays what it is), so published
    numbers of the official parts can be compared with. Nothing is to be chosen on it then.
    """
    images = torch.cat([data.train.images, data.val.images])
    labels = torch.cat([data.train.labels, data.val.labels])
    return replace(data, train=replace(data.train, images=images, labels=labels))


def _folder(path: Path, image_size: int | Sequence[int] | None) -> Dataset:
    from harness.folder import read_folder

    found = read_folder(path, image_size)
    return Dataset.from_tensors(
        found.name, found.images, found.labels, rows=found.rows, class_names=found.class_names
    )


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images.astype(np.uint8)).flatten(1)
    whole = Split(images, torch.from_numpy(source.target.astype(np.int64)), largest=16)
    train, val, test = _parts(whole, *DIGITS_SPLIT)
    return Dataset("digits", (1, 8, 8), 10, train, val, test, digest(images))


def _torchvision(name: str, root: Path) -> Dataset:
    official, test = (
        Split(images.flatten(1), labels.long(), largest=255)
        for images, labels in (read_official(name, root, train=train) for train in (True, False))
    )
    train, val, _ = _parts(official, len(official) - VALIDATION_IMAGES, VALIDATION_IMAGES)
    both = digest(official.images, test.images)
    return Dataset(name, (1, 28, 28), 10, train, val, test, both)


def _parts(whole: Split, train: int, val: int) -> tuple[Split, Split, Split]:
    order = torch.from_numpy(generator(SPLIT_SEED, "split").permutation(len(whole)))
    rows = order.split([train, val, len(whole) - train - val])
    first, second, third = (
        replace(whole, images=whole.images[part], labels=whole.labels[part]) for part in rows
    )
    return first, second, third
