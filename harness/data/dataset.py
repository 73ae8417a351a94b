"""Image datasets as uint8 tensors that live on the training device, in three fixed parts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness import processes
from harness.config import Binarization, UserError, checked_name
from harness.data.mnist import DATASETS
from harness.data.validate import PARTS, SPLIT_SEED, as_images, as_labels, digest, split_rows
from harness.streams import generator


@dataclass(frozen=True)
class Split:
    """Images and labels of one part of a dataset."""

    images: Tensor  # uint8, shape (N, D)
    labels: Tensor  # class of each image, int64, shape (N,); 0 if the dataset has no classes
    largest: int  # grey value that stands for 1

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of these images; that of a dataset is of its source, even when it is cut."""
        return digest(self.images, about=f"{tuple(self.images.shape)}/{self.largest}/")

    def pixels(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Return the chosen images as pixels in [0, 1]; `rows` of shape (...) gives (..., D)."""
        return self.images[rows].to(dtype) / self.largest

    def rows(self, rows: Tensor | slice) -> Split:
        """Return the chosen images and their labels."""
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def head(self, images: int) -> Split:
        """Return the first images of the split, which is in random order."""
        return self.rows(slice(images))

    def binarized(self, kind: Binarization, stream: np.random.Generator | None = None) -> Split:
        """Return the split with pixels 0 or 1.

        "threshold": 1 from half the largest grey value on; "stochastic": 1 with the pixel's value
        as probability, drawn from the stream (Salakhutdinov & Murray 2008); "none": unchanged.
        """
        if kind == "none":
            return self
        levels = np.full(1, (self.largest + 1) // 2 - 1, dtype=np.uint8)
        if kind == "stochastic":
            assert stream is not None
            shape = tuple(self.images.shape)
            levels = stream.integers(self.largest, size=shape, dtype=np.uint8)
        ones = self.images > torch.from_numpy(levels).to(self.images.device)
        return replace(self, images=ones.to(torch.uint8), largest=1)

    def to(self, device: torch.device) -> Split:
        """Return the split with its tensors on the device."""
        if self.images.device == device:
            return self
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A dataset in three fixed parts.

    Attributes:
        name: as given to `load_dataset` or `from_tensors`; "folder-NAME" of a folder of images.
        image_shape: (channels, height, width).
        classes: number of classes; 0 for images without labels.
        train, val, test: images for training, for choosing settings, and for measuring once.
        digest: SHA-256 of the pixels of all images, in the source's order; of a user's images, of
            parts and labels too, which their name does not determine.
        class_names: names of the classes of a user's images; () where classes are numbers.
    """

    name: str
    image_shape: tuple[int, int, int]
    classes: int
    train: Split
    val: Split
    test: Split
    digest: str
    class_names: tuple[str, ...] = ()

    @classmethod
    def from_tensors(
        cls,
        name: str,
        images: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | Sequence[int] | None = None,
        *,
        rows: Mapping[str, Iterable[int]] | None = None,
        class_names: Sequence[str] = (),
        largest: int = 255,
    ) -> Dataset:
        """Make a dataset of your own images.

        Args:
            name: its name in MLflow; letters, digits, ".", "_", "-".
            images: shape (N, H, W), grey, or (N, C, H, W) with 1 or 3 channels; uint8, or floats
                in [0, 1], which are rounded to 256 levels.
            labels: class of each image, counted from 0, shape (N,); None leaves out the metrics
                that need classes.
            rows: part ("train", "val", "test") -> its rows. A part that is missing gets a tenth of
                "train"; None splits all images 8 : 1 : 1, always in the same way.
            class_names: a name for each class.
            largest: grey value of uint8 images that stands for 1.

        Raises:
            UserError: a name, shape, type, value or row that cannot be used.
        """
        if checked_name(name, "name", 60) in DATASETS:  # it is part of the names of studies
            raise UserError(f"dataset name {name!r} is taken by another dataset; choose another")
        pictures = as_images(images, largest)
        classes, count = torch.zeros(len(pictures), dtype=torch.int64), 0
        if labels is not None:
            classes = as_labels(labels, len(pictures))
            count = max(int(classes.max()) + 1, len(class_names))
        if class_names and len(class_names) != count:
            raise UserError(f"class_names has {len(class_names)} names: the labels have {count}")
        grey = 255 if torch.as_tensor(images).is_floating_point() else largest
        whole = Split(pictures.flatten(1), classes, grey)
        train, val, test = map(whole.rows, split_rows(len(pictures), rows))
        if bool((train.images == train.images[0]).all()):
            raise UserError("all training images are the same: there is nothing to learn from them")
        channels, height, width = pictures.shape[1:]
        shape, parts = (channels, height, width), (train, val, test)
        known = [tensor for part in parts for tensor in (part.images, part.labels)]
        about = json.dumps([shape, grey, count, *map(len, parts)])
        return cls(name, shape, count, *parts, digest(*known, about=about), tuple(class_names))

    @property
    def has_classes(self) -> bool:
        """Whether the training images are of at least two classes."""
        return self.classes > 1 and len(self.train.labels.unique()) > 1

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

    def binarized(self, kind: Binarization) -> Dataset:
        """Return the dataset as runs with this `binarization` are measured on it.

        The drawn pixels are the same for every run and seed; binary images stay as they are.
        """
        if kind == "none":
            return self
        streams = {part: generator(SPLIT_SEED, f"binarize/{part}") for part in PARTS}
        parts = {part: getattr(self, part).binarized(kind, streams[part]) for part in PARTS}
        return replace(self, **parts)

    def shared(self) -> Dataset:
        """Return the dataset with images on a CPU in memory that worker processes share."""
        return self._each(lambda split: replace(split, images=processes.shared(split.images)))

    def to(self, device: torch.device) -> Dataset:
        """Return the dataset with its tensors on the device."""
        return self._each(lambda split: split.to(device))

    def _each(self, change: Callable[[Split], Split]) -> Dataset:
        changed: dict[str, Any] = {part: change(getattr(self, part)) for part in PARTS}
        return replace(self, **changed)


def with_official_training(data: Dataset) -> Dataset:
    """Return a dataset of the MNIST family with its official 60,000 training images.

    The validation split is appended to the training split and stays as it is: no settings may be
    chosen on it, and numbers can be compared with published ones.
    """
    images = torch.cat([data.train.images, data.val.images])
    labels = torch.cat([data.train.labels, data.val.labels])
    return replace(data, train=replace(data.train, images=images, labels=labels))
