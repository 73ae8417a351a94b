"""Torchvision's classification sets, which it downloads, as datasets in three parts."""

import contextlib
import difflib
import inspect
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.data.dataset import Dataset
from harness.data.folder import Reading, from_pictures
from harness.data.mnist import usable
from harness.errors import UserError

Parts = dict[str, dict[str, Any]]  # official part -> the class's arguments for it

BY_TRAIN = ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS")
IN_TWO = ("FER2013", "Food101", "GTSRB", "STL10", "SVHN", "StanfordCars")
IN_THREE = ("CLEVRClassification", "DTD", "FGVCAircraft", "Flowers102", "PCAM", "RenderedSST2")
WHOLE = ("Caltech101", "Caltech256", "EuroSAT", "LFWPeople", "Omniglot", "SEMEION", "SUN397")

TRAIN: Parts = {"train": {"train": True}, "test": {"train": False}}
TWO: Parts = {part: {"split": part} for part in ("train", "test")}
THREE: Parts = {part: {"split": part} for part in ("train", "val", "test")}

SETS: dict[str, Parts] = {
    **dict.fromkeys(BY_TRAIN, TRAIN),
    **dict.fromkeys(IN_TWO, TWO),
    **dict.fromkeys(IN_THREE, THREE),
    **dict.fromkeys(WHOLE, {"train": {}}),
    "Country211": THREE | {"val": {"split": "valid"}},
    "EMNIST": {part: {"split": "balanced", **given} for part, given in TRAIN.items()},
    "Imagenette": {part: {"split": part} for part in ("train", "val")},
    "OxfordIIITPet": TWO | {"train": {"split": "trainval"}},
}
"""Sets of images with one class each that fit in memory, by their class in torchvision.

LFWPeople's parts and Omniglot's have classes of their own, of which one part cannot measure
another. EMNIST is its split "balanced".
"""


def read_torchvision(name: str, root: Path, how: Reading) -> Dataset:
    """Read a set of torchvision, downloaded unless it is there; its name is "torchvision-NAME".

    Official parts are kept, and those that a set lacks, or has without labels, are split off its
    training images. Images are read as a folder's. The `root` is as torchvision arranges it.
    """
    if name not in SETS:
        known, every = {one.lower(): one for one in SETS}, ", ".join(sorted(SETS))
        near = difflib.get_close_matches(name.lower(), known, 1)
        choice = f"did you mean {known[near[0]]}?" if near else f"choose one of {every}"
        raise UserError(f"torchvision:{name}: no such classification set; {choice}")
    parts, names = _parts(name, root)
    try:
        data = from_pictures(f"torchvision-{name}", parts, names, how)
    except UserError as error:
        raise UserError(f"torchvision:{name} in {root.resolve()}: {error}") from None
    return replace(data, options=how.options)


def _parts(name: str, root: Path) -> tuple[dict[str, Any], list[str]]:
    # Each part with labels, as a sequence of (image or file, label); names of the classes.
    before = {*root.glob("*")}
    # Torchvision takes a set that is unpacked in part for whole: a file marks it until it is.
    marks = {part: root / f".{name}-{part}-unfinished" for part in SETS[name]}
    with usable(f"torchvision:{name}", root, "the set there as torchvision arranges it", "it"):
        try:
            parts = {part: _part(name, root, part, marks[part]) for part in SETS[name]}
            kept = [p for p, (pairs, _) in parts.items() if p == "train" or pairs[0][1] is not None]
        except Exception:
            new = {*root.glob("*")} - before
            walked = [step for place in new for step in os.walk(place, topdown=False)]
            if not any(files for *_, files in walked):  # nothing was unpacked
                for mark in new & {*marks.values()}:
                    mark.unlink()
            for folder, *_ in walked:
                with contextlib.suppress(OSError):  # not empty
                    Path(folder).rmdir()
            raise
    return {part: parts[part][0] for part in kept}, parts["train"][1]


def _part(name: str, root: Path, part: str, mark: Path) -> tuple[Any, list[str]]:
    import torchvision  # takes seconds

    make, given = getattr(torchvision.datasets, name), SETS[name][part]
    accepted = inspect.signature(make).parameters
    given = {**given, "loader": str} if "loader" in accepted else given  # files, opened later
    try:
        read = make(str(root), **given)
        if mark.exists():
            raise ValueError(f"its download was stopped: delete what is there of it, and {mark}")
    except (RuntimeError, FileNotFoundError):  # torchvision's where files are missing
        if not accepted.keys() & {"download", "kwargs"}:
            raise
        root.mkdir(parents=True, exist_ok=True)
        mark.touch()
        read = make(str(root), **given, download=True)
        mark.unlink()
    if not len(read):
        raise ValueError("no image in it")
    classes = getattr(read, "classes", getattr(read, "categories", []))
    names = [one if isinstance(one, str) else one[0] for one in classes]
    if "loader" not in accepted:
        return read, names
    pairs = sorted(read[i] for i in range(len(read)))  # some are in the file system's order
    if name == "Omniglot":  # so are the numbers of its classes, which are nested folders
        classes = ["/".join(Path(file).parts[-3:-1]) for file, _ in pairs]
        names = sorted(set(classes))
        pairs = [(pair[0], names.index(one)) for pair, one in zip(pairs, classes, strict=True)]
    return pairs, names
