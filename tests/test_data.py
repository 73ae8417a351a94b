"""Datasets: fixed disjoint splits, pixels in [0, 1], and messages that say what to do."""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits

from harness.config import UserError
from harness.data.load import load_dataset
from harness.data.mnist import DATASETS

PARTS = ("train", "val", "test")
FOLDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
DIGITS_DIGEST = "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"


def as_set(images: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in images}


# --- digits -------------------------------------------------------------------------------------


def test_digits_is_split_into_1280_256_and_261(data):
    assert [len(getattr(data, part)) for part in PARTS] == [1280, 256, 261]
    assert (data.name, data.image_shape, data.classes, data.pixels) == ("digits", (1, 8, 8), 10, 64)
    assert data.train.images.shape == (1280, 64)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64


def test_digits_splits_are_disjoint_and_exhaustive(data):
    source = load_digits()
    rows = np.concatenate([source.images.reshape(-1, 64), source.target[:, None]], axis=1)
    parts = [getattr(data, part) for part in PARTS]
    ours = torch.cat([torch.cat([p.images, p.labels.unsqueeze(1)], 1) for p in parts]).numpy()
    # All 1,797 scans are different, so equality as sets is equality of the whole.
    assert len({row.tobytes() for row in ours.astype(float)}) == 1797
    assert {row.tobytes() for row in ours.astype(float)} == {r.tobytes() for r in rows}


def test_every_class_is_in_every_part(data):
    for part in PARTS:
        counts = getattr(data, part).labels.bincount(minlength=10)
        assert counts.min() > 0.06 * counts.sum()


def test_the_digits_digest_is_pinned(data):
    source = load_digits().images.astype(np.uint8)
    assert data.digest == hashlib.sha256(source.tobytes()).hexdigest() == DIGITS_DIGEST


def test_the_split_is_pinned(data):
    # Another order would silently mix runs recorded with different splits.
    drawn = hashlib.sha256(data.test.images.numpy().tobytes()).hexdigest()
    assert drawn[:16] == "3f7fab374416739e"
    assert torch.equal(load_dataset("digits").train.images, data.train.images)


def test_pixels_are_scaled_to_the_unit_interval(data):
    pixels = data.train.pixels(slice(None), torch.float64)
    assert pixels.min() == 0
    assert pixels.max() == 1
    assert torch.equal(pixels * 16, data.train.images.double())
    rows = torch.tensor([[3, 1], [0, 3]])
    chosen = data.train.pixels(rows, torch.float32)
    assert chosen.shape == (2, 2, 64)
    assert torch.equal(chosen[1, 1], data.train.pixels(slice(3, 4), torch.float32)[0])


def test_head_keeps_images_and_labels_together(data):
    head = data.val.head(7)
    assert len(head) == 7
    assert torch.equal(head.images, data.val.images[:7])
    assert torch.equal(head.labels, data.val.labels[:7])
    assert len(data.val) == 256


def test_an_unknown_dataset_is_refused_with_the_choices():
    with pytest.raises(UserError, match=f"dataset='cifar': choose one of {', '.join(DATASETS)}"):
        load_dataset("cifar")


# --- the MNIST family: files of the same layout with synthetic pixels --------------------------


@dataclass(frozen=True)
class Idx:
    """A folder of MNIST-layout files, and the arrays that were written there."""

    root: Path
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


def idx_bytes(array: np.ndarray, magic: int) -> bytes:
    return np.array([magic, *array.shape], dtype=">u4").tobytes() + array.tobytes()


@pytest.fixture(scope="module")
def idx(tmp_path_factory: pytest.TempPathFactory) -> Idx:
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("idx")
    sizes = {"train": 60_000, "t10k": 10_000}
    images = {k: rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for k, n in sizes.items()}
    labels = {k: rng.integers(0, 10, n, dtype=np.uint8) for k, n in sizes.items()}
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in sizes:
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images[part], 0x803))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels[part], 0x801))
    for name in ("FashionMNIST", "KMNIST"):
        (root / name).symlink_to("MNIST")
    return Idx(root, images, labels)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_are_read_and_split(idx, name):
    data = load_dataset(name, idx.root)
    assert (data.name, data.image_shape, data.classes, data.pixels) == (name, (1, 28, 28), 10, 784)
    assert [len(getattr(data, part)) for part in PARTS] == [55_000, 5_000, 10_000]
    assert np.array_equal(data.test.images.numpy(), idx.images["t10k"].reshape(-1, 784))
    assert np.array_equal(data.test.labels.numpy(), idx.labels["t10k"])
    official = as_set(torch.from_numpy(idx.images["train"]))
    train, val = as_set(data.train.images), as_set(data.val.images)
    assert len(train) == 55_000
    assert not train & val
    assert train | val == official
    whole = hashlib.sha256(idx.images["train"].tobytes() + idx.images["t10k"].tobytes())
    assert data.digest == whole.hexdigest()


