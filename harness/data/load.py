"""Datasets by name: the built-in ones, and those of the user's files."""

from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch

from harness.config import UserError
from harness.data.dataset import SPLIT_SEED, Dataset, Split, digest
from harness.data.mnist import DATASETS, TORCHVISION, read_official
from harness.streams import generator

VALIDATION_IMAGES = 5_000  # of the 60,000 training images of the MNIST family
IMAGES = ("image_size", "image_range", "background")
OWN = {  # kinds of the user's data, named KIND:PATH -> the options that they take
    "folder": IMAGES,
    "torchvision": IMAGES,
    "table": ("label",),
    "array": ("label",),
}


def load_dataset(
    name: str = "digits",
    root: str | Path = "data",
    image_size: int | Sequence[int] | None = None,
    label: str | None = None,
    image_range: Sequence[float] | None = None,
    background: str = "white",
) -> Dataset:
    """Load a dataset in its three parts.

    Args:
        name: "digits": 1,797 scans of 8 x 8 pixels with 17 grey levels, from scikit-learn's files;
            "mnist", "fashion_mnist", "kmnist": 28 x 28 pixels; "folder:PATH": your images, grey or
            colour, one folder a class (`harness.data.folder.read_folder`); "torchvision:NAME": a
            classification set of torchvision (`harness.data.torchvision_sets.read_torchvision`);
            "table:FILE": the columns of a CSV or Parquet file (`harness.data.table.read_table`);
            "array:FILE.npy": images or vectors of NumPy (`harness.data.array.read_array`).
        root: folder of the MNIST family's IDX files and of torchvision's sets, to which missing
            ones are downloaded.
        image_size: height and width, or one number for both, that images of a folder or of a set
            of torchvision are resized to.
        label: column of a table that holds the class of each row; of an array, a .npy file.
        image_range: the values of black and white, of images that have more than 8 bits.
        background: "white" or "black", on which transparent images are composed.
    """
    kind, _, path = name.partition(":")
    ground = None if background == "white" else background
    images = {"image_size": image_size, "image_range": image_range, "background": ground}
    for option, value in {**images, "label": label}.items():
        if value is not None and option not in OWN.get(kind, ()):
            taking = " and ".join(f"{one}:PATH" for one, taken in OWN.items() if option in taken)
            raise UserError(f"{option}={value!r}: only {taking} have this option")
    if kind in ("folder", "torchvision"):
        from harness.data.folder import read_folder, reading  # they load Pillow

        how = reading(image_size, image_range, background)
        if kind == "folder":
            return read_folder(Path(path), how)
        from harness.data.torchvision_sets import read_torchvision

        return read_torchvision(path, Path(root), how)
    if kind == "table":
        from harness.data.table import read_table

        return read_table(Path(path), label)
    if kind == "array":
        from harness.data.array import read_array

        return read_array(Path(path), label)
    if name == "digits":
        return _digits()
    if name in TORCHVISION:
        return _mnist_family(name, Path(root))
    known = ", ".join([*DATASETS, *(f"{kind}:PATH" for kind in OWN)])
    raise UserError(f"dataset={name!r}: choose one of {known}")


def is_named(name: str) -> bool:
    """Return whether the dataset of this name is one of `load_dataset`, and not of tensors."""
    return name in DATASETS or name.startswith(tuple(f"{kind}-" for kind in OWN))


def _digits() -> Dataset:
    # The file of `sklearn.datasets.load_digits`, whose import takes a second.
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = torch.from_numpy(np.loadtxt(str(file), np.uint8, delimiter=","))
    images = rows[:, :-1].contiguous()
    whole = Split(images, rows[:, -1].long(), largest=16)
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
