"""The datasets that have a name, and folders of images, loaded and split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from harness.config import UserError
from harness.dataset import Dataset, Split
from harness.official import DATASETS, TORCHVISION, read_official
from harness.streams import generator
from harness.tensors import SPLIT_SEED, digest

DIGITS_SPLIT = (1280, 256)
"""Training and validation images of digits; the other 261 of the 1,797 are for testing."""

VALIDATION_IMAGES = 5_000
"""Taken from the 60,000 training images of the MNIST family, whose own test split is kept."""

FOLDER = "folder:"
"""What stands before the path of a folder of images in the name that `load_dataset` is given."""


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
