"""Checkpoints of unfinished runs, and the epochs of runs that were resumed.

A file holds one run: weights, Adam's moments and buffers as safetensors, and in its header, as
JSON, the configuration, what it was made with, every epoch's metrics so far, and a digest of it
all. Random streams need no state (`harness.streams`). A run can go on in any stack, since nothing
of the other runs is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from harness import provenance
from harness.config import RunConfig
from harness.data.dataset import Dataset
from harness.errors import UserError
from harness.models.files import put

MADE_WITH = ("code", "versions", "device", "dataset")
"""Parts of a run's provenance that must be the same for its epochs to be those of one run."""

NAME = "checkpoint"
"""Key of the JSON in a file's header."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch of a run gave.

    Attributes:
        seconds, images: of all runs trained with it, as in `EpochRecord`.
        train, val: metrics of the run.
    """

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
        return self.folder / f"{digest[:32]}.safetensors"

    def save(self, config: RunConfig, made_with: Mapping[str, Any], saved: Saved) -> None:
        """Write a run's file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        state = {name: tensor.cpu().contiguous() for name, tensor in saved.state.items()}
        content = {
            "config": json.loads(config.to_json()),
            "made_with": made_with,
            "epochs": [asdict(epoch) for epoch in saved.epochs],
        }
        text = json.dumps(content)
        header = {NAME: text, "digest": _digest(text, state)}
        self.folder.mkdir(parents=True, exist_ok=True)
        put(self.file(config), save(state, header))

    def load(self, config: RunConfig, made_with: Mapping[str, Any]) -> Saved | None:
        """Return what a run's file holds; None, and a warning, if it cannot be resumed from."""
        file = self.file(config)
        if not file.exists():
            return None
        try:
            return _read(file, config, made_with)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())
            logging.getLogger(__name__).warning(
                "Checkpoint %s is not used, the run begins anew: %s", file, why
            )
            return None

    def remove(self, configs: Sequence[RunConfig]) -> None:
        """Remove the files of runs that have ended."""
        for config in configs:
            self.file(config).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the folder, whatever is in it: the study has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)


class History:
    """All epochs of the runs in training so far, those of earlier processes among them.

    Args:
        configs: the runs.
        made_with: what their checkpoints must have been made with.
        checkpoints: where they are kept; None keeps nothing.
    """

    def __init__(
        self,
        configs: Sequence[RunConfig],
        made_with: Mapping[str, Any],
        checkpoints: Checkpoints | None,
    ) -> None:
        self._configs, self._made_with, self._checkpoints = configs, made_with, checkpoints
        found = [checkpoints.load(c, made_with) if checkpoints else None for c in configs]
        self.epochs = [list(saved.epochs) if saved else [] for saved in found]
        """Epochs of each run: those trained before, and with checkpoints those trained now."""
        self.states = [saved.state if saved else None for saved in found]
        """What each run is resumed from."""
        self.starts = [len(epochs) for epochs in self.epochs]
        """Number of epochs that each run was trained before."""

    def add(self, epochs: Mapping[int, Epoch]) -> None:
        """Keep an epoch of some runs for their next checkpoints."""
        for row, epoch in epochs.items() if self._checkpoints is not None else ():
            self.epochs[row].append(epoch)

    def save(self, states: Iterable[tuple[int, dict[str, Tensor]]], epoch: int) -> None:
        """Write a checkpoint of each (row, state) if the epoch is due for one.

        Raises:
            OSError: one cannot be written.
        """
        every = self._checkpoints.every if self._checkpoints else 0
        if every and (epoch % every == 0 or epoch == self._configs[0].epochs):
            self._save(states, epoch)

    def stop(self, states: Iterable[tuple[int, dict[str, Tensor]]], epoch: int) -> None:
        """Write a checkpoint of each run, since training ends here; a failure is only logged."""
        try:
            self._save(states, epoch)
        except OSError as error:
            message = "The last epochs could not be kept as checkpoints: %s"
            logging.getLogger(__name__).warning(message, error)

    def _save(self, states: Iterable[tuple[int, dict[str, Tensor]]], epoch: int) -> None:
        if self._checkpoints is None:
            return
        for row, state in states:
            if epoch > self.starts[row]:
                saved = Saved(self.epochs[row], state)
                self._checkpoints.save(self._configs[row], self._made_with, saved)


def made_with(data: Dataset, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a checkpoint must have been made with to be resumed from, as plain values."""
    found = provenance.provenance(data, device)
    return {part: found[part] for part in MADE_WITH} | {"dtype": str(dtype)}


def _read(file: Path, config: RunConfig, made_with: Mapping[str, Any]) -> Saved:
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    text = header[NAME]
    if header["digest"] != _digest(text, state):
        raise ValueError("its contents are not what was written")
    content = json.loads(text)
    if content["config"] != json.loads(config.to_json()):
        raise ValueError("it is of another run")
    then = content["made_with"]
    different = [name for name in made_with if _relevant(made_with, name) != _relevant(then, name)]
    if different:
        raise ValueError(f"it was made with another {', '.join(different)}")
    return Saved([Epoch(**epoch) for epoch in content["epochs"]], state)


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
