"""A user's own images: tensors and folders, checked, split, and through every metric."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness import (
    Dataset,
    RunConfig,
    UserError,
    evaluate,
    load_dataset,
    measure_quality,
    train,
)
from harness.linear import pca
from harness.linear.vae import linear_metrics
from harness.models.vae import build

COLOURS = torch.randint(0, 256, (40, 3, 5, 7), dtype=torch.uint8)
LABELS = torch.arange(40) % 4


def own(images=COLOURS, labels=LABELS, **given) -> Dataset:
    return Dataset.from_tensors("mine", images, labels, **given)


# --- tensors ------------------------------------------------------------------------------------


def test_images_keep_their_values_labels_and_channels():
    data = own()
    assert (data.image_shape, data.classes, data.pixels) == ((3, 5, 7), 4, 105)
    images = torch.cat([data.train.images, data.val.images, data.test.images])
    labels = torch.cat([data.train.labels, data.val.labels, data.test.labels])
    known = {
        tuple(row.tolist()): int(label)
        for row, label in zip(COLOURS.flatten(1), LABELS, strict=True)
    }
    assert {tuple(r.tolist()): int(n) for r, n in zip(images, labels, strict=True)} == known


def test_the_digest_tells_parts_and_labels_apart_and_is_reproduced():
    rows = {"train": range(36), "val": [36, 37], "test": [38, 39]}
    others = {"train": range(36), "val": [38, 39], "test": [36, 37]}
    every = [own(), own(rows=rows), own(rows=others), own(labels=LABELS.flip(0)), own(labels=None)]
    assert len({data.digest for data in every}) == 5
    assert own(rows=rows).digest == every[1].digest


NUMBERED = torch.arange(40, dtype=torch.uint8).view(40, 1, 1)


def test_the_made_split_is_8_to_1_to_1_and_pinned():
    data = own(NUMBERED)
    assert [len(part) for part in (data.train, data.val, data.test)] == [32, 4, 4]
    assert data.val.images[:, 0].tolist() == [26, 39, 25, 22]
    assert data.test.images[:, 0].tolist() == [38, 1, 4, 23]


def test_given_parts_are_kept_and_missing_ones_come_from_training():
    data = own(NUMBERED, rows={"train": range(10, 40), "test": range(10)})
    assert sorted(data.test.images[:, 0].tolist()) == list(range(10))
    assert data.test.images[:, 0].tolist() != list(range(10))  # `head` takes any of them
    assert [len(data.train), len(data.val)] == [27, 3]
    both = torch.cat([data.train.images, data.val.images])[:, 0]
    assert sorted(both.tolist()) == list(range(10, 40))


@pytest.mark.parametrize("largest", [255, 7])
def test_floats_are_rounded_to_256_levels(largest):
    x = torch.linspace(0, 1, 40 * 6).view(40, 2, 3)
    data = own(x.numpy(), largest=largest)
    assert data.image_shape == (1, 2, 3)
    pixels = data.train.pixels(slice(None), torch.float64)
    found = {float(p) for p in pixels.flatten()}
    assert all(min(abs(p - q) for q in x.flatten().tolist()) < 0.6 / 255 for p in found)


def test_integers_are_shares_of_the_largest():
    images = torch.full((40, 2, 2), 3, dtype=torch.uint8)
    images[:, 0, 0] = torch.arange(40) % 5
    pixels = own(images, largest=4).train.pixels(slice(None), torch.float64)
    assert set(pixels[:, 0].tolist()) == {0, 0.25, 0.5, 0.75, 1}
    assert (pixels[:, 1:] == 0.75).all()


def test_images_without_labels_have_no_class():
    data = own(labels=None)
    assert data.classes == 0
    assert not data.has_classes
    assert own(labels=torch.zeros(40, dtype=torch.int64)).classes == 1
    assert own(class_names=["a", "b", "c", "d"]).class_name(2) == "c"
    assert own().class_name(2) == "2"


def test_the_variance_of_a_pixel(data):
    x = data.train.pixels(slice(None), torch.float64)
    assert data.pixel_variance == pytest.approx(float(x.var(0, correction=0).mean()), rel=1e-12)


WRONG = {
    "a slash in the name": ({"name": "a/b"}, "name='a/b'"),
    "a name in use": ({"name": "mnist"}, "taken"),
    "five axes": ({"images": torch.zeros(40, 1, 3, 3, 1)}, r"shape \(40, 1, 3, 3, 1\)"),
    "channels last": ({"images": torch.zeros(40, 5, 7, 3)}, r"permute\(0, 3, 1, 2\)"),
    "two channels": ({"images": torch.zeros(40, 2, 5, 7)}, "1 or 3 channels"),
    "no pixels": ({"images": torch.zeros(40, 1, 0, 7)}, "shape"),
    "no images": ({"images": torch.zeros(0, 5, 7)}, "shape"),
    "whole numbers": ({"images": torch.zeros(40, 5, 7, dtype=torch.int64)}, "torch.int64"),
    "floats to 255": ({"images": torch.full((40, 5, 7), 255.0)}, "from 255 to 255"),
    "negative": ({"images": torch.full((40, 5, 7), -0.1)}, "from -0.1 to"),
    "NaN": ({"images": torch.full((40, 5, 7), torch.nan)}, "nan"),
    "above the largest": ({"largest": 16}, "give largest="),
    "largest 0": ({"largest": 0}, "largest=0"),
    "labels too few": ({"labels": torch.zeros(39, dtype=torch.int64)}, r"\(39,\)"),
    "float labels": ({"labels": torch.zeros(40)}, "one whole number"),
    "negative labels": ({"labels": LABELS - 1}, "from -1 to 2"),
    "codes as labels": ({"labels": LABELS * 10_000}, "from 0 to 30000.* below 10000"),
    "names too few": ({"class_names": ["a"]}, "class_names has 1 names"),
    "names without labels": ({"labels": None, "class_names": ["a"]}, "class_names has 1 names"),
    "an unknown part": ({"rows": {"train": range(20), "dev": range(20, 40)}}, "'dev'"),
    "no training part": ({"rows": {"test": range(20)}}, "name 'train'"),
    "a row twice": ({"rows": {"train": range(40), "test": [0, 1]}}, "once at most"),
    "a row that is not there": ({"rows": {"train": range(1, 41)}}, "once at most"),
    "a negative row": ({"rows": {"train": range(-1, 30)}}, "once at most"),
    "rows that are no whole numbers": ({"rows": {"train": [0.5, 1.5, 2.5]}}, "whole numbers"),
    "rows as a short mask": ({"rows": {"train": [True] * 39}}, "whole numbers"),
    "no rows": ({"rows": {"train": range(30), "test": []}}, "'test' has 0 images"),
    "one image": ({"rows": {"train": range(30), "test": [39]}}, "'test' has 1 images"),
    "one picture again and again": ({"images": torch.ones(40, 5, 7)}, "are the same"),
    "too few to split": ({"images": COLOURS[:19], "labels": None}, "19 images"),
}


@pytest.mark.parametrize(("given", "expected"), WRONG.values(), ids=WRONG.keys())
def test_tensors_that_cannot_be_used_are_refused(given, expected):
    with pytest.raises(UserError, match=expected) as refused:
        Dataset.from_tensors(**{"name": "mine", "images": COLOURS, "labels": LABELS} | given)
    assert "\n" not in str(refused.value)


def test_the_example_of_the_page_runs():
    page = (Path(__file__).resolve().parents[1] / "docs" / "own-data.md").read_text()
    (code,) = re.findall(r"## Tensors.*?```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(compile(code, "own-data.md", "exec"), names)
    assert names["result"].model(names["images"][:4]).shape == (4, 3, 12, 16)
    assert [len(getattr(names["data"], part)) for part in ("train", "val", "test")] == [135, 15, 50]
    assert names["data"].class_name(1) == "dogs"


# --- folders ------------------------------------------------------------------------------------


def draw(file: Path, shape=(6, 9), mode="RGB", value=0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(value).integers(0, 256, (*shape, *channels), dtype=np.uint8)
    Image.fromarray(pixels, mode).save(file)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with two classes of twelve small pictures, in colour."""
    for i in range(24):
        draw(tmp_path / "own pictures" / ("cats" if i % 2 else "dogs") / f"{i:02d}.png", value=i)
    return tmp_path / "own pictures"


