"""Fixtures that several test modules share, and the rule for tests that need a GPU."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

# One thread in this process and in all that it starts: on tensors this small, threads only wait for
# each other. OpenMP and BLAS read it when they are loaded; tests of several cores set their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from harness.data.dataset import Dataset
from harness.data.load import load_dataset

# A shell may start background jobs with Ctrl-C ignored, which tests send to their processes.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A GPU machine may have the core's libraries alone (`benchmarks.gpu`).
pytest_plugins = ["real_stores", "real_postgres"] if find_spec("mlflow") else []

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


FIRST = (
    *("spool", "kills", "engine", "studies", "search", "queue", "processes", "reproduce", "store"),
    *("record", "proposers", "contract", "replay", "database", "example_study", "checkpoint"),
)
"""Modules that take longest: begun last, one would run while a core is idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the modules that take longest first; skip tests marked `gpu` without a CUDA device."""
    order = {f"test_{name}": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
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
def _threads_as_before() -> Iterator[None]:
    """Compute on as many threads after a test as before it."""
    before = torch.get_num_threads()
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


@pytest.fixture
def registered() -> Iterator[None]:
    """Forget after the test which parts it registered."""
    from harness import registry

    known = (
        registry.NETWORKS,
        registry.LIKELIHOODS,
        registry.TERMS,
        registry.METRICS,
        registry._files,
    )
    before = [dict(names) for names in known]
    yield
    for names, had in zip(known, before, strict=True):
        names.clear()
        names.update(had)


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute runs of equal shapes as one stack where their networks allow it, as a GPU does."""
    from harness.training import engine

    monkeypatch.setattr(engine, "STACKED", {"cpu", "cuda"})


@pytest.fixture
def together(stacks: None, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Compute runs of equal shapes as one stack, and fail if they are not."""
    yield
    messages = [record.getMessage() for record in caplog.get_records("call")]
    assert not [message for message in messages if "one by one" in message]


@pytest.fixture(params=["apart", "together"])
def parts(request: pytest.FixtureRequest) -> str:
    """Compute runs each alone, as a CPU does, and in stacks, as a GPU does."""
    if request.param == "together":
        request.getfixturevalue("together")
    return request.param


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest, _threads_as_before: None) -> int:
    """Run the test with each number of CPU threads."""
    torch.set_num_threads(request.param)
    return request.param
