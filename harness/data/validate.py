"""Checks of a user's images and labels as tensors, and their split into parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.config import UserError
from harness.streams import generator

if TYPE_CHECKING:
    import numpy as np

PARTS = ("train", "val", "test")
SPLIT_SEED = 0  # of the permutation that makes the parts, the same for runs of every seed
LEAST = 20  # images that can be split
MOST_CLASSES = 10_000  # a larger label is a code and not a number of a class


def digest(*parts: Tensor, about: str = "") -> str:
    """Return SHA-256, in hexadecimal, of a text and then the bytes of tensors."""
    whole = hashlib.sha256(about.encode())
    for part in parts:
        whole.update(part.cpu().contiguous().numpy().data)
    return whole.hexdigest()


def as_images(images: Tensor | np.ndarray, largest: int) -> Tensor:
    """Return images, as `Dataset.from_tensors` takes them, as uint8 of shape (N, C, H, W)."""
    if not 1 <= largest <= 255:
        raise UserError(f"largest={largest}: give a whole number from 1 to 255")
    images = torch.as_tensor(images).detach().cpu()
    shape = tuple(images.shape)
    images = images.unsqueeze(1) if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in shape:
        swapped = images.ndim == 4 and images.shape[-1] in (1, 3)
        hint = "; for (N, H, W, C) give images.permute(0, 3, 1, 2)" if swapped else ""
        raise UserError(
            f"images of shape {shape}: give (N, H, W) or (N, C, H, W) with 1 or 3 channels{hint}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise UserError(f"images of type {images.dtype}: give torch.uint8, or floats from 0 to 1")
    low, high = float(images.min()), float(images.max())
    allowed = 1 if images.is_floating_point() else largest
    if not 0 <= low <= high <= allowed:  # NaN too
        raise UserError(
            f"images from {low:g} to {high:g}: {images.dtype} must be from 0 to {allowed}; scale "
            "them, or give largest= for integers"
        )
    return images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)


def as_labels(labels: Tensor | np.ndarray | Sequence[int], images: int) -> Tensor:
    """Return the class of each image as int64, shape (N,)."""
    labels = torch.as_tensor(labels).detach().cpu()
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if tuple(labels.shape) != (images,) or not whole:
        raise UserError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype}: give one whole number "
            f"for each of {images} images"
        )
    labels = labels.long()
    if not 0 <= int(labels.min()) <= int(labels.max()) < MOST_CLASSES:
        raise UserError(
            f"labels from {int(labels.min())} to {int(labels.max())}: number classes from 0 on, "
            f"below {MOST_CLASSES}"
        )
    return labels


def split_rows(images: int, given: Mapping[str, Iterable[int]] | None) -> list[Tensor]:
    """Return the rows of train, val and test in a random order that is always the same."""
    given = {"train": range(images)} if given is None else given
    if "train" not in given or not set(given) <= set(PARTS):
        raise UserError(f"parts {sorted(given)}: name 'train' and, if you like, 'val' and 'test'")
    rows = {part: _rows(part, chosen) for part, chosen in given.items()}
    every = torch.cat(list(rows.values()))
    if int(every.min()) < 0 or int(every.max()) >= images or len(every.unique()) < len(every):
        raise UserError(
            f"rows of {', '.join(rows)}: give each row of the {images} images once at most, "
            "counted from 0"
        )
    for part, chosen in rows.items():
        order = generator(SPLIT_SEED, f"split/{part}").permutation(len(chosen))
        rows[part] = chosen[torch.from_numpy(order)]
    missing = [part for part in PARTS if part not in rows]
    count = len(rows["train"])
    if missing and count < LEAST:
        raise UserError(
            f"{count} images: {' and '.join(missing)} are taken from them, which needs "
            f"{LEAST}; give more, or give every part"
        )
    for part in missing:
        rows[part], rows["train"] = rows["train"].tensor_split([count // 10])
    return [rows[part] for part in PARTS]


def _rows(part: str, given: Iterable[int]) -> Tensor:
    rows = torch.as_tensor(list(given))
    if len(rows) < 2:
        raise UserError(f"part {part!r} has {len(rows)} images: give at least 2")
    if rows.is_floating_point() or rows.dtype == torch.bool:
        raise UserError(f"rows of {part!r} of type {rows.dtype}: give whole numbers, from 0 on")
    return rows.long()