def test_a_folder_is_read_in_torchvisions_order(folder):
    from torchvision.datasets import ImageFolder

    (folder / "cats" / "notes.txt").write_text("no image by its name")
    (folder / ".hidden").mkdir()
    data = load_dataset(f"folder:{folder}")
    theirs = ImageFolder(folder, allow_empty=True)
    pixels = np.stack([np.asarray(picture).transpose(2, 0, 1) for picture, _ in theirs])
    labels = [label - 1 for label in theirs.targets]  # theirs takes the hidden folder for a class
    assert data.digest == own(pixels, labels).digest
    assert (data.name, data.image_shape) == ("folder-own-pictures", (3, 6, 9))
    assert data.class_names == ("cats", "dogs")
    assert [len(part) for part in (data.train, data.val, data.test)] == [20, 2, 2]
    again = load_dataset(f"folder:{folder}/")
    assert torch.equal(again.test.images, data.test.images)


def test_grey_files_are_grey_and_mixed_ones_are_in_colour(folder):
    for i, file in enumerate(sorted(folder.rglob("*.png"))[:-1]):
        draw(file, mode="L", value=i)
    assert load_dataset(f"folder:{folder}").image_shape == (3, 6, 9)
    draw(file.parent / "23.png", mode="L")
    draw(folder / "dogs" / "22.png", mode="L")
    assert load_dataset(f"folder:{folder}").image_shape == (1, 6, 9)


