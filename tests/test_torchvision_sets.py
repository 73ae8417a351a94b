"""Sets of torchvision, written in their own formats: pixels, labels, names, parts, refusals."""

import bz2
import csv
import functools
import hashlib
import pickle
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat

from harness import Dataset, UserError, load_dataset
from harness.data import folder as folders
from harness.data.torchvision_sets import SETS
from harness.provenance import provenance
from studies import replay

DRAWN = np.random.default_rng(0)
GREYS = DRAWN.integers(0, 256, (30, 8, 6), dtype=np.uint8)
COLOURS = DRAWN.integers(0, 256, (30, 3, 8, 6), dtype=np.uint8)
LABELS = np.arange(30) % 3


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def draw(file: Path, image: np.ndarray) -> None:
    """Write (H, W) or (3, H, W) as a file without loss."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.ascontiguousarray(np.moveaxis(image, 0, -1) if image.ndim == 3 else image)
    ).save(file)


def content(data: Dataset, part: str) -> list[tuple[bytes, int]]:
    """Return the images of a part, sorted, with their labels."""
    split = getattr(data, part)
    pairs = zip(split.images.numpy(), split.labels.tolist(), strict=True)
    return sorted((image.tobytes(), label) for image, label in pairs)


def pairs(images: np.ndarray, labels: np.ndarray) -> list[tuple[bytes, int]]:
    return sorted((i.tobytes(), int(n)) for i, n in zip(images, labels, strict=True))


def check(data: Dataset, images: np.ndarray, labels: np.ndarray, parts: dict[str, slice]) -> None:
    """Check each given part, and that the others are split off the training part."""
    others = content(data, "train")
    for part in ("val", "test"):
        if part in parts:
            assert content(data, part) == pairs(images[parts[part]], labels[parts[part]])
        else:
            assert len(getattr(data, part)) == len(images[parts["train"]]) // 10
            others += content(data, part)
    assert sorted(others) == pairs(images[parts["train"]], labels[parts["train"]])


# --- sets in their own formats ------------------------------------------------------------------


def cifar(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Write 40 training images and 10 for testing; return all of them and their labels."""
    made = getattr(torchvision.datasets, name)
    images = DRAWN.integers(0, 256, (50, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(50) % 4
    folder, key = root / made.base_folder, "labels" if name == "CIFAR10" else "fine_labels"
    folder.mkdir(parents=True)

    def write(entries, rows):
        for (file, _), chosen in zip(entries, np.array_split(rows, len(entries)), strict=True):
            batch = {"data": images[chosen].reshape(-1, 3072), key: labels[chosen].tolist()}
            (folder / file).write_bytes(pickle.dumps(batch))
        return [[file, md5(folder / file)] for file, _ in entries]

    monkeypatch.setattr(made, "train_list", write(made.train_list, np.arange(40)))
    monkeypatch.setattr(made, "test_list", write(made.test_list, np.arange(40, 50)))
    meta = folder / made.meta["filename"]
    meta.write_bytes(pickle.dumps({made.meta["key"]: ["cat", "dog", "frog", "ship"]}))
    monkeypatch.setattr(made, "meta", {**made.meta, "md5": md5(meta)})
    return images, labels


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_keeps_colours_labels_names_and_the_test_part(tmp_path, monkeypatch, name):
    images, labels = cifar(name, tmp_path, monkeypatch)
    data = load_dataset(f"torchvision:{name}", tmp_path)
    assert (data.name, data.image_shape) == (f"torchvision-{name}", (3, 32, 32))
    assert data.class_names == ("cat", "dog", "frog", "ship")
    check(data, images, labels, {"train": slice(40), "test": slice(40, 50)})
    assert load_dataset(f"torchvision:{name}", tmp_path).digest == data.digest


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, *_):
        """Write nothing."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """Serve the test's folder; return its address."""
    handler = functools.partial(Quiet, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_absent_set_is_downloaded(tmp_path, monkeypatch, served):
    made, source = torchvision.datasets.CIFAR10, tmp_path / "source"
    cifar("CIFAR10", source, monkeypatch)
    expected = load_dataset("torchvision:CIFAR10", source).digest
    archive = tmp_path / "there.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source / made.base_folder, made.base_folder)
    monkeypatch.setattr(made, "url", f"{served}/{archive.name}")
    monkeypatch.setattr(made, "tgz_md5", md5(archive))
    assert load_dataset("torchvision:CIFAR10", tmp_path / "new").digest == expected
    assert not [*(tmp_path / "new").glob(".*")]
    archive.unlink()  # read again where it is
    assert load_dataset("torchvision:CIFAR10", tmp_path / "new").digest == expected


def test_svhn(tmp_path, monkeypatch):
    for part, rows in (("train", slice(20)), ("test", slice(20, 30))):
        file = tmp_path / f"{part}_32x32.mat"
        digits = np.where(LABELS[rows] == 0, 10, LABELS[rows])[:, None]  # 10 stands for 0
        savemat(file, {"X": COLOURS[rows].transpose(2, 3, 1, 0), "y": digits.astype(np.uint8)})
        entry = ["", file.name, md5(file)]
        monkeypatch.setitem(torchvision.datasets.SVHN.split_list, part, entry)
    data = load_dataset("torchvision:SVHN", tmp_path)
    assert (data.image_shape, data.classes, data.class_names) == ((3, 8, 6), 3, ())
    check(data, COLOURS, LABELS, {"train": slice(20), "test": slice(20, 30)})


def test_usps(tmp_path):
    images = DRAWN.integers(0, 256, (30, 256), dtype=np.uint8)
    for name, rows in (("usps.bz2", range(20)), ("usps.t.bz2", range(20, 30))):
        with bz2.open(tmp_path / name, "wt") as file:
            for i in rows:
                values = (images[i] + 0.5) / 127.5 - 1  # half a level from what is cut off
                pixels = " ".join(f"{k}:{value:.6f}" for k, value in enumerate(values, 1))
                file.write(f"{LABELS[i] + 1} {pixels}\n")
    data = load_dataset("torchvision:USPS", tmp_path)
    assert data.image_shape == (1, 16, 16)
    check(data, images, LABELS, {"train": slice(20), "test": slice(20, 30)})


def idx(file: Path, values: np.ndarray) -> None:
    sizes = b"".join(int(size).to_bytes(4, "big") for size in values.shape)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes())


def emnist(root: Path) -> None:
    for part, rows in (("train", slice(20)), ("test", slice(20, 30))):
        idx(root / f"EMNIST/raw/emnist-balanced-{part}-images-idx3-ubyte", GREYS[rows])
        idx(root / f"EMNIST/raw/emnist-balanced-{part}-labels-idx1-ubyte", LABELS[rows])


def test_emnist_is_its_balanced_split(tmp_path):
    emnist(tmp_path)
    data = load_dataset("torchvision:EMNIST", tmp_path)
    assert (data.image_shape, data.classes, data.class_name(10)) == ((1, 8, 6), 47, "A")
    check(data, GREYS, LABELS, {"train": slice(20), "test": slice(20, 30)})


def rendered(root: Path, images: np.ndarray = GREYS) -> list[int]:
    """Write 20 training images, 6 for validation and 4 for testing; return their labels."""
    places = ["train"] * 20 + ["valid"] * 6 + ["test"] * 4
    for i, (image, part) in enumerate(zip(images, places, strict=True)):
        draw(root / f"rendered-sst2/{part}/{('negative', 'positive')[i % 2]}/{i}.png", image)
    return [i % 2 for i in range(30)]


@pytest.mark.parametrize("images", [GREYS, COLOURS], ids=["grey", "colour"])
def test_official_validation_images_are_the_validation_part(tmp_path, images):
    labels = np.asarray(rendered(tmp_path, images))
    data = load_dataset("torchvision:RenderedSST2", tmp_path)
    assert data.image_shape[0] == (3 if images is COLOURS else 1)
    assert data.class_names == ("negative", "positive")
    check(data, images, labels, {"train": slice(20), "val": slice(20, 26), "test": slice(26, 30)})


def eurosat(root: Path, image_size: tuple[int, int] = (8, 6)) -> None:
    for i, image in enumerate(COLOURS[:, :, : image_size[0], : image_size[1]]):
        draw(root / "eurosat" / "2750" / "ABC"[LABELS[i]] / f"{i}.png", image)


def test_a_set_without_parts_is_split(tmp_path):
    eurosat(tmp_path)
    data = load_dataset("torchvision:EuroSAT", tmp_path)
    assert [len(part) for part in (data.train, data.val, data.test)] == [24, 3, 3]
    assert data.class_names == ("A", "B", "C")
    check(data, COLOURS, LABELS, {"train": slice(30)})


def gtsrb(root: Path, sizes: int) -> None:
    """Write squares of that many sizes."""
    for i, image in enumerate(COLOURS[:, :, :6, :6]):
        side = 6 - i % sizes
        folder = f"Training/{LABELS[i]:05d}" if i < 20 else "Final_Test/Images"
        draw(root / "gtsrb" / "GTSRB" / folder / f"{i:05d}.ppm", image[:, :side, :side])
    with (root / "gtsrb" / "GT-final_test.csv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["Filename", "ClassId"])
        rows.writerows([f"{i:05d}.ppm", LABELS[i]] for i in range(20, 30))


def test_images_of_one_size_are_read_as_they_are(tmp_path):
    gtsrb(tmp_path, 1)
    data = load_dataset("torchvision:GTSRB", tmp_path)
    squares = np.ascontiguousarray(COLOURS[:, :, :6, :6])
    check(data, squares, LABELS, {"train": slice(20), "test": slice(20, 30)})


def test_several_sizes_need_an_image_size(tmp_path):
    gtsrb(tmp_path, 2)
    found = "image . has . x . pixels, image 0 6 x 6: give --image-size"
    with pytest.raises(UserError, match=f"torchvision:GTSRB in {tmp_path}: {found}"):
        load_dataset("torchvision:GTSRB", tmp_path)
    data = load_dataset("torchvision:GTSRB", tmp_path, image_size=(4, 5))
    assert (data.image_shape, len(data.test)) == ((3, 4, 5), 10)
    whole = {image for image, _ in content(data, "test")}
    resized = [
        np.array(
            Image.fromarray(
                np.ascontiguousarray(np.moveaxis(image[:, : 6 - i % 2, : 6 - i % 2], 0, -1))
            ).resize((5, 4), Image.Resampling.BILINEAR)
        )
        for i, image in enumerate(COLOURS[:, :, :6, :6])
    ]
    assert whole == {image.transpose(2, 0, 1).tobytes() for image in resized[20:]}


def test_depth_and_background_are_those_of_a_folder(tmp_path):
    for i, value in enumerate(np.linspace(0, 4095, 30).astype(np.uint16)):
        place = tmp_path / "eurosat" / "2750" / "ABC"[i % 3] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), value)).save(place)
    with pytest.raises(UserError, match="from 0 to 4095: .*--image-range 0 4095"):
        load_dataset("torchvision:EuroSAT", tmp_path)
    given = {"image_range": [0, 4095], "background": "black"}
    data = load_dataset("torchvision:EuroSAT", tmp_path, **given)
    assert data.options == given
    assert max(int(part.images.max()) for part in (data.train, data.val, data.test)) == 255


