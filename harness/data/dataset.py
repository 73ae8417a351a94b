"""Datasets as tensors that live on the training device, in three fixed parts."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from harness import processes
from harness.config import Drawing, checked_name
from harness.data.mapped import Mapped, check_kind, in_order, rounded
from harness.data.mnist import DATASETS
from harness.errors import UserError, checked_text, one_line
from harness.streams import generator

log = logging.getLogger(__name__)

PARTS = ("train", "val", "test")
SPLIT_SEED = 0  # of the permutation that makes the parts, the same for runs of every seed
LEAST = 20  # images that can be split
FARTHEST = 1e6  # standard deviations of a table's value from the mean: of its square, 1e12
MOST_CLASSES = 10_000  # a larger label is a code and not a number of a class
# Streams of drawn pixels.
PURPOSE = {"threshold": "binarize", "stochastic": "binarize", "uniform": "dequantize"}
CHUNK = 2**23  # values that are read at once: 64 MiB of float64
ROUNDING = 1e-6  # by which floats may miss [0, 1]: some units in the last place of float32


class Columns(NamedTuple):
    """Columns of a table, with the mean and standard deviation of the training part of each."""

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def standardized(self, values: Tensor) -> Tensor:
        """Return (v - mean) / std of values (..., D) in the columns' own units, float64."""
        mean, std = (values.new_tensor(part, dtype=torch.float64) for part in self[1:])
        return (values.double() - mean) / std

    def in_own_units(self, values: Tensor) -> Tensor:
        """Return the inverse of `standardized`, in the type of the values."""
        mean, std = (values.new_tensor(part, dtype=torch.float64) for part in self[1:])
        return (values.double() * std + mean).to(values.dtype)


@dataclass(frozen=True)
class Split:
    """Images, or rows of a table, and labels of one part of a dataset."""

    images: Tensor | Mapped  # (N, D): uint8, or a table's standardised columns, float32
    labels: Tensor  # class of each image, int64, shape (N,); 0 if the dataset has no classes
    largest: int  # grey value that stands for 1; 1 of a table
    levels: int = 1  # grey levels that dequantised pixels stand for; 1 of others

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of these images; that of a dataset is of its source, even when it is cut."""
        return digest(self.images, about=f"{tuple(self.images.shape)}/{self.largest}/")

    def pixels(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Return the chosen images as pixels in [0, 1]; `rows` of shape (...) gives (..., D).

        Of a table they are its standardised columns.
        """
        return self.images[rows].to(dtype) / self.largest

    def rows(self, rows: Tensor | slice) -> Split:
        """Return the chosen images and their labels."""
        images = self.images.chosen(rows) if isinstance(self.images, Mapped) else self.images[rows]
        return replace(self, images=images, labels=self.labels[rows])

    def head(self, images: int) -> Split:
        """Return the first images of the split, which is in random order."""
        return self.rows(slice(images))

    def drawn(self, kind: Drawing, stream: np.random.Generator | None = None) -> Split:
        """Return the split with pixels 0 or 1, or dequantised ones.

        "threshold": 1 from half the largest grey value on; "stochastic": 1 with the pixel's value
        as probability, drawn from the stream (Salakhutdinov & Murray 2008); "uniform": (k + u) /
        (K + 1) of a grey level k of 0 to K, u from U(0, 1) (Uria et al. 2013, 1306.0186), float32.
        """
        if kind == "none" or self.levels > 1:
            return self
        shape = tuple(self.images.shape)
        if kind == "uniform":
            assert stream is not None
            u = torch.from_numpy(stream.random(shape, dtype=np.float32))
            images = (self.images[:] + u.to(self.images.device)) / (self.largest + 1)
            return replace(self, images=images, largest=1, levels=self.largest + 1)
        levels = np.full(1, (self.largest + 1) // 2 - 1, dtype=np.uint8)
        if kind == "stochastic":
            assert stream is not None
            levels = stream.integers(self.largest, size=shape, dtype=np.uint8)
        ones = self.images[:] > torch.from_numpy(levels).to(self.images.device)
        return replace(self, images=ones.to(torch.uint8), largest=1)

    def loaded(self, device: torch.device) -> Split:
        """Return the split with its tensors on the device, and images of a file in its memory."""
        images = torch.cat([some.to(device) for some in in_chunks(self.images)])
        return replace(self, images=images, labels=self.labels.to(device))

    def to(self, device: torch.device) -> Split:
        """Return the split with its tensors on the device; those of a file are read when needed."""
        if self.labels.device == device:
            return self
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A dataset in three fixed parts.

    Attributes:
        name: as given to `load_dataset` or `from_tensors`; KIND-NAME of the user's files, as
            "folder-NAME" of a folder of images.
        image_shape: (channels, height, width); (D,) of a table or of vectors.
        classes: number of classes; 0 for images without labels.
        train, val, test: images for training, for choosing settings, and for measuring once.
        digest: SHA-256 of all images, in the source's order; of a user's, of parts and labels too.
        class_names: names of the classes of a user's images; () where classes are numbers.
        columns: of a table, whose values are standardised; None of pixels in [0, 1].
        options: of `load_dataset`, with which the user's files are read again.
        rounded: whether grey levels are rounded floats, which are not dequantised.
    """

    name: str
    image_shape: tuple[int, ...]  # (channels, height, width); (D,) of a table or of vectors
    classes: int  # number of classes; 0 for images without labels
    train: Split
    val: Split
    test: Split
    digest: str
    class_names: tuple[str, ...] = ()
    columns: Columns | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rounded: bool = False

    @classmethod
    def from_tensors(
        cls,
        name: str,
        images: ArrayLike | Tensor | Mapped,
        labels: ArrayLike | Tensor | None = None,
        *,
        rows: Mapping[str, ArrayLike | Tensor | Iterable[int]] | None = None,
        class_names: Sequence[str] = (),
        largest: int = 255,
        columns: Sequence[str] = (),
    ) -> Dataset:
        """Make a dataset of your images, or of the rows of a table.

        Args:
            name: its name in MLflow; letters, digits, ".", "_", "-".
            images: a tensor, array, list, or of pandas, of shape (N, H, W), grey, or (N, C, H, W)
                with 1 or 3 channels; uint8, or floats in [0, 1], rounded to 256 levels. Or vectors
                (N, D): grey values if they are uint8, else the columns of a table, of any unit,
                standardised by their mean and standard deviation in the training part.
            labels: class of each image, shape (N,), counted from 0, or its name; None leaves out
                the metrics that need classes.
            rows: part ("train", "val", "test") -> its rows, or a mask of all. A part that is
                missing gets a tenth of "train"; None splits all 8 : 1 : 1, always in the same way.
            class_names: a name for each class.
            largest: grey value of uint8 images that stands for 1.
            columns: names of a table's columns, which a frame has; uint8 values then are a table's.
        """
        columns, class_names = ([*map(checked_text, given)] for given in (columns, class_names))
        if checked_name(name, "name", 60) in DATASETS:  # it is part of the names of studies
            raise UserError(f"dataset name {name!r} is taken; choose another")
        given = images if isinstance(images, Mapped) else as_tensor(images, "images")
        axes = "permute" if isinstance(images, Tensor) else "transpose"
        values, shape = as_values(given, largest, columns, axes)
        if values.dtype == torch.float64 and not isinstance(images, Mapped):
            columns = columns or [*map(checked_text, getattr(images, "columns", ()))]
        classes, count = torch.zeros(len(values), dtype=torch.int64), 0
        if labels is not None:
            classes, names = as_labels(labels, len(values))
            if names and class_names:
                raise UserError("class_names beside labels that are names: leave it out")
            class_names = class_names or names
            count = max(int(classes.max()) + 1, len(class_names))
        if class_names and len(class_names) != count:
            raise UserError(f"class_names has {len(class_names)} names: the labels have {count}")
        rounded = not isinstance(given, Mapped) and given.is_floating_point()
        largest = 255 if rounded else int(largest)
        parts, known = split_rows(len(values), rows), None
        if values.dtype == torch.float64:
            known, largest = _columns(Split(values, classes, 1).rows(parts[0]).images, columns), 1
            _check_range(values, known)
            values = (
                replace(values, columns=known)
                if isinstance(values, Mapped)
                else known.standardized(values).float()
            )
        train, val, test = splits = tuple(map(Split(values, classes, largest).rows, parts))
        first = train.images[:1]
        if all(bool((some == first).all()) for some in in_chunks(train.images)):
            raise UserError("all training images are the same: there is nothing to learn from them")
        tensors = [tensor for part in splits for tensor in (part.images, part.labels)]
        about: list[Any] = [shape, largest, count, *map(len, splits), *filter(None, [known])]
        found = digest(*tensors, about=json.dumps(about))
        named = tuple(class_names)
        return cls(name, shape, count, train, val, test, found, named, known, rounded=rounded)

    @property
    def has_classes(self) -> bool:
        """Whether the training images are of at least two classes."""
        return self.classes > 1 and len(self.train.labels.unique()) > 1

    @property
    def is_image(self) -> bool:
        """Whether the data are images, and no vectors."""
        return len(self.image_shape) > 1

    @property
    def pixels(self) -> int:
        """D: values of an image, all channels."""
        return math.prod(self.image_shape)

    @cached_property
    def pixel_variance(self) -> float:
        """Variance of a pixel over the training images, mean over pixels, pixel^2."""
        sums = torch.zeros(2, self.pixels, dtype=torch.float64, device=self.train.images.device)
        for rows in torch.arange(len(self.train)).split(1_000):
            x = self.train.pixels(rows, torch.float64)
            sums += torch.stack([x.sum(0), x.square().sum(0)])
        mean, square = sums / len(self.train)
        return float((square - mean.square()).mean())

    def class_name(self, label: int) -> str:
        """Return the name of a class, or its number where classes have no names."""
        return self.class_names[label] if self.class_names else str(label)

    def drawn(self, kind: Drawing) -> Dataset:
        """Return the dataset as runs of every seed with this `drawing` are measured on it."""
        if kind == "none":
            return self
        streams = {part: generator(SPLIT_SEED, f"{PURPOSE[kind]}/{part}") for part in PARTS}
        parts = {part: getattr(self, part).drawn(kind, streams[part]) for part in PARTS}
        return replace(self, **parts)

    def shared(self) -> Dataset:
        """Return the dataset with images on a CPU in memory that worker processes share."""

        def share(images: Tensor | Mapped) -> Tensor | Mapped:
            return images.shared() if isinstance(images, Mapped) else processes.shared(images)

        return self._each(lambda split: replace(split, images=share(split.images)))

    def to(self, device: torch.device) -> Dataset:
        """Return the dataset with its tensors on the device."""
        return self._each(lambda split: split.to(device))

    def _each(self, change: Callable[[Split], Split]) -> Dataset:
        changed: dict[str, Any] = {part: change(getattr(self, part)) for part in PARTS}
        return replace(self, **changed)


def with_official_training(data: Dataset) -> Dataset:
    """Return an MNIST dataset with its official 60,000 training images, those of validation too."""
    images = torch.cat([data.train.images[:], data.val.images[:]])
    labels = torch.cat([data.train.labels, data.val.labels])
    return replace(data, train=replace(data.train, images=images, labels=labels))


def in_chunks(images: Tensor | Mapped) -> Iterator[Tensor]:
    """Yield the rows of a tensor, or of a file, some at a time, in their order."""
    size = max(1, CHUNK // max(1, math.prod(images.shape[1:])))
    for start in range(0, len(images), size):
        yield images[start : start + size]


def digest(*parts: Tensor | Mapped, about: str = "") -> str:
    """Return SHA-256, in hexadecimal, of a text and then the bytes of tensors."""
    whole = hashlib.sha256(about.encode())
    for part in parts:
        for some in in_chunks(part):
            whole.update(some.cpu().contiguous().numpy().data)
    return whole.hexdigest()


def as_array(given: object, what: str) -> np.ndarray:
    """Return numbers or texts, given in any form, as an array; all data of users come here."""
    parts: Any = given if isinstance(given, list | tuple) else [given]
    if any(isinstance(part, np.ma.MaskedArray) for part in parts):
        raise UserError(f"{what}: a masked array, whose mask is not used; fill it, or leave it out")
    try:
        if parts and all(isinstance(part, Tensor) for part in parts):
            dense = [part.detach().cpu().to_dense().numpy() for part in parts]
            given = dense[0] if parts[0] is given else dense
        array = np.asarray(given)
        array = np.array(array.tolist()) if array.dtype.kind in "OT" else array
        if array.dtype.kind in "OUS":
            items = np.asarray(given, dtype=object)
            is_text = 2 * sum(isinstance(i, str | bytes) for i in items.flat) > items.size
            for place, item in np.ndenumerate(items):
                if not isinstance(item, str | bytes if is_text else Number):
                    found = f"{str(item)[:40]!r} ({type(item).__name__}) at {[*place]}"
                    raise UserError(f"{what}: {found}; give numbers alone, or names as labels")
            array = array if is_text else array.astype(np.float64)
    except Exception as error:  # NumPy, PyTorch and pandas have many for what is no array
        why = f"no array ({one_line(error)[:100]}); give numbers in rows of one length"
        is_other = isinstance(error, UserError | MemoryError)
        raise error if is_other else UserError(f"{what}: {why}") from None
    return array


def as_tensor(given: object, what: str) -> Tensor:
    """Return the numbers that `Dataset.from_tensors` takes as a tensor on the CPU."""
    if isinstance(given, Tensor) and given.dtype == torch.bfloat16:  # NumPy lacks it
        return given.detach().cpu()
    array = as_array(given, what)
    check_kind(array, f"{what}: it holds")
    return torch.from_numpy(in_order(array))


def as_values(
    images: Tensor | Mapped, largest: int, columns: Sequence[str], axes: str = "permute"
) -> tuple[Tensor | Mapped, tuple[int, ...]]:
    """Return what `Dataset.from_tensors` takes, (N, D), and the shape of an image.

    Images are uint8 and the columns of a table float64. Rows of a file have been checked.
    """
    if isinstance(images, Mapped):
        return images, images.image_shape
    if images.ndim != 2:
        if columns:
            raise UserError(f"columns with values of shape {tuple(images.shape)}: give (N, D)")
        pictures = _as_images(images, largest, axes)
        return pictures.flatten(1), tuple(pictures.shape[1:])
    if 0 in images.shape or images.is_complex() or images.dtype == torch.bool:
        given = f"vectors of shape {tuple(images.shape)} and type {images.dtype}"
        raise UserError(f"{given}: give at least one row and column of real numbers")
    shape = (images.shape[1],)
    if images.dtype == torch.uint8 and not columns:
        return _as_images(images.unsqueeze(1), largest, axes).flatten(1), shape
    return images.double(), shape


def _columns(train: Tensor | Mapped, names: Sequence[str]) -> Columns:
    """Return the columns of a table by its training rows (N, D), float64."""
    names = [str(name) for name in names] or [*map(str, range(train.shape[1]))]
    if len(names) != train.shape[1] or len(set(names)) < len(names):
        raise UserError(f"columns {names}: give {train.shape[1]} different names")
    found = [torch.stack([some.sum(0), some.amin(0), some.amax(0)]) for some in in_chunks(train)]
    sums, low, high = torch.stack(found, 1)
    mean, is_constant = sums.sum(0) / len(train), low.amin(0) == high.amax(0)
    squares = torch.stack([(some - mean).square().sum(0) for some in in_chunks(train)]).sum(0)
    std = (squares / len(train)).sqrt()
    for name, constant, spread in zip(names, is_constant.tolist(), std.tolist(), strict=True):
        if constant:
            raise UserError(f"column {name!r} is constant in the training rows: leave it out")
        if not 0 < spread < math.inf:
            raise UserError(f"column {name!r} has values that are no finite numbers, or too large")
    return Columns(tuple(names), tuple(mean.tolist()), tuple(std.tolist()))


def _check_range(values: Tensor | Mapped, columns: Columns) -> None:
    each = [columns.standardized(some).abs().amax(0) for some in in_chunks(values)]
    for name, distance in zip(columns.names, torch.stack(each).amax(0).tolist(), strict=True):
        if not distance < FARTHEST:  # NaN too
            given = f"column {name!r} has a value {distance:.3g} standard deviations from the mean"
            raise UserError(f"{given} of the training rows: correct it, or leave out its row")


def _as_images(images: Tensor, largest: int, axes: str) -> Tensor:
    # As uint8 of shape (N, C, H, W).
    if largest not in range(1, 256):
        raise UserError(f"largest={largest}: give a whole number from 1 to 255")
    shape = tuple(images.shape)
    images = images.unsqueeze(1) if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in shape:
        wanted = f"(N, H, W) or (N, C, H, W) with 1 or 3 channels, as images.{axes}(0, 3, 1, 2)"
        raise UserError(f"images of shape {shape}: give {wanted} of (N, H, W, C)")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise UserError(f"images of type {images.dtype}: give torch.uint8, or floats from 0 to 1")
    check_pixels(images.dtype, float(images.min()), float(images.max()), largest)
    return rounded(images)


def check_pixels(dtype: torch.dtype, low: float, high: float, largest: int = 255) -> None:
    """Refuse pixels outside their range; `rounded` clips what is beyond it by a rounding alone."""
    allowed, tolerance = (1, ROUNDING) if dtype.is_floating_point else (largest, 0)
    excess = max(-low, high - allowed)
    if not excess <= tolerance:  # NaN too
        given = f"images from {low:.7g} to {high:.7g}: {dtype}"
        raise UserError(f"{given} must be from 0 to {allowed}; scale them, or give largest=")
    if excess > 0:
        log.warning("images leave [0, 1] by %.2g, as by rounding, and are clipped", excess)


def as_labels(labels: object, images: int) -> tuple[Tensor, list[str]]:
    """Return the class of each image, int64, (N,), and the sorted names if labels are names."""
    given, names = labels if isinstance(labels, Tensor) else as_array(labels, "labels"), list[str]()
    if isinstance(given, np.ndarray) and given.dtype.kind in "US":
        texts, given = np.unique(given, return_inverse=True)
        every = (t.decode(errors="replace") if isinstance(t, bytes) else t for t in texts)
        names = [*map(checked_text, every)]
    found = as_tensor(given, "labels")
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if tuple(found.shape) != (images,) or not whole:
        about = f"labels of shape {tuple(found.shape)} and type {found.dtype}"
        raise UserError(f"{about}: give one whole number for each of {images} images")
    found = found.long()
    low, high = int(found.min()), int(found.max())
    if not 0 <= low <= high < MOST_CLASSES:
        allowed = f"give numbers from 0 on, below {MOST_CLASSES}"
        raise UserError(f"labels from {low} to {high}: {allowed}")
    return found, names


def split_rows(images: int, given: Mapping[str, Any] | None) -> list[Tensor]:
    """Return the rows of train, val and test in a random order that is always the same."""
    given = {"train": range(images)} if given is None else given
    found = sorted(map(str, given)) if isinstance(given, Mapping) else [type(given).__name__]
    if "train" not in found or not {*found} <= {*PARTS}:
        raise UserError(f"parts {found}: name 'train' and, if you like, 'val' and 'test'")
    rows = {part: _rows(part, chosen, images) for part, chosen in given.items()}
    every = torch.cat(list(rows.values()))
    if int(every.min()) < 0 or int(every.max()) >= images or len(every.unique()) < len(every):
        names = ", ".join(rows)
        raise UserError(f"rows of {names}: give each from 0 to {images - 1} once at most")
    for part, chosen in rows.items():
        order = generator(SPLIT_SEED, f"split/{part}").permutation(len(chosen))
        rows[part] = chosen[torch.from_numpy(order)]
    missing = [part for part in PARTS if part not in rows]
    count = len(rows["train"])
    if missing and count < LEAST:
        raise UserError(f"{count} images or rows: give {LEAST} to split, or give every part")
    for part in missing:
        rows[part], rows["train"] = rows["train"].tensor_split([count // 10])
    return [rows[part] for part in PARTS]


def _rows(part: str, given: Any, images: int) -> Tensor:  # noqa: ANN401 - numbers or a mask
    if isinstance(given, range):
        given = torch.arange(given.start, given.stop, given.step)
    elif isinstance(given, Iterable) and not hasattr(given, "__array__"):
        given = list(given)
    rows = as_tensor(given, f"rows of {part!r}")
    if rows.dtype == torch.bool and tuple(rows.shape) == (images,):
        rows = rows.nonzero().flatten()
    if rows.ndim != 1 or len(rows) < 2 or rows.is_floating_point() or rows.dtype == torch.bool:
        found = f"part {part!r} has {rows.numel()} images, rows of type {rows.dtype}"
        raise UserError(f"{found}: give at least 2 whole numbers, or a mask of all {images} images")
    return rows.long()