@pytest.mark.parametrize(("given", "size"), [(4, (4, 4)), ((4, 7), (4, 7)), ([5], (5, 5))])
def test_images_are_resized(folder, given, size):
    draw(folder / "dogs" / "other.png", (40, 30), "RGBA")
    data = load_dataset(f"folder:{folder}", image_size=given)
    assert data.image_shape == (3, *size)


def test_sixteen_bits_are_cut_to_eight(tmp_path):
    for i in range(20):
        pixels = np.full((3, 4), 256 * (200 + i) + 77, dtype=np.uint16)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    data = load_dataset(f"folder:{tmp_path}")
    assert sorted(data.train.images[:, 0].tolist() + data.val.images[:, 0].tolist()) == sorted(
        set(range(200, 220)) - set(data.test.images[:, 0].tolist())
    )


def test_parts_in_folders_are_kept(tmp_path):
    for part, count in (("train", 30), ("test", 6)):
        for i in range(count):
            draw(tmp_path / part / ("a" if i % 3 else "b") / f"{i}.png", value=i)
    data = load_dataset(f"folder:{tmp_path}")
    assert [len(part) for part in (data.train, data.val, data.test)] == [27, 3, 6]
    official = {f.relative_to(tmp_path / "test") for f in (tmp_path / "test").rglob("*.png")}
    expected = {np.asarray(Image.open(tmp_path / "test" / f)).tobytes() for f in official}
    found = data.test.images.unflatten(1, data.image_shape).permute(0, 2, 3, 1).contiguous()
    assert {image.numpy().tobytes() for image in found} == expected


def test_a_folder_without_classes_has_no_labels(tmp_path):
    for i in range(20):
        draw(tmp_path / f"{i}.png", value=i)
    assert load_dataset(f"folder:{tmp_path}").classes == 0


def broken_picture(folder: Path) -> str:
    (folder / "dogs" / "x.png").write_bytes((folder / "dogs" / "00.png").read_bytes()[:90])
    return "1 of 25 images cannot be read: .*x.png"


def no_picture(folder: Path) -> str:
    (folder / "dogs" / "page.jpg").write_text("<html>")
    return "cannot be read: .*page.jpg"


def empty_picture(folder: Path) -> str:
    (folder / "dogs" / "nothing.png").touch()
    return "cannot be read: .*nothing.png"


def floats(folder: Path) -> str:
    Image.fromarray(np.zeros((6, 9), np.float32)).save(folder / "dogs" / "f.tif")
    return "more than 8 bits, in all from 0.0 to 0.0: .*f.tif"


def two_sizes(folder: Path) -> str:
    draw(folder / "dogs" / "wide.png", (6, 10))
    return "wide.png has 6 x 10 pixels, .*png 6 x 9: give --image-size"


def huge(folder: Path) -> str:
    draw(folder / "cats" / "00.png", (513, 2), "L")
    return "513 x 2 pixels: give --image-size"


def an_empty_class(folder: Path) -> str:
    (folder / "birds").mkdir()
    return "birds"


def no_pictures(folder: Path) -> str:
    for file in folder.rglob("*.png"):
        file.rename(file.with_suffix(".dat"))
    return "cats: no image in it"


def nothing(folder: Path) -> str:
    for file in folder.rglob("*.png"):
        file.unlink()
    (folder / "cats").rmdir()
    (folder / "dogs").rmdir()
    return "no image in it"


def other_classes(folder: Path) -> str:
    (folder / "cats").rename(folder / "c")
    (folder / "dogs").rename(folder / "d")
    for part, own_class in (("train", "d"), ("test", "c")):
        (folder / part).mkdir()
        (folder / own_class).rename(folder / part / own_class)
    return r"classes \['c'\] are not those of training, \['d'\]"


