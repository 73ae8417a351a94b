"""Rows of a NumPy file that is too large for memory, in place of a tensor."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from harness import processes
from harness.errors import UserError

if TYPE_CHECKING:
    from harness.data.dataset import Columns

CHANNELS = (1, 3)
GROUPS = Path("/sys/fs/cgroup")
OTHERS = {"M": "dates", "m": "times", "V": "records", "c": "complex numbers"}  # else text


@dataclass(frozen=True, eq=False)
class Mapped:
    """Rows (N, D) of an array in a file, which are read from it when they are indexed.

    They are the numbers that the array would have as images of a `Split` in memory. Pages of the
    file are the system's cache and no memory of this process; other processes open the file again.
    """

    path: Path  # of a .npy file, absolute
    state: tuple[int, int]  # size and time of change of the file, which must not change
    rows: Tensor  # places in the array, int64, shape (N,)
    columns: Columns | None = None  # of a table, by which values are standardised

    device = torch.device("cpu")

    @classmethod
    def whole(cls, path: Path) -> Mapped:
        """Return all rows of a file."""
        return cls(path.resolve(), _state(path), torch.arange(len(open_array(path))))

    @property
    def _array(self) -> np.ndarray:
        return _opened(self.path, self.state)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of images, (D,) of vectors."""
        return image_shape(self._array.shape)

    @property
    def shape(self) -> torch.Size:
        """(N, D)."""
        return torch.Size((len(self.rows), int(np.prod(self.image_shape))))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers that are read."""
        if len(self.image_shape) > 1 or self._array.dtype == np.uint8:
            return torch.uint8
        return torch.float64 if self.columns is None else torch.float32

    def is_floating_point(self) -> bool:
        """Return whether the numbers are those of a table."""
        return self.dtype.is_floating_point

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Read the chosen rows; `rows` of shape (...) gives (..., D)."""
        chosen = self.rows[rows]
        values = torch.from_numpy(laid_out(self._array[chosen.flatten().numpy()]))
        values = rounded(values) if values.ndim > 2 else values
        if self.columns is not None:
            values = self.columns.standardized(values)
        return values.to(self.dtype).view(*chosen.shape, -1)

    def chosen(self, rows: Tensor | slice) -> Mapped:
        """Return the chosen rows without reading them."""
        return replace(self, rows=self.rows[rows])

    def to(self, device: torch.device) -> Mapped:
        """Return this object: rows are read into the CPU's memory."""
        return self

    def shared(self) -> Mapped:
        """Return the same rows, with their places in memory that worker processes share."""
        return replace(self, rows=processes.shared(self.rows))


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=4)
def _opened(path: Path, state: tuple[int, int]) -> np.ndarray:
    if _state(path) != state:
        raise UserError(f"array:{path} has changed since training began; begin again")
    return open_array(path)


def open_array(path: Path) -> np.ndarray:
    """Map the array of a .npy file for reading; an error of NumPy for any other file."""
    return np.lib.format.open_memmap(path, mode="r")


def image_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return (C, H, W) of images (N, H, W), (N, C, H, W), (N, H, W, C), (D,) of vectors (N, D)."""
    if 0 in shape or not 2 <= len(shape) <= 4:
        raise UserError(f"its shape is {shape}: give (N, H, W), (N, C, H, W), (N, H, W, C), (N, D)")
    if len(shape) < 4:
        return (1, *shape[1:]) if len(shape) == 3 else shape[1:]
    first, last = (shape[axis] in CHANNELS for axis in (1, 3))
    if first == last:
        found = "both the second and the last axis" if first else "neither the second nor the last"
        problem = f"its shape is {shape}: {found} can be the channels, 1 or 3"
        raise UserError(f"{problem}; give (N, H, W) of grey images, or (N, D) of vectors")
    return shape[1:] if first else (shape[3], *shape[1:3])


def check_kind(array: np.ndarray, it_holds: str) -> None:
    """Refuse an array of other things than real numbers and truth values."""
    if array.dtype.kind not in "biuf":
        kind = OTHERS.get(array.dtype.kind, "text")
        raise UserError(f"{it_holds} {kind} ({array.dtype}); give real numbers")


def laid_out(array: np.ndarray) -> np.ndarray:
    """Return rows of an array as `Dataset.from_tensors` takes them."""
    if array.ndim == 4 and array.shape[1] not in CHANNELS:
        array = array.transpose(0, 3, 1, 2)
    return in_order(array)


def in_order(array: np.ndarray) -> np.ndarray:
    """Return numbers in an order of bytes and axes, and of a type, that PyTorch has."""
    known = np.float64 if array.dtype.kind == "f" and array.dtype.itemsize > 8 else array.dtype
    return np.require(array, np.dtype(known).newbyteorder("="), ["C", "W"])  # a copy, if of a file


def rounded(images: Tensor) -> Tensor:
    """Return images as uint8: floats in [0, 1] are rounded to 256 levels."""
    return images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)


def memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or of control groups."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    file = Path("/proc/self/cgroup")
    # Groups, of version 1 or 2, limit jobs of Slurm and containers, and lie in one another.
    for line in file.read_text().splitlines() if file.exists() else []:
        _, kind, group = line.split(":", 2)
        if kind in ("", "memory"):
            folder = GROUPS / kind / group.strip("/")
            for one in (folder, *folder.parents):
                with suppress(OSError, ValueError):  # no such file, and "max"
                    name = "memory.limit_in_bytes" if kind else "memory.max"
                    limits.append(int((one / name).read_text()))
    return min(limits)
