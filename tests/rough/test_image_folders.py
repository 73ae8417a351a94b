"""Folders of images as people have them: depth, transparency, parts, and what is left out."""

import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness import Dataset, UserError, load_dataset

DRAWN = np.random.default_rng(0)
SIDE = 4


def save(file: Path, pixels: np.ndarray, mode: str | None = None, **more) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(file, **more)


def grey(file: Path, value: int) -> None:
    save(file, np.full((SIDE, SIDE), value, np.uint8))


def fill(folder: Path, count: int = 20, first: int = 0, ending: str = ".png") -> None:
    """Write grey images of distinct values."""
    for i in range(first, first + count):
        grey(folder / f"{i:03d}{ending}", i)


def two_classes(path: Path) -> None:
    fill(path / "cats", 12)
    fill(path / "dogs", 12, 12)


def read(path: Path, **options) -> Dataset:
    return load_dataset(f"folder:{path}", **options)


def levels(data: Dataset) -> list[int]:
    """Return the first value of every image, sorted."""
    parts = (data.train, data.val, data.test)
    return sorted(int(image[0]) for part in parts for image in part.images)


def refusal(path: Path, **options) -> str:
    with pytest.raises(UserError) as refused:
        read(path, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- depth --------------------------------------------------------------------------------------


def png16(file: Path, pixels: np.ndarray) -> None:
    """Write colours (H, W, 3), or with opacity (H, W, 4), of 16 bits, which Pillow cannot."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    kind = {3: 2, 4: 6}[pixels.shape[2]]
    header = struct.pack(">IIBBBBB", *pixels.shape[1::-1], 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
    )


def ramp(kind: type, largest: float, ending: str = ".png", least: float = 0) -> Callable:
    """Return what writes 20 images, each of one value."""

    def write(path: Path) -> None:
        for i, value in enumerate(np.linspace(least, largest, 20)):
            save(path / f"{i:02d}{ending}", np.full((SIDE, SIDE), value, kind))

    return write


def colours(largest: int) -> Callable:
    def write(path: Path) -> None:
        for i, value in enumerate(np.linspace(0, largest, 20)):
            png16(path / f"{i:02d}.png", np.full((SIDE, SIDE, 3), int(value)))

    return write


def near(path: Path) -> None:
    """Write images of full depth that differ by less than a level of 8 bits."""
    for i in range(20):
        save(path / f"{i:02d}.png", np.array([[50_000 + i, 0]], np.uint16))


def as_8(scale: float) -> list[int]:
    return [round(v) for v in np.linspace(0, 255, 20) * scale]


TWELVE = np.linspace(0, 4095, 20).astype(int)
DEPTHS = {
    # images, options, levels or the refusal
    "12 bits in a PNG": (
        ramp(np.uint16, 4095),
        {},
        "in all from 0 to 4095: .*--image-range 0 4095",
    ),
    "10 bits in a TIFF": (
        ramp(np.uint16, 1023, ".tif"),
        {},
        "from 0 to 1023: .*image-range 0 1023",
    ),
    "a label map of 16 bits": (ramp(np.uint16, 19), {}, "from 0 to 19: .*--image-range 0 31"),
    "not quite half of 16 bits": (ramp(np.uint16, 32_767), {}, "from 0 to 32767"),
    "half of 16 bits": (
        ramp(np.uint16, 32_768),
        {},
        [int(v) >> 8 for v in np.linspace(0, 32_768, 20)],
    ),
    "all 16 bits": (ramp(np.uint16, 65_535), {}, [int(v) >> 8 for v in np.linspace(0, 65_535, 20)]),
    "all 16 bits in a PGM": (
        ramp(np.uint16, 65_535, ".pgm"),
        {},
        [int(v) >> 8 for v in np.linspace(0, 65_535, 20)],
    ),
    "12 bits with a range": (
        ramp(np.uint16, 4095),
        {"image_range": (0, 4095)},
        [round(int(v) * 255 / 4095) for v in TWELVE],
    ),
    "depth in metres": (
        ramp(np.float32, 7.5, ".tif"),
        {},
        r"from 0.0 to 7.5: .*--image-range 0.0 7.5",
    ),
    "depth with a range": (ramp(np.float32, 8, ".tif"), {"image_range": (0, 8)}, as_8(1)),
    "32 bits": (ramp(np.int32, 70_000, ".tif"), {}, "from 0 to 70000"),
    "below zero": (ramp(np.int32, 40_000, ".tif", -1), {}, "from -1 to 40000: .*-range -1 40000"),
    "a range below zero": (
        ramp(np.float32, 10, ".tif", -10),
        {"image_range": (-10.0, 10.0)},
        as_8(1),
    ),
    "values outside": (
        ramp(np.uint16, 4095),
        {"image_range": (0, 4000)},
        "values outside --image-range 0 4000, in all from 4095 to 4095: .*-range 0 4095.*19.png$",
    ),
    "no number": (
        ramp(np.float32, np.nan, ".tif"),
        {"image_range": (0, 1)},
        "20 of 20 .*values that are not finite",
    ),
    "8 bits with a range": (ramp(np.uint8, 19), {"image_range": (0, 19)}, None),
    "12 bits in colour": (colours(4095), {}, "from 0 to 4095: .*save .* 8 bits"),
    "16 bits in colour": (colours(65_535), {}, [int(v) >> 8 for v in np.linspace(0, 65_535, 20)]),
    "colour and a range": (colours(4095), {"image_range": (0, 4095)}, "20 of 20.*colours of 16"),
    "lost below 8 bits": (
        near,
        {},
        "the images differ, but in nothing that is left by 8 bits",
    ),
    "one number": (
        ramp(np.uint16, 4095),
        {"image_range": (4095,)},
        r"image_range=\(4095,\): give two",
    ),
    "no range": (ramp(np.uint16, 9), {"image_range": (9, 9)}, r"image_range=\(9, 9\)"),
    "text": (ramp(np.uint16, 9), {"image_range": "no"}, "image_range='no'"),
}


@pytest.mark.parametrize(("write", "options", "expected"), DEPTHS.values(), ids=DEPTHS.keys())
def test_depth(tmp_path, write, options, expected):
    write(tmp_path)
    if isinstance(expected, str):
        found = refusal(tmp_path, **options)
        assert "same" not in found
        assert re.search(expected, found), found
        return
    data = read(tmp_path, **options)
    if expected is None:
        expected = [round(v * 255 / 19) for v in range(20)]
    assert levels(data) == sorted(expected)
    assert data.options.get("image_range") == ([*options["image_range"]] if options else None)


# --- transparency -------------------------------------------------------------------------------


def cut_out(opacity: int, ending: str = ".png", mode: str = "RGBA") -> Callable:
    """Return what writes images whose upper half has an opacity, with colours behind."""

    def write(path: Path) -> None:
        for i in range(20):
            pixels = np.full((SIDE, SIDE, 4), 10 * i, np.uint8)
            pixels[:, :, 3] = 255
            pixels[0, :, 3] = opacity
            save(path / f"{i:02d}{ending}", pixels, mode, **({} if ending == ".png" else LOSSLESS))

    return write


LOSSLESS = {"lossless": True, "exact": True}


def palette(path: Path) -> None:
    for i in range(20):
        image = Image.fromarray(np.array([[0, 1], [1, i]], np.uint8)).convert("P")
        image.putpalette([k for j in range(256) for k in (j, j, j)])
        image.save(path / f"{i:02d}.png", transparency=0)


def key_colour(path: Path) -> None:
    for i in range(20):
        save(path / f"{i:02d}.png", np.array([[0, 50 + i]], np.uint8), transparency=0)


def key_of_16_bits(path: Path) -> None:
    for i in range(20):
        save(path / f"{i:02d}.png", np.array([[0, 60_000 + 256 * i]], np.uint16), transparency=0)


ALPHAS = {
    # images, background, the first value of every image
    "RGBA on white": (cut_out(0), "white", [255] * 20),
    "RGBA on black": (cut_out(0), "black", [0] * 20),
    "half of it": (cut_out(51), "black", [2 * i for i in range(20)]),
    "opaque": (cut_out(255), "white", [10 * i for i in range(20)]),
    "WebP": (cut_out(0, ".webp"), "white", [255] * 20),
    "LA": (cut_out(0, mode="LA"), "white", [255] * 20),
    "a colour of a palette": (palette, "white", [255] * 20),
    "a key colour": (key_colour, "white", [255] * 20),
    "a key of 16 bits": (key_of_16_bits, "white", [255] * 20),
}


@pytest.mark.parametrize(("write", "background", "expected"), ALPHAS.values(), ids=ALPHAS.keys())
def test_transparency(tmp_path, write, background, expected):
    write(tmp_path)
    data = read(tmp_path, background=background)
    assert levels(data) == expected
    assert data.options.get("background", "white") == background


def test_wholly_transparent_images_are_refused_by_that_name(tmp_path):
    for i in range(20):
        save(tmp_path / f"{i:02d}.png", np.full((SIDE, SIDE, 4), [9 * i, 0, 0, 0], np.uint8))
    assert "20 of 20 images" in refusal(tmp_path)
    assert refusal(tmp_path).count("it is wholly transparent") == 10
    assert refusal(tmp_path).endswith("and 10 more; replace or remove them")


def test_images_that_differ_where_they_are_white_on_white_are_not_called_the_same(tmp_path):
    for i in range(20):
        pixels = np.full((SIDE, SIDE, 4), 255, np.uint8)
        pixels[:, :, 3] = i + 1
        save(tmp_path / f"{i:02d}.png", pixels)
    assert "the images differ" in refusal(tmp_path)
    assert len(levels(read(tmp_path, background="black"))) == 20


def test_a_background_that_is_none_is_refused(tmp_path):
    fill(tmp_path)
    assert "background='green': choose one of white, black" in refusal(tmp_path, background="green")
    with pytest.raises(UserError, match="background='black': only folder:PATH and torchvision"):
        load_dataset("digits", background="black")
    with pytest.raises(UserError, match="image_range=.*: only folder:PATH and torchvision"):
        load_dataset("digits", image_range=(0, 16))


# --- parts --------------------------------------------------------------------------------------

SPELLED = [
    ("train", "val", "test"),
    ("Training", "Validation", "Testing"),
    ("TRAIN", "DEV", "TEST"),
    ("train_set", "valid_set", "test_set"),
    ("train2017", "val2017", "test2017"),
]


@pytest.mark.parametrize("spelled", SPELLED, ids=lambda names: names[0])
def test_parts_in_their_usual_spellings(tmp_path, spelled):
    for part, first in zip(spelled, (0, 30, 40), strict=True):
        fill(tmp_path / part / "a", 6, first)
    data = read(tmp_path)
    assert [len(part) for part in (data.train, data.val, data.test)] == [6, 6, 6]
    assert sorted(data.test.images[:, 0].tolist()) == [*range(40, 46)]
    assert data.class_names == ("a",)


MISNAMED = {
    # folders of images, what the refusal names
    "a part beside a class": (["train", "plane"], "'train' named .* beside 'plane'"),
    "parts beside a folder": (["train/a", "test/a", "docs"], "'test', 'train' .*beside 'docs'"),
    "two spellings": (["train/a", "Training/a"], "'Training', 'train' .*two of the same part"),
    "val and dev": (["train/a", "val/a", "dev/a"], "two of the same part"),
    "no training part": (["test/a", "val/a"], "none of training"),
    "parts of a class": (
        ["cats/train", "cats/test"],
        "cats: 'test', 'train' .*in a part or a class",
    ),
    "a folder around parts": (["data/train/a", "data/test/a"], "data: 'test', 'train'"),
    "a part in a part": (["train/train/a"], "train: 'train'"),
}


@pytest.mark.parametrize(("folders", "expected"), MISNAMED.values(), ids=MISNAMED.keys())
def test_a_folder_named_like_a_part_is_never_a_class(tmp_path, folders, expected):
    for i, folder in enumerate(folders):
        fill(tmp_path / folder, 20, 20 * i)
    assert re.search(expected, refusal(tmp_path)), refusal(tmp_path)


def test_names_that_only_begin_like_a_part_are_classes(tmp_path):
    for i, name in enumerate(("trains", "test tubes", "valley", "device")):
        fill(tmp_path / name, 8, 8 * i)
    assert read(tmp_path).class_names == ("device", "test tubes", "trains", "valley")


# --- left out -----------------------------------------------------------------------------------


def loose(path: Path) -> None:
    fill(path, 3, 100)


def beside_parts(path: Path) -> None:
    (path / "train").mkdir()
    for name in ("cats", "dogs"):
        (path / name).rename(path / "train" / name)
    fill(path, 2, 100)


def other_endings(path: Path) -> None:
    for name in ("a.gif", "b.gif", "c.heic", "d.npy", "README"):
        (path / "cats" / name).touch()


def hidden(path: Path) -> None:
    (path / "dogs" / "._012.png").write_bytes(b"AppleDouble")
    (path / ".DS_Store").touch()


def helpers(path: Path) -> None:
    for name in ("@eaDir", "cats/@eaDir", "cats/deep/.thumbnails", "__MACOSX", "lost+found"):
        fill(path / name, 2, 150)
    fill(path / ".ipynb_checkpoints" / "train", 2)


def inner_link(path: Path) -> None:
    fill(path / "more", 1, 200)
    (path / "more").rename(path.with_name("elsewhere"))
    (path / "cats" / "more").symlink_to(path.with_name("elsewhere"))


def pages(path: Path) -> None:
    first, *others = [Image.fromarray(np.full((SIDE, SIDE), 12 + i, np.uint8)) for i in range(3)]
    first.save(path / "dogs" / "012.tif", save_all=True, append_images=others)
    (path / "dogs" / "012.png").unlink()


def frames(path: Path) -> None:
    first, *others = [Image.fromarray(np.full((SIDE, SIDE, 3), 12 + i, np.uint8)) for i in range(4)]
    first.save(path / "dogs" / "012.webp", save_all=True, append_images=others, lossless=True)
    (path / "dogs" / "012.png").unlink()


LEFT_OUT = {
    # what is added to two classes of 12 images, and the line
    "nothing": (lambda path: None, None),
    "loose images": (loose, "24 of 27 files used; .*3 beside the folders of classes"),
    "images beside parts": (beside_parts, "24 of 26 files used; .*2 beside the parts"),
    "other endings": (
        other_endings,
        "24 of 29 files used; .*2 ending in .gif, 1 without an ending, 1 ending in .heic, 1 ",
    ),
    "hidden files": (hidden, "24 of 25 files used; .*1 hidden"),
    "folders of programs": (
        helpers,
        r"24 of 24 files .* 2 folder @eaDir.*\.ipynb.*__MACOSX.*lost\+found.*\.thumbnails",
    ),
    "a link to a folder": (inner_link, "24 of 24 files used; .*1 folder more, a link"),
    "pages": (pages, "24 of 26 pages or frames used, because the first .*012.tif"),
    "frames": (frames, "24 of 27 pages or frames used, because the first .*012.webp"),
}


@pytest.mark.parametrize(("add", "expected"), LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_what_is_left_out_has_one_line(tmp_path, caplog, add, expected):
    path = tmp_path / "own"
    two_classes(path)
    add(path)
    data = read(path)
    assert levels(data) == [*range(24)]
    assert data.class_names == ("cats", "dogs")
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == (expected is not None)
    assert all(re.search(expected, line) for line in lines), lines


def test_equal_images_of_two_parts_are_counted(tmp_path, caplog):
    for part, first, count in (("train", 0, 20), ("val", 15, 10), ("test", 23, 10)):
        fill(tmp_path / part, count, first)
    read(tmp_path)
    assert "images equal to one of an earlier part: 5 of 10 of val, 2 of 10 of test" in caplog.text


# --- refused ------------------------------------------------------------------------------------


def broken_class(path: Path) -> None:
    (path / "birds").symlink_to(path / "gone")


def broken_folder(path: Path) -> None:
    (path / "cats" / "more").symlink_to(path / "gone")


def broken_image(path: Path) -> None:
    (path / "cats" / "x.png").symlink_to(path / "gone.png")


def many_broken(path: Path) -> None:
    for i in range(12):
        (path / "dogs" / f"{i:02d}x.jpg").write_text("<html>")


def a_fifo(path: Path) -> None:
    os.mkfifo(path / "cats" / "x.png")


def a_socket(path: Path) -> None:
    at = os.getcwd()
    os.chdir(path)  # its address has at most 108 bytes
    socket.socket(socket.AF_UNIX).bind("cats/x.png")
    os.chdir(at)


def a_device(path: Path) -> None:
    (path / "cats" / "x.png").symlink_to("/dev/zero")


def only_others(path: Path) -> None:
    for file in (path / "dogs").iterdir():
        file.rename(file.with_suffix(".gif"))


REFUSED = {
    "a class that is a broken link": (broken_class, "broken links, birds"),
    "a folder that is a broken link": (broken_folder, "cats: broken links, more"),
    "an image that is a broken link": (broken_image, r"cannot be read: .*x.png \(.*No such file"),
    "twelve broken files": (many_broken, "12 of 36 images .*00x.jpg .*09x.jpg .* and 2 more"),
    "a FIFO": (a_fifo, "1 of 25 images cannot be read: .*x.png .a FIFO, a socket or a device"),
    "a socket": (a_socket, "x.png .a FIFO, a socket or a device"),
    "a device": (a_device, "x.png .a FIFO, a socket or a device"),
    "another ending alone": (only_others, "dogs: no image in it.*12 ending in .gif"),
}


@pytest.mark.parametrize(("damage", "expected"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.filterwarnings("ignore:unclosed.*socket:ResourceWarning")
def test_what_cannot_be_read_is_refused(tmp_path, damage, expected):
    two_classes(tmp_path)
    damage(tmp_path)
    assert re.search(expected, refusal(tmp_path)), refusal(tmp_path)


BLOCKED = """
import time
from harness.data.folder import read_pictures, reading

class Pairs(list):
    def __getitem__(self, i):
        print("reading", flush=True)
        time.sleep(1000)

read_pictures(Pairs([0]), reading(None, None, "white"))
"""


@pytest.mark.slow
def test_a_file_that_blocks_does_not_keep_the_process_from_ending():
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT
