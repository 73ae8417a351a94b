"""Image files in a folder, in the layout of torchvision's ImageFolder, as a dataset."""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from harness.config import UserError
from harness.data.dataset import PARTS, Dataset

LARGEST_SIDE = 512  # pixels; the first layer of a larger image alone would have 10^8 weights
BLOCK = 64  # images that a thread reads at a time; one by one, small ones take twice as long

# Torchvision's, whose import takes seconds.
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
GREY = ("1", "L", "LA", "La")  # Pillow's modes without colour, except 16-bit grey

# Pillow's errors for files that are cut short or are not images.
BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError)


def read_folder(path: Path, image_size: int | Sequence[int] | None = None) -> Dataset:
    """Read the images below a folder; the dataset's name is "folder-" and the folder's.

    PATH/CLASS/... holds the images of a class; PATH/train/CLASS/... those of a part, and so do val
    and test where they exist. Without folders of classes there are no labels. Files without the
    ending of an image are ignored. Images are grey if all files are, and resized by antialiased
    bilinear interpolation, which may change their proportions, to `image_size`. Transparency is
    dropped, and 16-bit grey is cut to 8 bits.
    """
    size = as_size(image_size)
    path = path.expanduser()
    try:
        names, found = _listed(path)
    except OSError as error:
        raise UserError(f"folder:{path}: it cannot be listed ({error}); make it readable") from None
    pairs = [pair for part in found.values() for pair in part]
    if not pairs:
        raise UserError(f"folder:{path}: no image in it; endings are {' '.join(ENDINGS)}")
    ends = np.cumsum([0, *map(len, found.values())]).tolist()
    files = [file for file, _ in pairs]
    images = read_pictures(len(files), lambda i: upright(files[i]), lambda i: str(files[i]), size)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name)[:50]
    data = Dataset.from_tensors(
        f"folder-{name or 'images'}",
        images,
        [label for _, label in pairs] if names else None,
        rows={part: range(a, b) for part, a, b in zip(found, ends, ends[1:], strict=False)},
        class_names=names,
    )
    return replace(data, options={"image_size": [*images.shape[2:]]})


def _listed(path: Path) -> tuple[tuple[str, ...], dict[str, list[tuple[Path, int]]]]:
    # Names of the classes, and the images of each part with their classes.
    if not path.is_dir():
        raise UserError(f"folder:{path}: there is no such folder; name one that holds images")
    inside = _folders(path)
    in_parts = "train" in inside and set(inside) <= set(PARTS)
    parts = {part: path / part for part in PARTS if part in inside} if in_parts else {"train": path}
    classes = {part: _folders(folder) for part, folder in parts.items()}
    names = classes["train"]
    for part, others in classes.items():
        if not set(others) <= set(names) or bool(others) != bool(names):
            given = f"folder:{parts[part]}: its classes {others}"
            raise UserError(f"{given} are not those of training, {names}; give every part the same")
    return tuple(names), {part: _files(folder, names) for part, folder in parts.items()}


def _folders(path: Path) -> list[str]:
    return sorted(e.name for e in path.iterdir() if e.is_dir() and e.name[0] != ".")


def as_size(given: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Return a given `image_size` as height and width, None if images keep theirs."""
    if given is None:
        return None
    sides = [given] if isinstance(given, int) else [*given] if isinstance(given, Sequence) else []
    whole = all(isinstance(side, int) and 1 <= side <= LARGEST_SIDE for side in sides)
    if len(sides) not in (1, 2) or not whole:
        allowed = f"height and width, or one number for both, from 1 to {LARGEST_SIDE} pixels"
        raise UserError(f"image_size={given!r}: give {allowed}")
    return sides[0], sides[-1]


def _files(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    if not classes:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return [(file, 0) for file in files if _is_image(file.name)]
    found = []
    for label, name in enumerate(classes):
        if (folder / name).is_dir():
            images = _below(folder / name)
            if not images:
                raise UserError(f"folder:{folder / name}: no image in it; remove or fill it")
            found += [(file, label) for file in images]
    return found


def _below(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error

    walked = sorted(os.walk(folder, onerror=fail))  # torchvision's order
    return [Path(at, file) for at, _, files in walked for file in sorted(files) if _is_image(file)]


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def read_pictures(
    count: int,
    opened: Callable[[int], Image.Image],
    named: Callable[[int], str],
    size: tuple[int, int] | None,
) -> Tensor:
    """Return images as one tensor of uint8 (N, C, H, W), C = 3 if any has colours.

    Args:
        count: N.
        opened: returns an image by its number; called by several threads.
        named: returns an image's name for an error.
        size: height and width that images are resized to; None demands that all have one size.
    """

    def picture(i: int) -> np.ndarray:
        read = _pixels(opened, i, named, size)
        if read.shape[1:] != (height, width) or max(height, width) > LARGEST_SIDE:
            found = f"{named(i)} has {read.shape[1]} x {read.shape[2]} pixels"
            first = f"{named(0)} {height} x {width}"
            raise UserError(f"{found}, {first}: give --image-size (at most {LARGEST_SIDE})")
        return read

    channels, height, width = _pixels(opened, 0, named, size).shape
    picture(0)  # may be too large, and others many
    images = np.empty((count, channels, height, width), np.uint8)
    blocks = [range(i, min(i + BLOCK, count)) for i in range(0, count, BLOCK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        every = pool.map(lambda rows: [*map(picture, rows)], blocks)
        for rows, read in zip(blocks, every, strict=True):
            for i, one in zip(rows, read, strict=True):
                if len(one) > images.shape[1]:
                    images = images.repeat(3, axis=1)
                images[i] = one
    return torch.from_numpy(images)


def _pixels(
    opened: Callable[[int], Image.Image],
    i: int,
    named: Callable[[int], str],
    size: tuple[int, int] | None,
) -> np.ndarray:
    """Return one image as uint8, (1, H, W) or (3, H, W)."""
    try:
        picture = _eight_bits(opened(i))
        if size is not None:
            picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
        return np.atleast_3d(np.array(picture)).transpose(2, 0, 1)
    except BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{named(i)} cannot be read as an image ({reason}); replace it") from None


def upright(file: str | Path) -> Image.Image:
    """Return the image of a file, turned as its EXIF orientation demands."""
    with Image.open(file) as opened:
        return ImageOps.exif_transpose(opened)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Return a picture in mode L or RGB."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"mode {picture.mode}: give 8 or 16 bits a channel")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # at once to RGB, Pillow warns
    return picture.convert("L" if picture.mode in GREY else "RGB")
