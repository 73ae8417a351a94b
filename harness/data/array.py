"""A NumPy file of images or vectors as a dataset, memory-mapped if it is large."""

import re
import tokenize
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from harness.data.dataset import CHUNK, Dataset, as_labels, as_tensor, as_values, check_pixels
from harness.data.mapped import Mapped, check_kind, image_shape, laid_out, memory, open_array
from harness.errors import UserError, one_line

SHARE = 1 / 4  # of memory; a larger file is mapped: making its parts and sharing them takes copies
# NumPy's errors for files that are no arrays, or cut short.
BROKEN = (OSError, ValueError, TypeError, OverflowError, SyntaxError, EOFError, tokenize.TokenError)


def read_array(path: Path, label: str | None = None) -> Dataset:
    """Read a .npy file; the dataset's name is "array-" and the file's.

    The array holds images, (N, H, W), (N, C, H, W) or (N, H, W, C) with C = 1 or 3, uint8 or
    floats in [0, 1], or vectors (N, D): grey values if they are uint8, else columns of a table
    (`Dataset.from_tensors`). A file larger than a quarter of memory is mapped: its rows are read
    when they are needed, and all results are those of a file in memory. The `label` is a .npy file
    with the class of each row, a whole number or a name; it is taken from the folder of the array
    if it is not in the working folder.
    """
    path = path.expanduser()
    try:
        return _read(path, label)
    except UserError as error:
        raise UserError(f"array:{path}: {error}") from None


def _read(path: Path, label: str | None) -> Dataset:
    array = _opened(path)
    check_kind(array, "it holds")
    image_shape(array.shape)
    is_large = path.stat().st_size > SHARE * memory()
    if is_large and array.flags.f_contiguous and not array.flags.c_contiguous:
        raise UserError(
            "it is too large for memory and stored by columns (Fortran order), of which rows are "
            "read slowly; save it by rows (C order)"
        )
    size, low, high = max(1, CHUNK // array[0].size), 0.0, 0.0
    for start in range(0, len(array), size):
        some = laid_out(array[start : start + size])
        if some.dtype.kind == "f" and not np.isfinite(some).all():
            place = np.argwhere(~np.isfinite(some))[0]
            found = f"row {start + place[0]} has {some[tuple(place)]} at {place[1:].tolist()}"
            raise UserError(f"{found}, counted from 0; give finite numbers")
        if is_large:
            low, high = min(low, some.min()), max(high, some.max())
    if is_large:  # checked as by `from_tensors`
        as_values(first := as_tensor(np.zeros_like(some[:1]), "images"), 255, ())
        if array.ndim > 2:
            check_pixels(first.dtype, float(low), float(high))
    labels, names = (None, ()) if label is None else _labels(path, label, len(array))
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().stem)[:50]
    images = Mapped.whole(path) if is_large else laid_out(array)
    data = Dataset.from_tensors(f"array-{stem or 'rows'}", images, labels, class_names=names)
    return data if label is None else replace(data, options={"label": Path(label).name})


def _opened(path: Path) -> np.ndarray:
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"{found}; name a .npy file")
    try:
        return open_array(path)
    except BROKEN as error:
        if zipfile.is_zipfile(path):
            save = "give one of its arrays, saved by np.save"
            raise UserError(f"it is an archive of arrays (.npz); {save}") from None
        reason = one_line(error)[:200]
        raise UserError(f"it cannot be read ({reason}); give an array of np.save") from None


def _labels(array: Path, label: str, rows: int) -> tuple[Tensor, list[str]]:
    path = Path(label).expanduser()
    path = path if path.is_file() else array.parent / path.name
    try:
        return as_labels(_opened(path), rows)
    except UserError as error:
        raise UserError(f"--label {label}: {error}") from None