def test_grey_and_coloured_images_are_read_together(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "BLOCK", 4)  # the first two blocks are grey
    for i in range(30):
        image = GREYS[i] if LABELS[i] == 0 else COLOURS[i]
        place = tmp_path / "caltech101" / "101_ObjectCategories" / "abc"[LABELS[i]]
        draw(place / f"image_{i // 3 + 1:04d}.jpg", image)
    draw(place.parent / "BACKGROUND_Google" / "image_0001.jpg", GREYS[0])
    data = load_dataset("torchvision:Caltech101", tmp_path)
    assert (data.image_shape, data.class_names) == ((3, 8, 6), ("a", "b", "c"))
    every = [pair for part in ("train", "val", "test") for pair in content(data, part)]
    grey = [np.frombuffer(image, np.uint8).reshape(3, -1) for image, label in every if label == 0]
    assert len(grey) == 10
    assert all((image == image[0]).all() for image in grey)


def omniglot(root: Path, monkeypatch: pytest.MonkeyPatch, order: list[int]) -> None:
    folder = root / "omniglot-py" / "images_background"
    for i in order:
        draw(folder / ("Latin/b", "Greek/a", "Greek/b")[LABELS[i]] / f"{i:02d}.png", GREYS[i])
    archive = folder.with_suffix(".zip")
    archive.touch()
    monkeypatch.setitem(torchvision.datasets.Omniglot.zips_md5, folder.name, md5(archive))


