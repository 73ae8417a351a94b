"""The official parts of the MNIST family, from their files."""

from __future__ import annotations

import contextlib
from http.client import HTTPException
from pathlib import Path

from torch import Tensor

from harness import idx
from harness.config import UserError

TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
DATASETS = ("digits", *TORCHVISION)
"""Names that are no names of own images."""

IDX_PARTS = ("train", "t10k")
IDX_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")

BROKEN = (
    *(RuntimeError, ValueError, TypeError, KeyError, AssertionError, EOFError, OSError),
    HTTPException,
)
"""What is raised for files that are absent, unreachable, cut short or not IDX."""


def read_official(name: str, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Read images (N, 28, 28) and labels (N,), fetched by torchvision if they are not there.

    Raises:
        UserError: files are missing and cannot be downloaded, or broken.
    """
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
    return images, labels


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
