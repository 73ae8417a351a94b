"""Runs kept as they stand after an epoch, so that an interrupted one goes on from there.

A file holds one run: weights and Adam's moments as safetensors, and in its header, as JSON, the
configuration, what it was made with, every epoch's metrics so far, and a digest of it all. Random
streams need no state (`harness.streams`). A run can go on in any stack, since nothing of its
company is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from harness import provenance
from harness.config import RunConfig, UserError
from harness.data.dataset import Dataset
from harness.places import put

MADE_WITH = ("code", "versions", "device", "dataset")
"""Parts of a run's provenance that must be the same for its epochs to be those of one run."""

NAME = "checkpoint"
"""Key of the JSON in a file's header."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch of a run gave.

    Attributes:
        seconds, images: of the stack that it was trained in, as in `EpochRecord`.
        train, val: metrics of the run.
    """

    seconds: float
    images: int
    train: dict[str, float]
    val: dict[str, float]


@dataclass(frozen=True)
class Saved:
    """A run as it stood after some epochs.

    Attributes:
        course: what each of these epochs gave.
        state: tensors by name, without run axis.
    """

    course: list[Epoch]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoints:
    """Where unfinished runs are kept, and how often.

    Whoever trains removes the files of runs that have ended, once their results are safe.

    Attributes:
        folder: of this study or experiment alone; made when it is needed.
        every: epochs between two checkpoints, at least 1.

    Raises:
        UserError: `every` is less than 1.
    """

    folder: Path
    every: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"checkpoint_every={self.every}: give a whole number of epochs >= 1")

    def file(self, config: RunConfig) -> Path:
        """Return where a run is kept."""
        digest = hashlib.sha256(config.to_json().encode()).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"

    def save(self, config: RunConfig, made_with: Mapping[str, Any], saved: Saved) -> None:
        """Write a run's file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        state = {name: tensor.cpu().contiguous() for name, tensor in saved.state.items()}
        said = {
            "config": json.loads(config.to_json()),
            "made_with": made_with,
            "course": [asdict(epoch) for epoch in saved.course],
        }
        text = json.dumps(said)
        header = {NAME: text, "digest": _digest(text, state)}
        self.folder.mkdir(parents=True, exist_ok=True)
        put(self.file(config), save(state, header))

    def load(self, config: RunConfig, made_with: Mapping[str, Any]) -> Saved | None:
        """Read a run's file; None, and a line in the log, for one that cannot be gone on from."""
        file = self.file(config)
        if not file.exists():
            return None
        try:
            return _read(file, config, made_with)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())
            logging.getLogger(__name__).warning(
                "Checkpoint %s is not used, the run begins anew: %s", file, said
            )
            return None

    def remove(self, configs: Sequence[RunConfig]) -> None:
        """Remove the files of runs that have ended."""
        for config in configs:
            self.file(config).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the folder, whatever is in it: the study has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)


def made_with(data: Dataset, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a checkpoint must have been made with to be gone on from, as plain values."""
    found = provenance.provenance(data, device)
    return {part: found[part] for part in MADE_WITH} | {"dtype": str(dtype)}


def _read(file: Path, config: RunConfig, made_with: Mapping[str, Any]) -> Saved:
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    text = header[NAME]
    if header["digest"] != _digest(text, state):
        raise ValueError("its contents are not what was written")
    said = json.loads(text)
    if said["config"] != json.loads(config.to_json()):
        raise ValueError("it is of another run")
    then = said["made_with"]
    different = [name for name in made_with if _relevant(made_with, name) != _relevant(then, name)]
    if different:
        raise ValueError(f"it was made with another {', '.join(different)}")
    return Saved([Epoch(**epoch) for epoch in said["course"]], state)


def _relevant(made_with: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401 - plain values
    """Return a part of the provenance; of the code only the sources, whatever git says of them."""
    part = made_with.get(name)
    return part["sources"] if name == "code" and isinstance(part, dict) else part


def _digest(text: str, state: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256(text.encode())
    for name, tensor in sorted(state.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