def test_the_order_of_a_file_system_does_not_matter(tmp_path, monkeypatch):
    # That of a list of files is the file system's in torchvision, for Omniglot that of classes too.
    from torchvision.datasets import omniglot as module

    omniglot(tmp_path, monkeypatch, [*range(30)])
    data = load_dataset("torchvision:Omniglot", tmp_path)
    assert data.class_names == ("Greek/a", "Greek/b", "Latin/b")
    check(data, GREYS, np.choose(LABELS, [2, 0, 1]), {"train": slice(30)})
    monkeypatch.setattr(
        module, "list_dir", lambda folder: sorted(p.name for p in Path(folder).iterdir())[::-1]
    )
    assert load_dataset("torchvision:Omniglot", tmp_path).digest == data.digest


def test_a_part_without_labels_is_split_off(tmp_path, monkeypatch):
    folder, made = tmp_path / "fer2013", torchvision.datasets.FER2013
    folder.mkdir()
    images = DRAWN.integers(0, 256, (30, 48, 48), dtype=np.uint8)
    pixels = [" ".join(map(str, image.ravel())) for image in images]
    lines = [f"{label},{values}" for label, values in zip(LABELS, pixels, strict=True)]
    (folder / "train.csv").write_text("\n".join(["emotion,pixels", *lines]))
    (folder / "test.csv").write_text("\n".join(["pixels", *pixels[:5]]))
    for part in ("train", "test"):
        file = folder / f"{part}.csv"
        monkeypatch.setitem(made._RESOURCES, part, (file.name, md5(file)))
    check(load_dataset("torchvision:FER2013", tmp_path), images, LABELS, {"train": slice(30)})


