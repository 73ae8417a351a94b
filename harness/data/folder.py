"""Image files in a folder, in the layout of torchvision's ImageFolder, as a dataset."""

import logging
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import ConcatDataset

from harness.data.dataset import PARTS, Dataset
from harness.errors import UserError, one_line

log = logging.getLogger(__name__)

LARGEST_SIDE = 512  # pixels; the first layer of a larger image alone would have 10^8 weights
BLOCK = 64  # images that a thread reads at a time; one by one, small ones take twice as long
HALF = 2**15  # images of 16 bits are cut to 8 if their largest value is at least this
MOST_NAMED = 10  # files or folders that a message names
GREY = ("1", "L", "LA", "La")  # Pillow's modes without colour, except those of more than 8 bits
BACKGROUNDS = {"white": 255, "black": 0}

# Pillow's errors for files that are cut short or are not images.
BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError)

# Torchvision's, whose import takes seconds.
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLIT = re.compile(  # names of folders that are parts of the data, and of which
    r"(?i)(?:(?P<train>train|training)|(?P<val>val|valid|validation|dev)|(?P<test>test|testing))"
    r"(?:[-_ .]?(?:set|data|images?|\d+))?"
)
HELPERS = (  # folders of programs and systems, in lower case; hidden ones are others
    *("@eadir", "__macosx", "__pycache__", "lost+found", "#recycle", "#snapshot", "$recycle.bin"),
    "system volume information",
)


class Reading(NamedTuple):
    """How images are read: the options of `load_dataset`, checked."""

    image_size: list[int] | None  # height and width; None keeps those of the images
    image_range: list[float] | None  # values of black and white; None: those of 8 or 16 bits
    background: str

    @property
    def options(self) -> dict[str, Any]:
        """Those that are no defaults, as they are recorded."""
        return {k: v for k, v in self._asdict().items() if v not in (None, "white")}


def reading(
    image_size: int | Sequence[int] | None, image_range: Sequence[float] | None, background: str
) -> Reading:
    """Return how images are read by these options of `load_dataset`."""
    if background not in BACKGROUNDS:
        raise UserError(f"background={background!r}: choose one of {', '.join(BACKGROUNDS)}")
    size, span = image_size, image_range
    if size is not None:
        sides = [*size] if isinstance(size, Sequence) else [size]
        whole = all(isinstance(side, int) and 1 <= side <= LARGEST_SIDE for side in sides)
        if len(sides) not in (1, 2) or not whole:
            allowed = f"height and width, or one number for both, from 1 to {LARGEST_SIDE} pixels"
            raise UserError(f"image_size={size!r}: give {allowed}")
        size = [sides[0], sides[-1]]
    if span is not None:
        try:
            low, high = map(float, span)
        except (TypeError, ValueError):
            low = high = math.nan
        if not -math.inf < low < high < math.inf:
            allowed = "two numbers, the value of black and of white"
            raise UserError(f"image_range={span!r}: give {allowed}")
        span = [int(end) if end.is_integer() else end for end in (low, high)]
    return Reading(size, span, background)


def read_folder(path: Path, how: Reading) -> Dataset:
    """Read the images below a folder; the dataset's name is "folder-" and the folder's.

    PATH/CLASS/... holds the images of a class; PATH/train/CLASS/... those of a part, and so do val
    and test where they exist. Without folders of classes there are no labels. What is left out, and
    images that are in two parts, are counted in a line of the log.
    """
    path = path.expanduser()
    left = Counter[str]()
    try:
        names, found = _listed(path, left)
    except OSError as error:
        raise UserError(f"folder:{path}: it cannot be listed ({error}); make it readable") from None
    if not (used := sum(map(len, found.values()))):
        raise _no_image(path, left)
    if left:
        total = used + sum(n for what, n in left.items() if not what.startswith("folder"))
        line = "folder:%s: %d of %d files used; left out: %s"
        log.warning(line, path, used, total, _counted(left))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name)[:50]
    data = from_pictures(f"folder-{name or 'images'}", found, names, how, labelled=bool(names))
    return replace(data, options=how._replace(image_size=[*data.image_shape[1:]]).options)


