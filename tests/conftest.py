"""Fixtures that several test modules share, and the rule for tests that need a GPU."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.data import Dataset
from harness.loading import load_dataset

pytest_plugins = ["real_stores", "real_postgres"]

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where no CUDA device is usable."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Draw the same random numbers in every test, whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute on one thread: on tensors this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data() -> Dataset:
    return load_dataset("digits")


@pytest.fixture(scope="session")
def tiny(data: Dataset) -> Dataset:
    """Return digits cut to 96 training, 40 validation and 50 test images."""
    cut = {"train": data.train.head(96), "val": data.val.head(40), "test": data.test.head(50)}
    return replace(data, **cut)


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """Return the folder with the real MNIST; skip where there is none."""
    folder = Path(os.environ.get("VAE_DATA_DIR", SHARED_DATA))
    if not (folder / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
        pytest.skip(f"no MNIST in {folder}; name its folder in VAE_DATA_DIR")
    return folder


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest, _one_thread: None) -> int:
    """Run the test with each number of CPU threads."""
    torch.set_num_threads(request.param)
    return request.param