def test_a_class_of_several_names_has_the_first(tmp_path):
    wordnet = ["n01440764", "n02102040", "n02979186"]
    for i in range(30):
        part = "train" if i < 20 else "val"
        draw(tmp_path / "imagenette2" / part / wordnet[LABELS[i]] / f"{i}.png", COLOURS[i])
        file = tmp_path / "imagenette2" / part / wordnet[LABELS[i]] / f"{i}.png"
        file.rename(file.with_suffix(".jpeg"))
    data = load_dataset("torchvision:Imagenette", tmp_path)
    assert data.class_names == ("tench", "English springer", "cassette player")
    check(data, COLOURS, LABELS, {"train": slice(20), "val": slice(20, 30)})


@pytest.mark.parametrize("name", sorted(SETS))
def test_every_set_takes_the_arguments_of_its_parts(tmp_path, name, monkeypatch):
    # Torchvision looks at them before it misses the files.
    made = getattr(torchvision.datasets, name)
    monkeypatch.setattr(torchvision.datasets.SEMEION, "download", lambda _: None)
    for given in SETS[name].values():
        with pytest.raises((RuntimeError, FileNotFoundError), match="found|No such file"):
            made(str(tmp_path), **given)


@pytest.mark.parametrize("size", [None, 4, (4, 5)])
def test_a_replay_loads_a_set_in_the_size_of_its_record(tmp_path, size):
    gtsrb(tmp_path, 1)
    data = load_dataset("torchvision:GTSRB", tmp_path, size)
    record = SimpleNamespace(made_with=provenance(data, "cpu"), run_id="r")
    assert replay.load(record, tmp_path).digest == data.digest


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("cifar10", "did you mean CIFAR10"),
        ("CIFAR", "did you mean CIFAR10"),
        ("CelebA", "choose one of CIFAR10, .*USPS"),
        ("VOCDetection", "choose one of"),
        ("ImageFolder", "choose one of"),
        ("FakeData", "choose one of"),
        ("", "choose one of"),
        ("__init__", "choose one of"),
    ],
)
def test_other_names_are_refused(tmp_path, name, answer):
    with pytest.raises(
        UserError, match=f"torchvision:{name}: no such classification set; .*{answer}"
    ):
        load_dataset(f"torchvision:{name}", tmp_path)