def from_pictures(
    name: str, parts: dict[str, Any], names: Sequence[str], how: Reading, *, labelled: bool = True
) -> Dataset:
    """Return the dataset of parts, sequences of (file or image, class), which it empties.

    How many images of a part are equal to one of an earlier part is logged.
    """
    ends = np.cumsum([0, *map(len, parts.values())]).tolist()
    rows = {part: range(a, b) for part, a, b in zip(parts, ends, ends[1:], strict=False)}
    images, labels = read_pictures(ConcatDataset([*parts.values()]), how)
    parts.clear()  # some hold their images, which are copied once more below
    classes, names = labels if labelled else None, names if labels.max() < len(names) else ()
    data = Dataset.from_tensors(name, images, classes, rows=rows, class_names=names)
    seen, found = set[int](), list[str]()
    for part in PARTS:
        every = [hash(row.tobytes()) for row in getattr(data, part).images.numpy()]
        count = sum(one in seen for one in every)
        found += [f"{count} of {len(every)} of {part}"] * (count > 0)
        seen.update(every)
    if found:
        log.warning("%s: images equal to one of an earlier part: %s", name, ", ".join(found))
    return data


def _no_image(folder: Path, left: Counter[str]) -> UserError:
    what = f"no image in it: fill or remove it (left out: {_counted(left) or 'nothing'})"
    return UserError(f"folder:{folder}: {what}; endings are {' '.join(ENDINGS)}")


def _counted(left: Counter[str]) -> str:
    return listed([f"{count} {what}" for what, count in left.most_common()])


def _listed(path: Path, left: Counter[str]) -> tuple[list[str], dict[str, list[tuple[Path, int]]]]:
    # Names of the classes, and the images of each part with their classes.
    if not path.is_dir():
        raise UserError(f"folder:{path}: there is no such folder; name one that holds images")
    inside, loose = _entries(path, left, in_parts=True)
    layout = {"train": (path, inside, loose)}
    if splits := {name: part for name in inside if (part := _part(name))}:
        parts, others = [*splits.values()], [repr(name) for name in inside if name not in splits]
        if others or len({*parts}) < len(parts) or "train" not in parts:
            why = "two of the same part" if "train" in parts else "none of training"
            raise _misnamed(path, splits, f"beside {listed(others)}" if others else why)
        places = {part: path / name for part in PARTS for name in splits if splits[name] == part}
        layout = {part: (place, *_entries(place, left)) for part, place in places.items()}
        left.update(["beside the parts"] * len(loose))
    names, found = layout["train"][1], dict[str, list[tuple[Path, int]]]()
    for part, (place, classes, loose) in layout.items():
        if not set(classes) <= set(names) or bool(classes) != bool(names):
            given = f"folder:{place}: its classes {classes}"
            raise UserError(f"{given} are not those of training, {names}; give every part the same")
        left.update(["beside the folders of classes"] * len(loose) * bool(classes))
        found[part] = [] if classes else [(place / name, 0) for name in loose]
        for name in classes:
            images = _below(place / name, left)
            if not images:
                raise _no_image(place / name, left)
            found[part] += [(file, names.index(name)) for file in images]
    return names, found


def _part(name: str) -> str | None:
    found = SPLIT.fullmatch(name)
    return found and found.lastgroup


def _misnamed(folder: Path, named: Iterable[str], why: str) -> UserError:
    what = f"folder:{folder}: {', '.join(map(repr, named))} named like parts of the data, {why}"
    return UserError(f"{what}: rename what is a class; move, merge or add what is a part")