BROKEN = (
    *(broken_picture, no_picture, empty_picture, floats, two_sizes, huge, an_empty_class),
    *(no_pictures, nothing, other_classes),
)


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_folder_that_cannot_be_used_is_refused(folder, damage):
    expected = damage(folder)
    with pytest.raises(UserError, match=f"(?i){expected}") as refused:
        load_dataset(f"folder:{folder}")
    assert "\n" not in str(refused.value)


def test_a_folder_that_links_to_itself_is_read_once(folder):
    expected = load_dataset(f"folder:{folder}").digest
    (folder / "dogs" / "again").symlink_to(folder / "dogs")
    (folder / "dogs" / "more").symlink_to(folder / "dogs" / "again")
    assert load_dataset(f"folder:{folder}").digest == expected


def test_a_folder_that_cannot_be_listed_is_refused():
    with pytest.raises(UserError, match="cannot be listed") as refused:
        load_dataset(f"folder:{'a' * 300}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("size", [0, -1, 513, (4, 4, 4), (), 28.0, [28.5, 28.5], "28"])
def test_an_image_size_that_is_none_is_refused(folder, size):
    with pytest.raises(UserError, match="image_size="):
        load_dataset(f"folder:{folder}", image_size=size)


def test_only_own_images_are_resized():
    with pytest.raises(UserError, match="only folder:PATH and torchvision:PATH"):
        load_dataset("digits", image_size=4)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        load_dataset(f"folder:{tmp_path}/none")


# --- metrics ------------------------------------------------------------------------------------

FEW = {"hidden": (8,), "channels": (4, 5), "latent_size": 3, "epochs": 2, "batch_size": 8}


@pytest.mark.parametrize("model", ["mlp", "linear", "conv"])
def test_colour_images_have_every_metric(model, tmp_path):
    data = own()
    *_, last = train([RunConfig(model=model, kl_weight=0.1, **FEW)], data, device="cpu")
    runs = [(last.configs[0], last.model(0))]
    (ends,), (quality,) = evaluate(runs, data), measure_quality(runs, data, tmp_path)
    wanted = {"neg_elbo", "mse_class/3", "gap_to_linear", "kl/2"}
    assert wanted <= ends.keys()
    more = {"frechet", "probe_accuracy", "knn_accuracy", "neg_log_likelihood", "aggregate_gap"}
    assert more <= quality.keys()


@pytest.mark.parametrize("labels", [None, torch.zeros(40, dtype=torch.int64)])
def test_without_two_classes_their_metrics_are_left_out_and_the_others_are_the_same(
    labels, tmp_path
):
    configs = [RunConfig(kl_weight=0.1, **FEW)]
    found = []
    for data in (own(), own(labels=labels)):
        *_, last = train(configs, data, device="cpu")
        runs = [(configs[0], last.model(0))]
        found.append(evaluate(runs, data)[0] | measure_quality(runs, data, tmp_path)[0])
    labelled, bare = found
    of_classes = {"probe_accuracy", "knn_accuracy", "feature_accuracy"}
    left = {k for k in labelled if "mse_class" in k or "frechet" in k or k in of_classes}
    kept = {k for k in bare if "mse_class" in k}
    assert len(kept) == (0 if labels is None else 3)
    assert {k: v for k, v in bare.items() if k not in kept} == {
        k: v for k, v in labelled.items() if k not in left
    }


def test_large_images_have_no_linear_model(monkeypatch):
    monkeypatch.setattr(pca, "MOST_PIXELS", 104)
    data, config = own(), RunConfig(kl_weight=0.1, sigma="learned", **FEW)
    *_, last = train([config], data, device="cpu")
    assert np.isnan(last.val["gap_to_linear"]).all()
    assert linear_metrics(config, data) == {}


def test_a_run_without_error_left_has_no_linear_neg_elbo():
    data = own(torch.randint(0, 256, (40, 3, 3), dtype=torch.uint8))
    found = linear_metrics(RunConfig(kl_weight=0, latent_size=10), data)
    assert found["linear/mse"] == 0
    assert "linear/neg_elbo" not in found


def test_a_model_of_convolutions_is_stored_and_loaded(tmp_path):
    from harness.models.files import load_model, save_model

    config = RunConfig(model="conv", **FEW)
    model = build(config, (3, 5, 7), largest=16)
    save_model(config, model, tmp_path)
    before = torch.get_rng_state()
    found, back = load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert (found, back.largest) == (config, 16)
    for name, weights in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weights)
    other = replace(config, channels=(4, 6))
    (tmp_path / "config.json").write_text(other.to_json())
    with pytest.raises(UserError, match="size mismatch"):
        load_model(tmp_path)
