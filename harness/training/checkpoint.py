"""Checkpoints of unfinished runs, and the epochs of runs that were resumed.

A file holds one run as safetensors, and then their SHA-256: weights, Adam's moments and buffers,
and as JSON every epoch's metrics so far and what the run was made with. Random streams need no
state (`harness.streams`). A run can go on in any stack, since nothing of the other runs is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from harness import provenance
from harness.config import RunConfig
from harness.data.dataset import Dataset
from harness.errors import UserError
from harness.models.files import put

TEXT = "json"
"""Name of the JSON among the tensors of a file."""

DIGEST = 32
"""Bytes of a SHA-256."""


@dataclass(frozen=True)
class Epoch:
    """One epoch of a run: seconds and images as in `EpochRecord`, and the run's own metrics."""

    seconds: float
    images: int
    train: dict[str, float]
    val: dict[str, float]


class Saved(NamedTuple):
    """A run as it is after some epochs: each of them, and its tensors by name."""

    epochs: list[Epoch]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoints:
    """Where unfinished runs are kept, and how often.

    The caller removes the files of runs that have ended, once their results are safe.

    Attributes:
        folder: of this study or experiment alone; created when it is needed.
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
        """Return the file of a run."""
        digest = hashlib.sha256(config.to_json().encode()).hexdigest()
        return self.folder / f"{digest[:32]}.checkpoint"

    def save(self, config: RunConfig, made_with: Mapping[str, Any], saved: Saved) -> None:
        """Write a run's file, whole or not at all; an OSError leaves an older one as it was."""
        epochs = [asdict(epoch) for epoch in saved.epochs]
        text = json.dumps([config.to_json(), made_with, epochs]).encode()
        plain = torch.contiguous_format
        state = {n: value.cpu().clone(memory_format=plain) for n, value in saved.state.items()}
        content = save(state | {TEXT: torch.frombuffer(bytearray(text), dtype=torch.uint8)})
        self.folder.mkdir(parents=True, exist_ok=True)
        put(self.file(config), content + hashlib.sha256(content).digest())

    def load(self, config: RunConfig, made_with: Mapping[str, Any]) -> Saved | None:
        """Return what a run's file holds; None, and a warning, if it cannot be resumed from."""
        file = self.file(config)
        try:
            return _read(file.read_bytes(), config, made_with)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            logging.getLogger(__name__).warning(
                "Checkpoint %s is not used, the run begins anew: %s", file, error
            )
            return None

    def remove(self, configs: Sequence[RunConfig]) -> None:
        """Remove the files of runs that have ended."""
        for config in configs:
            self.file(config).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the folder, whatever is in it: the study has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(content: bytes, config: RunConfig, made_with: Mapping[str, Any]) -> Saved:
    written, digest = content[:-DIGEST], content[-DIGEST:]
    if hashlib.sha256(written).digest() != digest:
        raise ValueError("its contents are not what was written")
    state = load(written)
    settings, then, epochs = json.loads(state.pop(TEXT).numpy().tobytes())
    if settings != config.to_json():
        raise ValueError("it is of another run")
    if different := [name for name in made_with if made_with[name] != then.get(name)]:
        raise ValueError(f"it was made with another {', '.join(different)}")
    return Saved([Epoch(**epoch) for epoch in epochs], state)


class History:
    """The epochs of runs, those of earlier processes among them, and their next checkpoints.

    Args:
        configs: the runs.
        made_with: what their checkpoints must have been made with.
        checkpoints: where they are kept; None keeps nothing.

    Attributes:
        epochs: of each run, those trained before, and with checkpoints those trained now.
        states: what each run is resumed from, None for one that begins here.
        starts: number of epochs that each run was trained before.
    """

    def __init__(
        self,
        configs: Sequence[RunConfig],
        made_with: Mapping[str, Any],
        checkpoints: Checkpoints | None,
    ) -> None:
        self.configs, self._made_with, self._checkpoints = configs, made_with, checkpoints
        found = [checkpoints.load(c, made_with) if checkpoints else None for c in configs]
        self.epochs = [saved.epochs if saved else [] for saved in found]
        self.states = [saved.state if saved else None for saved in found]
        self.starts = [len(epochs) for epochs in self.epochs]

    def add(self, epochs: Mapping[int, Epoch]) -> None:
        """Keep an epoch of some runs, by row, for their next checkpoints."""
        for row, epoch in epochs.items() if self._checkpoints else ():
            self.epochs[row].append(epoch)

    def is_due(self, epoch: int) -> bool:
        """Return whether checkpoints are written after an epoch: every so many, and the last."""
        every = self._checkpoints.every if self._checkpoints else 0
        return every > 0 and (epoch % every == 0 or epoch == self.configs[0].epochs)

    def save(self, rows: Sequence[int], states: Sequence[dict[str, Tensor]]) -> None:
        """Write a checkpoint of each run that was trained here; an OSError if one cannot be."""
        if self._checkpoints is None:
            return
        for row, state in zip(rows, states, strict=True):
            if len(self.epochs[row]) > self.starts[row]:
                saved = Saved(self.epochs[row], state)
                self._checkpoints.save(self.configs[row], self._made_with, saved)


def made_with(data: Dataset, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a checkpoint must have been made with to be resumed from, as plain values."""
    return {
        "code": provenance.code().sources,  # the same ones, whatever git says of them
        "versions": provenance.versions(),
        "device": provenance.device(device),
        "dataset": provenance.dataset(data),
        "dtype": str(dtype),
    }