def test_labels_stay_with_their_images(idx):
    data = load_dataset("kmnist", str(idx.root))
    pairs = zip(idx.images["train"], idx.labels["train"], strict=True)
    label_of = {image.tobytes(): label for image, label in pairs}
    for image, label in zip(data.val.images, data.val.labels, strict=True):
        assert label_of[image.numpy().tobytes()] == label


def test_pixels_of_the_mnist_family_are_scaled_by_255(idx):
    pixels = load_dataset("mnist", idx.root).test.pixels(slice(0, 100), torch.float64)
    expected = torch.from_numpy(idx.images["t10k"][:100]).flatten(1).double() / 255
    assert torch.equal(pixels, expected)
    assert pixels.max() == 1


# --- what can be wrong with the files -----------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every download fail at once, also where there is a network."""
    monkeypatch.setenv("no_proxy", "*")
    for source in FOLDERS.values():
        dataset = getattr(torchvision.datasets, source)
        monkeypatch.setattr(dataset, "mirrors", ["http://127.0.0.1:9/"])


@pytest.fixture
def broken(idx: Idx, tmp_path: Path, offline: None) -> Path:
    """Return a root whose MNIST files may be replaced: links to the good ones."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (idx.root / "MNIST" / "raw").iterdir():
        (raw / file.name).symlink_to(file)
    return tmp_path


def refusal(root: Path, name: str = "mnist") -> str:
    with pytest.raises(UserError) as caught:
        load_dataset(name, root)
    message = str(caught.value)
    assert str((root / FOLDERS[name] / "raw").resolve()) in message
    assert "Put the files" in message
    assert "--data-dir" in message
    return message


def replace_file(root: Path, name: str, content: bytes) -> None:
    file = root / "MNIST" / "raw" / name
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize("name", FOLDERS)
def test_missing_files_that_cannot_be_downloaded(tmp_path, offline, name):
    message = refusal(tmp_path, name)
    assert message.startswith(f"{name}: no usable data in ")
    assert "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images" in message


def test_original_gz_files_need_no_network(tmp_path, offline, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    resources = []
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        images, labels = np.zeros((count, 28, 28), np.uint8), np.zeros(count, np.uint8)
        for kind, content in (
            ("images-idx3", idx_bytes(images, 0x803)),
            ("labels-idx1", idx_bytes(labels, 0x801)),
        ):
            file = raw / f"{part}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(content, compresslevel=1))
            # torchvision trusts a .gz by its checksum only.
            resources.append((file.name, hashlib.md5(file.read_bytes()).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    assert len(load_dataset("mnist", tmp_path).train) == 55_000


def test_one_missing_file(broken):
    (broken / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    assert "(Error downloading " in refusal(broken)


# Damage of every kind is in tests/test_bad_input.py, on files of three images.
@pytest.mark.parametrize(
    ("part", "kept", "expected"),
    [
        ("train", 1_000_000, "holds 999,984 values, not 60000 x 28 x 28"),
        ("t10k", 3, "is not an IDX file of bytes"),
    ],
)
def test_images_cut_short(broken, idx, part, kept, expected):
    name = f"{part}-images-idx3-ubyte"
    with (idx.root / "MNIST" / "raw" / name).open("rb") as file:
        replace_file(broken, name, file.read(kept))
    message = refusal(broken)
    assert f"({name} {expected})" in message
    assert "a broken file: delete it first" in message


def test_bytes_missing_from_whole_images(broken, idx):
    # Header and pixels agree, but these are not MNIST's 60,000 images.
    replace_file(broken, "train-images-idx3-ubyte", idx_bytes(idx.images["t10k"], 0x803))
    message = refusal(broken)
    assert "expected 60,000 images" in message
    assert "(10000, 28, 28)" in message


def test_labels_that_are_too_few(broken, idx):
    content = idx_bytes(idx.labels["train"][:-1], 0x801)
    replace_file(broken, "train-labels-idx1-ubyte", content)
    assert "labels (59999,)" in refusal(broken)


# --- the real MNIST -----------------------------------------------------------------------------


def test_total_variance_of_mnist_is_that_of_the_reference(mnist_folder):
    data = load_dataset("mnist", mnist_folder)
    images = torch.cat([data.train.images, data.val.images])
    assert len(images) == 60_000
    total = variance(images)
    assert total == pytest.approx(52.7250, abs=5e-5)
    assert total / 784 == pytest.approx(0.067251, abs=5e-7)


def variance(images: torch.Tensor) -> float:
    """Return the sum of the pixels' variances over the images, pixels / 255, in exact integers."""
    first = images.sum(0, dtype=torch.int64)
    second = sum((c.int() ** 2).sum(0, dtype=torch.int64) for c in images.split(5000))
    n = len(images)
    return float((second / n - (first / n).square()).double().sum()) / 255**2