def _entries(
    folder: Path, left: Counter[str], *, in_parts: bool = False
) -> tuple[list[str], list[str]]:
    # Names of the folders, which may be parts of the data or not, and of the images in a folder.
    folders, files, links = list[str](), list[str](), list[str]()
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = entry.name
        is_hidden, is_image = name[0] == ".", name.lower().endswith(ENDINGS)
        if entry.is_dir():
            if is_hidden or name.lower() in HELPERS:
                left[f"folder {name}"] += 1
            else:
                folders.append(name)
        elif is_hidden:
            left.update(["hidden"] * is_image)
        elif is_image:
            files.append(name)
        elif entry.is_symlink() and not os.path.exists(entry):
            links.append(name)
        else:
            end = os.path.splitext(name)[1]
            left[f"ending in {end}" if end else "without an ending"] += 1
    if links:
        raise UserError(f"folder:{folder}: broken links, {listed(links)}; mend or remove them")
    if not in_parts and (named := [*filter(_part, folders)]):
        raise _misnamed(folder, named, "in a part or a class")
    return folders, files


def _below(folder: Path, left: Counter[str]) -> list[Path]:
    found, todo = list[tuple[str, str]](), [folder]
    while todo:
        place = todo.pop()
        inside, files = _entries(place, left)
        links = [name for name in inside if (place / name).is_symlink()]
        left.update(f"folder {name}, a link" for name in links)
        todo += [place / name for name in inside if name not in links]
        found += [(str(place), name) for name in files]
    return [Path(*pair) for pair in sorted(found)]  # torchvision's order


class _Picture(NamedTuple):
    pixels: np.ndarray  # uint8, (C, H, W)
    digest: int  # of the values of the file
    deep: tuple[float, float] | None  # least and largest of values of more than 8 bits
    frames: int
    name: str = ""
    label: int = 0

    @property
    def sides(self) -> str:
        return " x ".join(map(str, self.pixels.shape[1:]))


def read_pictures(pairs: ConcatDataset[tuple[Any, int]], how: Reading) -> tuple[Tensor, np.ndarray]:
    """Return images as one tensor of uint8 (N, C, H, W), C = 3 if any has colours, and labels (N,).

    The pairs, which several threads read, hold a file or an image, and its class. Without a size in
    `how`, all images have to have one.
    """
    resize = f"give --image-size (at most {LARGEST_SIDE})"

    def read(i: int) -> _Picture | str:
        name = f"image {i}"
        try:
            image, label = pairs[i]
            name = str(image) if isinstance(image, str | Path) else name
            picture = _picture(image, how)._replace(name=name, label=label)
        except BROKEN as error:
            return f"{name} ({one_line(error)})"
        if max(picture.pixels.shape) > LARGEST_SIDE:  # at once: many of them fill the memory
            raise UserError(f"{name} has {picture.sides} pixels: {resize}")
        return picture

    first, differ, labels = None, False, np.empty(len(pairs), np.int64)
    broken, deep, frames = list[str](), dict[str, tuple[float, float]](), dict[str, int]()
    with ThreadPool(os.cpu_count()) as pool:  # one blocked in a file does not hold up the end
        for i, one in enumerate(pool.imap(read, range(len(pairs)), BLOCK)):
            if isinstance(one, str):
                broken.append(one)
                continue
            if first is None:
                first, images = one, np.empty((len(pairs), *one.pixels.shape), np.uint8)
            if one.pixels.shape[1:] != first.pixels.shape[1:]:
                found = f"{one.name} has {one.sides} pixels, {first.name} {first.sides}"
                raise UserError(f"{found}: {resize}")
            if len(one.pixels) > images.shape[1]:
                images = images.repeat(3, axis=1)
            images[i], labels[i] = one.pixels, one.label
            differ = differ or one.digest != first.digest
            deep |= {one.name: one.deep} if one.deep else {}
            frames |= {one.name: one.frames} if one.frames > 1 else {}
    if first is None or broken:
        count = f"{len(broken)} of {len(pairs)} images cannot be read"
        raise UserError(f"{count}: {listed(broken)}; replace or remove them")
    if deep:
        _check_depth(deep, how.image_range)
    if differ and all(np.array_equal(image, images[0]) for image in images):
        lost = "8 bits a channel, --image-size or --background"
        raise UserError(f"the images differ, but in nothing that is left by {lost}: change these")
    if frames:
        total = len(pairs) - len(frames) + sum(frames.values())
        line = "%d of %d pages or frames used, because the first of each file is read, as of %s"
        log.warning(line, len(pairs), total, listed([*frames]))
    return torch.from_numpy(images), labels


