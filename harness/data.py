"""Image datasets as uint8 tensors that live on the training device, split once and for all."""

from __future__ import annotations

import contextlib
import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness import idx
from harness.config import Binarization, UserError
from harness.streams import generator

SPLIT_SEED = 0
"""Seed of the permutation that makes the splits; the same for every run, whatever its own seed."""

DIGITS_SPLIT = (1280, 256)
"""Training and validation images of digits; the other 261 of the 1,797 are for testing."""

VALIDATION_IMAGES = 5_000
"""Taken from the 60,000 training images of the MNIST family, whose own test split is kept."""

TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
IDX_PARTS = ("train", "t10k")
IDX_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
DATASETS = ("digits", *TORCHVISION)
PARTS = ("train", "val", "test")

BROKEN = (RuntimeError, ValueError, TypeError, KeyError, AssertionError, EOFError, OSError)
"""What is raised for files that are absent, unreachable, cut short or not IDX."""


@dataclass(frozen=True)
class Split:
    """Images and labels of one part of a dataset.

    Attributes:
        images: uint8, shape (N, D).
        labels: class of each image, int64, shape (N,).
        largest: grey value that stands for 1.
    """

    images: Tensor
    labels: Tensor
    largest: int

    def __len__(self) -> int:
        return len(self.labels)

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
        levels = np.full(1, (self.largest + 1) // 2 - 1)
        if kind == "stochastic":
            assert stream is not None
            shape = tuple(self.images.shape)
            levels = stream.integers(self.largest, size=shape, dtype=np.uint8)
        ones = self.images > torch.from_numpy(levels).to(self.images.device)
        return replace(self, images=ones.to(torch.uint8), largest=1)

    def to(self, device: torch.device) -> Split:
        """Return the split with its tensors on the device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A dataset in three fixed parts.

    Attributes:
        name: as given to `load_dataset`.
        image_shape: (channels, height, width).
        classes: number of classes.
        train: what is trained on.
        val: what settings are chosen on.
        test: what is read once, at the end.
        digest: SHA-256 of the pixels of all images, in the source's order.
    """

    name: str
    image_shape: tuple[int, int, int]
    classes: int
    train: Split
    val: Split
    test: Split
    digest: str

    @property
    def pixels(self) -> int:
        """D: values of an image, all channels."""
        return math.prod(self.image_shape)

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


def load_dataset(name: str = "digits", root: str | Path = "data") -> Dataset:
    """Load a dataset and split it.

    digits: 1,797 scans of 8 x 8 pixels with 17 grey levels, inside scikit-learn; no file needed.
    mnist, fashion_mnist, kmnist: 28 x 28 pixels, read from IDX files under `root`, where
    torchvision downloads them to if missing.

    Raises:
        UserError: the name is unknown, or files are missing and cannot be downloaded, or broken.
    """
    if name == "digits":
        return _digits()
    if name in TORCHVISION:
        return _torchvision(name, Path(root))
    raise UserError(f"dataset={name!r}: choose one of {', '.join(DATASETS)}")


def with_official_training(data: Dataset) -> Dataset:
    """Return a dataset of the MNIST family with its official 60,000 training images.

    The validation split is put back behind the training split (and stays what it is), so published
    numbers of the official parts can be compared with. Nothing is to be chosen on it then.
    """
    images = torch.cat([data.train.images, data.val.images])
    labels = torch.cat([data.train.labels, data.val.labels])
    return replace(data, train=replace(data.train, images=images, labels=labels))


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images.astype(np.uint8)).flatten(1)
    whole = Split(images, torch.from_numpy(source.target.astype(np.int64)), largest=16)
    train, val, test = _parts(whole, *DIGITS_SPLIT)
    return Dataset("digits", (1, 8, 8), 10, train, val, test, _digest(images))


def _torchvision(name: str, root: Path) -> Dataset:
    official, test = (_read(name, root, train=train) for train in (True, False))
    train, val, _ = _parts(official, len(official) - VALIDATION_IMAGES, VALIDATION_IMAGES)
    digest = _digest(official.images, test.images)
    return Dataset(name, (1, 28, 28), 10, train, val, test, digest)


def _read(name: str, root: Path, *, train: bool) -> Split:
    """Read one official part, letting torchvision download or unpack it if it is not there."""
    folder = root / TORCHVISION[name] / "raw"
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        images, labels = _idx_files(folder, train=train) or _fetched(name, root, train=train)
        _expect(images, labels, 60_000 if train else 10_000)
    except BROKEN as error:
        for place in made:
            with contextlib.suppress(OSError):  # not there after all, or not empty
                place.rmdir()
        names = ", ".join(f"{part}-{kind}" for part in IDX_PARTS for kind in IDX_KINDS)
        reason = str(error).strip().split("\n")[0] or "not an IDX file, or cut short"
        raise UserError(
            f"{name}: no usable data in {folder.resolve()} ({reason}). Offline, put the files "
            f"{names} there (as they are or as .gz), or name the folder that holds "
            f"{TORCHVISION[name]}/raw with --data-dir; a broken file: delete it first."
        ) from error
    return Split(images.flatten(1), labels.long(), largest=255)


def _idx_files(folder: Path, *, train: bool) -> tuple[Tensor, Tensor] | None:
    """Read images and labels if both files are there: importing torchvision takes seconds."""
    files = [folder / f"{IDX_PARTS[0 if train else 1]}-{kind}" for kind in IDX_KINDS]
    if not all(file.is_file() for file in files):
        return None
    images, labels = (idx.read(file) for file in files)
    return images, labels


def _fetched(name: str, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    import torchvision

    source = getattr(torchvision.datasets, TORCHVISION[name])
    try:
        part = source(root, train=train)
    except RuntimeError as error:  # torchvision's word for files that are not there
        if "not found" not in str(error):
            raise
        part = source(root, train=train, download=True)
    return part.data, part.targets


def _expect(images: Tensor, labels: Tensor, count: int) -> None:
    if images.shape != (count, 28, 28) or labels.shape != (count,):
        raise ValueError(
            f"expected {count:,} images of 28 x 28 and as many labels, found images "
            f"{tuple(images.shape)} and labels {tuple(labels.shape)}"
        )


def _parts(whole: Split, train: int, val: int) -> tuple[Split, Split, Split]:
    order = torch.from_numpy(generator(SPLIT_SEED, "split").permutation(len(whole)))
    rows = order.split([train, val, len(whole) - train - val])
    first, second, third = (
        replace(whole, images=whole.images[part], labels=whole.labels[part]) for part in rows
    )
    return first, second, third


def _digest(*images: Tensor) -> str:
    whole = hashlib.sha256()
    for part in images:
        whole.update(np.ascontiguousarray(part.numpy()).data)
    return whole.hexdigest()