@pytest.fixture
def offline(monkeypatch):
    nowhere = "http://127.0.0.1:9/nothing.zip"
    sets = torchvision.datasets
    monkeypatch.setattr(sets.CIFAR10, "url", nowhere)
    monkeypatch.setattr(sets.EMNIST, "url", nowhere)
    monkeypatch.setattr(sets.SEMEION, "url", nowhere)
    monkeypatch.setattr(sets.RenderedSST2, "_URL", nowhere)
    monkeypatch.setitem(sets.USPS.split_list, "train", [nowhere, "usps.bz2", ""])


ABSENT = ["CIFAR10", "EMNIST", "SEMEION", "RenderedSST2", "USPS", "StanfordCars", "FER2013"]


@pytest.mark.parametrize("name", ABSENT)
def test_a_set_that_cannot_be_downloaded_is_refused_and_leaves_nothing(tmp_path, offline, name):
    root = tmp_path / "some" / "data"
    with pytest.raises(
        UserError, match=f"torchvision:{name}: no usable data in {root} "
    ) as refused:
        load_dataset(f"torchvision:{name}", root)
    assert "\n" not in str(refused.value)
    assert "--data-dir" in str(refused.value)
    assert not [*tmp_path.iterdir()]


def test_a_download_that_failed_is_begun_again(tmp_path, offline, monkeypatch):
    emnist(tmp_path / "there")
    with pytest.raises(UserError, match="EMNIST: no usable data"):
        load_dataset("torchvision:EMNIST", tmp_path / "new")
    monkeypatch.setattr(torchvision.datasets.EMNIST, "download", lambda _: emnist(tmp_path / "new"))
    new, there = (
        load_dataset("torchvision:EMNIST", tmp_path / place) for place in ("new", "there")
    )
    assert new.digest == there.digest


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, offline):
    root = tmp_path / "file"
    root.touch()
    for name in ("CIFAR10", "EMNIST", "USPS", "RenderedSST2"):
        with pytest.raises(UserError, match=f"{name}: no usable data in {root} "):
            load_dataset(f"torchvision:{name}", root)


def test_folders_that_were_there_stay(tmp_path, offline):
    (tmp_path / "EMNIST" / "raw").mkdir(parents=True)
    with pytest.raises(UserError, match="EMNIST: no usable data"):
        load_dataset("torchvision:EMNIST", tmp_path)
    assert (tmp_path / "EMNIST" / "raw").is_dir()


def test_broken_files_are_refused(tmp_path, offline, monkeypatch):
    cifar("CIFAR10", tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"0")
    emnist(tmp_path)
    cut = tmp_path / "EMNIST/raw/emnist-balanced-train-images-idx3-ubyte"
    cut.write_bytes(cut.read_bytes()[:100])
    (tmp_path / "usps.bz2").write_bytes(b"BZh9 not at all")
    for name in ("CIFAR10", "EMNIST", "USPS"):
        with pytest.raises(UserError, match=f"{name}: no usable data in {tmp_path}") as refused:
            load_dataset(f"torchvision:{name}", tmp_path)
        assert "\n" not in str(refused.value)
    eurosat(tmp_path)
    picture = tmp_path / "eurosat" / "2750" / "A" / "12.png"
    picture.write_bytes(picture.read_bytes()[:90])
    with pytest.raises(UserError, match=f"EuroSAT in {tmp_path}: .* cannot be read: {picture}"):
        load_dataset("torchvision:EuroSAT", tmp_path)


def test_a_set_whose_download_was_stopped_is_refused(tmp_path, monkeypatch):
    def stopped(*_, **__):
        eurosat(tmp_path)
        (tmp_path / "eurosat" / "2750" / "A" / "12.png").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets.EuroSAT, "download", stopped)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("torchvision:EuroSAT", tmp_path)
    mark = tmp_path / ".EuroSAT-train-unfinished"
    for _ in range(2):
        with pytest.raises(UserError, match=f"download was stopped: delete .*, and {mark}"):
            load_dataset("torchvision:EuroSAT", tmp_path)


def test_an_image_size_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="image_size=0"):
        load_dataset("torchvision:CIFAR10", tmp_path, image_size=0)
