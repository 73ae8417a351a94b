"""Arrays of NumPy files: what is read and refused, and files that are too large for memory."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import RunConfig, UserError, evaluate, load_dataset, measure_quality, train
from harness.data import array as arrays
from harness.data import mapped
from harness.data.dataset import Dataset
from harness.data.mapped import Mapped
from harness.linear.pca import _decompose, pca
from harness.streams import generator, normal
from harness.training import step
from harness.training.checkpoint import Checkpoints

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (60, 5, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (60, 5, 7, 3), dtype=np.uint8)
TABLE = RNG.normal(size=(60, 4)).astype(np.float32) * [1, 10, 0.1, 3] + [0, 5, -1, 1e3]
LABELS = np.arange(60) % 3

ARRAYS = {
    "grey": GREY,
    "grey with an axis": GREY[:, None],
    "grey, axis last": GREY[..., None],
    "colour": np.ascontiguousarray(COLOUR.transpose(0, 3, 1, 2)),
    "colour, last": COLOUR,
    "half": (GREY / 255).astype(np.float16),
    "double": GREY / 255,
    "big-endian": (GREY / 255).astype(">f4"),
    "grey vectors": GREY.reshape(60, 35),
    "table": TABLE,
    "table, float32": TABLE.astype(np.float32),
    "table, whole": (TABLE * 100).astype(np.int64),
    "table, unsigned": (100 + TABLE * 10).clip(0).astype(np.uint16),
    "table, big-endian": TABLE.astype(">f8"),
    "table, longdouble": TABLE.astype(np.longdouble),
}


def saved(folder: Path, array: np.ndarray, name: str = "mine.npy") -> str:
    np.save(folder / name, array)
    return f"array:{folder / name}"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Map every file, and read its images in small parts and chunks."""
    monkeypatch.setattr(arrays, "SHARE", 0)
    monkeypatch.setattr(step, "PART", 2_000)


def both(folder: Path, array: np.ndarray, label: str | None = None) -> tuple[Dataset, Dataset]:
    """Return the dataset of an array in memory, and mapped."""
    name = saved(folder, array)
    in_memory = load_dataset(name, label=label)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "SHARE", 0)
        from_file = load_dataset(name, label=label)
    assert isinstance(in_memory.train.images, torch.Tensor)
    assert isinstance(from_file.train.images, Mapped)
    return in_memory, from_file


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_is_the_dataset_of_its_numbers_in_memory_and_mapped(kind: str, tmp_path: Path):
    np.save(tmp_path / "labels.npy", LABELS)
    given = ARRAYS[kind]
    if given.ndim == 4 and given.shape[3] in (1, 3):
        given = given.transpose(0, 3, 1, 2)
    native = given.astype(
        np.float64 if given.dtype == np.longdouble else given.dtype.newbyteorder("=")
    )
    expected = Dataset.from_tensors("array-mine", native, LABELS)
    for data in both(tmp_path, ARRAYS[kind], str(tmp_path / "labels.npy")):
        assert (data.name, data.digest, data.columns) == (
            expected.name,
            expected.digest,
            expected.columns,
        )
        assert data.image_shape == expected.image_shape
        assert data.options == {"label": "labels.npy"}
        assert data.pixel_variance == expected.pixel_variance
        for part in ("train", "val", "test"):
            mine, theirs = getattr(data, part), getattr(expected, part)
            assert (mine.largest, mine.digest) == (theirs.largest, theirs.digest)
            assert mine.images.dtype == theirs.images.dtype
            assert mine.images.shape == theirs.images.shape
            assert torch.equal(mine.images[:], theirs.images)
            assert torch.equal(mine.labels, theirs.labels)
            some = torch.tensor([[3, 1], [0, 3]])
            assert torch.equal(mine.pixels(some, torch.float64), theirs.pixels(some, torch.float64))
            assert torch.equal(mine.head(4).images[1:], theirs.images[1:4])


def test_fortran_order_is_read_in_memory_and_refused_mapped(tmp_path: Path, monkeypatch):
    name = saved(tmp_path, np.asfortranarray(GREY))
    assert load_dataset(name).digest == Dataset.from_tensors("array-mine", GREY).digest
    monkeypatch.setattr(arrays, "SHARE", 0)
    with pytest.raises(UserError, match="stored by columns .* save it by rows"):
        load_dataset(name)
