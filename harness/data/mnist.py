"""The MNIST family (MNIST, Fashion-MNIST, Kuzushiji-MNIST), read from LeCun's IDX files."""

import contextlib
import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.errors import UserError, one_line

# Names of datasets -> classes in torchvision, which are also their folders.
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
DATASETS = ("digits", *TORCHVISION)  # names that a user's dataset cannot have

PARTS = ("train", "t10k")
KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")


@contextlib.contextmanager
def usable(name: str, folder: Path, files: str, what: str) -> Iterator[None]:
    """Name a folder without usable data, and what helps; empty folders made meanwhile go."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except Exception as error:  # torchvision has many for files that are absent or cut short
        for place in made:
            with contextlib.suppress(OSError):  # never made, or not empty
                place.rmdir()
        raise UserError(
            f"{name}: no usable data in {folder.resolve()} ({one_line(error)}). Put {files} (a "
            f"broken file: delete it first), or name the folder that holds {what} with --data-dir."
        ) from error


def read_official(name: str, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Read images (N, 28, 28) and labels (N,) of an official part; download them if missing."""
    folder = root / TORCHVISION[name] / "raw"
    names = ", ".join(f"{part}-{kind}" for part in PARTS for kind in KINDS)
    raw = f"{TORCHVISION[name]}/raw"
    with usable(name, folder, f"the files {names} there", raw):
        images, labels = (_find(folder, f"{PARTS[0 if train else 1]}-{kind}") for kind in KINDS)
        if images is None or labels is None:
            import torchvision  # takes seconds

            source = getattr(torchvision.datasets, TORCHVISION[name])
            part = source(root, train=train, download=True)
            images, labels = part.data, part.targets
        count = 60_000 if train else 10_000
        if images.shape != (count, 28, 28) or labels.shape != (count,):
            found = f"images {tuple(images.shape)} and labels {tuple(labels.shape)}"
            raise ValueError(f"expected {count:,} images of 28 x 28 and labels, found {found}")
    return images, labels


def _find(folder: Path, name: str) -> Tensor | None:
    # The first file of the name, with .gz or another ending behind it, or a dot for a hyphen in it.
    for file in sorted(folder.glob(name.replace("-idx", "?idx") + "*")):
        with contextlib.suppress(gzip.BadGzipFile, EOFError, zlib.error):  # a download that was cut
            if file.is_file():
                return read_idx(file)
    return None


def read_idx(file: Path) -> Tensor:
    """Read an IDX file: bytes 0, 0, 8, the number of axes, big-endian sizes, uint8 values."""
    content = bytearray(file.read_bytes())
    if content.startswith(b"\x1f\x8b"):  # compressed, whatever its name
        content = bytearray(gzip.decompress(content))
    axes = content[3] if content.startswith(b"\0\0\x08") and len(content) > 3 else 0
    start = 4 + 4 * axes
    if axes == 0 or len(content) < start:
        raise ValueError(f"{file.name} is not an IDX file of bytes")
    shape = np.frombuffer(content, ">u4", axes, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=start)
    if len(values) != math.prod(shape):
        sizes = " x ".join(map(str, shape))
        raise ValueError(f"{file.name} holds {len(values):,} values, not {sizes}")
    return torch.from_numpy(values.reshape(shape))
