"""Checkpoints of unfinished runs.

A file holds one run as safetensors, followed by their SHA-256: weights, moments, buffers,
and as "json" the metrics of all epochs and the run's provenance. Random streams need no state.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from harness import provenance, registry
from harness.config import RunConfig
from harness.data.dataset import Dataset
from harness.errors import UserError
from harness.models.files import put_sealed, read_sealed


class Epoch(NamedTuple):
    """One epoch of a run: seconds and images as in `EpochRecord`, and the run's metrics."""

    seconds: float
    images: int
    train: dict[str, float]
    val: dict[str, float]


class Saved(NamedTuple):
    """A run after some epochs: each of them, and the run's tensors by name."""

    epochs: list[Epoch]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoints:
    """Where unfinished runs are written to, and how often.

    A run is written after its last epoch and when the caller of `train` stops early, too. The
    caller removes the files of runs that have ended, once their results are safe.
    """

    folder: Path  # of this study or experiment alone; created when it is needed
    every: int  # epochs between two checkpoints, at least 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"checkpoint_every={self.every}: give a whole number of epochs >= 1")

    def file(self, config: RunConfig) -> Path:
        """Return the file of a run."""
        digest = hashlib.sha256(config.to_json().encode()).hexdigest()
        return self.folder / f"{digest[:32]}.checkpoint"

    def save(self, config: RunConfig, made_with: Mapping[str, Any], saved: Saved) -> None:
        """Write a run's file, whole or not at all; an OSError leaves an older one as it was."""
        text = json.dumps([made_with, saved.epochs]).encode()
        plain = torch.contiguous_format
        state = {n: value.cpu().clone(memory_format=plain) for n, value in saved.state.items()}
        content = save(state | {"json": torch.frombuffer(bytearray(text), dtype=torch.uint8)})
        self.folder.mkdir(parents=True, exist_ok=True)
        put_sealed(self.file(config), content)

    def load(self, config: RunConfig, made_with: Mapping[str, Any]) -> Saved:
        """Return a run as its file holds it; if that cannot be used, no epochs and a warning."""
        file = self.file(config)
        try:
            state = load(read_sealed(file))
            then, epochs = json.loads(state.pop("json").numpy().tobytes())
            if different := [name for name in made_with if made_with[name] != then.get(name)]:
                raise ValueError(f"it was made with another {', '.join(different)}")
            return Saved([Epoch(*epoch) for epoch in epochs], state)
        except FileNotFoundError:
            pass
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            log = logging.getLogger(__name__)
            log.warning("Checkpoint %s is not used, the run starts again: %s", file, error)
        return Saved([], {})

    def remove(self, configs: Sequence[RunConfig]) -> None:
        """Remove the files of runs that have ended."""
        for config in configs:
            self.file(config).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the folder of a study that has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)


def made_with(config: RunConfig, data: Dataset, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the provenance that a run's checkpoint must have to be resumed from.

    Of a user's network, likelihood, terms and metrics of every epoch it is their source's digest.
    """
    every = {name for name, metric in registry.METRICS.items() if metric.every_epoch}
    digests = {
        f"{kind} {name}": registry.digest(text)
        for (kind, name), text in registry.sources(config).items()
        if kind != "metric" or name in every
    }
    return digests | {
        "code": provenance.code().sources,  # whether or not they are committed
        "versions": provenance.versions(),
        "device": provenance.device(device),
        "dataset": provenance.dataset(data),
        "dtype": str(dtype),
    }
