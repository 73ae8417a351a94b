"""Datasets by name: the built-in ones, folders of images, and sets of torchvision."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from harness.config import UserError
from harness.data.dataset import SPLIT_SEED, Dataset, Split, digest
from harness.data.mnist import DATASETS, TORCHVISION, read_official
from harness.streams import generator

VALIDATION_IMAGES = 5_000  # of the 60,000 training images of the MNIST family
FOLDER = "folder:"  # prefix of a name that is the path of a folder of images
SET = "torchvision:"  # prefix of a name that is a class of torchvision


def load_dataset(
    name: str = "digits",
    root: str | Path = "data",
    image_size: int | Sequence[int] | None = None,
) -> Dataset:
    """Load a dataset in its three parts.

    Args:
        name: "digits": 1,797 scans of 8 x 8 pixels with 17 grey levels, from scikit-learn's files;
            "mnist", "fashion_mnist", "kmnist": 28 x 28 pixels; "folder:PATH": your images, grey or
            colour, one folder a class (`harness.data.folder.read_folder`); "torchvision:NAME": a
            classification set of torchvision (`harness.data.torchvision_sets.read_torchvision`).
        root: folder of the MNIST family's IDX files and of torchvision's sets, to which missing
            ones are downloaded.
        image_size: height and width, or one number for both, that images of a folder or of a set
            of torchvision are resized to.
    """
    if name.startswith(FOLDER):
        from harness.data.folder import read_folder

        return read_folder(Path(name.removeprefix(FOLDER)), image_size)
    if name.startswith(SET):
        from harness.data.torchvision_sets import read_torchvision

        return read_torchvision(name.removeprefix(SET), Path(root), image_size)
    if image_size is not None:
        only = f"only images of {FOLDER}PATH and {SET}NAME are resized"
        raise UserError(f"image_size={image_size!r}: {only}")
    if name == "digits":
        return _digits()
    if name in TORCHVISION:
        return _mnist_family(name, Path(root))
    choice = f"{', '.join(DATASETS)}, {FOLDER}PATH, or {SET}NAME"
    raise UserError(f"dataset={name!r}: choose one of {choice}")


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images.astype(np.uint8)).flatten(1)
    whole = Split(images, torch.from_numpy(source.target.astype(np.int64)), largest=16)
    train, val, test = _split(whole, 1280, 256)  # and 261 for testing
    return Dataset("digits", (1, 8, 8), 10, train, val, test, digest(images))


def _mnist_family(name: str, root: Path) -> Dataset:
    official, test = (
        Split(images.flatten(1), labels.long(), largest=255)
        for images, labels in (read_official(name, root, train=train) for train in (True, False))
    )
    train, val, _ = _split(official, len(official) - VALIDATION_IMAGES, VALIDATION_IMAGES)
    both = digest(official.images, test.images)
    return Dataset(name, (1, 28, 28), 10, train, val, test, both)


def _split(whole: Split, train: int, val: int) -> tuple[Split, Split, Split]:
    order = torch.from_numpy(generator(SPLIT_SEED, "split").permutation(len(whole)))
    first, second, third = map(whole.rows, order.split([train, val, len(whole) - train - val]))
    return first, second, third