def listed(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _check_depth(deep: dict[str, tuple[float, float]], given: list[float] | None) -> None:
    # Refuse values outside a given range or, without one, of more than 8 bits that do not fill 16.
    low, high = min(deep.values())[0], max(high for _, high in deep.values())
    whole = low >= 0 and all(isinstance(end, int) for span in deep.values() for end in span)
    if given or not (whole and HALF <= high < 2**16):
        white = 2 ** int(high).bit_length() - 1 if whole else max(high, low + 1)
        what = f"outside --image-range {given[0]} {given[1]}" if given else "of more than 8 bits"
        give = f"give those of black and white, as --image-range {min(low, 0)} {white}, or save"
        files = f"with 8 bits a channel: {listed([*deep])}"
        raise UserError(f"values {what}, in all from {low} to {high}: {give} {files}")


def _picture(image: Any, how: Reading) -> _Picture:  # noqa: ANN401 - a file, or Pillow's image
    frames, is_cut = 1, False
    if isinstance(image, str | Path):
        image, frames, is_cut = _opened(image)
    values, alpha = _values(image)
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "f":
        low, high = (float(str(np.float32(end))) for end in (low, high))  # in few digits
        if not math.isfinite(high - low):
            raise ValueError("values that are not finite")
    deep = None if values.dtype == np.uint8 else (low, high)
    levels = values if deep is None else np.zeros_like(values)
    if how.image_range is not None:
        if is_cut:
            raise ValueError("colours of 16 bits have no --image-range; save it with 8")
        black, white = how.image_range
        deep = None if black <= low <= high <= white else (low, high)
        if deep is None:
            levels = np.rint((values.astype(float) - black) * (255 / (white - black)))
    elif is_cut:
        deep = low << 8, high << 8 | 255
    elif values.dtype.kind in "iu" and deep:
        levels = values >> 8
    if alpha is not None:
        if not alpha.any():
            raise ValueError("it is wholly transparent")
        opacity, ground = alpha.astype(np.uint32), BACKGROUNDS[how.background]
        levels = (levels * opacity + ground * (255 - opacity) + 127) // 255
    pixels = levels.astype(np.uint8)
    if how.image_size is not None:
        picture = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
        picture = picture.resize((how.image_size[1], how.image_size[0]), Image.Resampling.BILINEAR)
        pixels = np.atleast_3d(np.asarray(picture))
    digest = hash((values.tobytes(), alpha is not None and alpha.tobytes()))
    return _Picture(pixels.transpose(2, 0, 1), digest, deep, frames)


def _opened(file: str | Path) -> tuple[Image.Image, int, bool]:
    # The image of a file, turned as its EXIF orientation demands; how many frames it has; whether
    # they are colours of 16 bits, which Pillow cuts to 8.
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("a FIFO, a socket or a device")  # to open it would wait for ever
    with Image.open(file) as picture:
        is_cut = any(re.search(r";16[BLN]|65535", str(tile.args)) for tile in picture.tile)
        frames = getattr(picture, "n_frames", 1)
        return ImageOps.exif_transpose(picture), frames, is_cut and picture.mode[0] != "I"


def _values(picture: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    # Values, shape (H, W, C), and opacity from 0 to 255, (H, W, 1).
    if picture.mode[0] in "IF":  # 16 or 32 bits
        values, clear = np.asarray(picture)[..., None], picture.info.get("transparency")
        return values, None if clear is None else np.where(values == clear, 0, 255)
    grey = picture.mode in GREY
    if picture.has_transparency_data:
        both = np.asarray(picture.convert("LA" if grey else "RGBA"))
        return both[..., :-1], both[..., -1:]
    return np.atleast_3d(np.asarray(picture.convert("L" if grey else "RGB"))), None
