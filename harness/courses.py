"""The course of a stack's runs, epoch by epoch, over interruptions: what checkpoints hold."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from harness import checkpoint
from harness.checkpoint import Checkpoints, Epoch, Saved
from harness.config import RunConfig
from harness.data.dataset import Dataset
from harness.gauge import Arrays
from harness.part import Part


class Measured(NamedTuple):
    """What one epoch of some runs gave: seconds, and metrics of shape (S,)."""

    training: float
    measuring: float
    train: Arrays
    val: Arrays


class Courses:
    """All epochs of a stack's runs so far, those of earlier processes among them.

    Args:
        configs: the runs.
        data: their dataset.
        device: where they are trained.
        dtype: their floating-point type.
        checkpoints: where they are kept; None keeps and recalls nothing.
    """

    def __init__(
        self,
        configs: Sequence[RunConfig],
        data: Dataset,
        device: torch.device,
        dtype: torch.dtype,
        checkpoints: Checkpoints | None,
    ) -> None:
        self._configs, self._checkpoints = configs, checkpoints
        self._made_with: dict[str, Any] = {}
        found: list[Saved | None] = [None] * len(configs)
        if checkpoints is not None:
            self._made_with = checkpoint.made_with(data, device.type, dtype)
            found = [checkpoints.load(config, self._made_with) for config in configs]
        self._found = found
        self._epochs = [list(saved.course) if saved else [] for saved in found]
        self.starts = [len(epochs) for epochs in self._epochs]
        """Epochs that each run has behind it."""

    def restore(self, part: Part) -> None:
        """Set the runs of a part to where they go on from; they have equal starts."""
        states = [saved.state for row in part.rows if (saved := self._found[row])]
        if states:
            part.step.restore(states)

    def recall(self, rows: Sequence[int], epoch: int) -> Measured:
        """Return what an epoch gave that was trained before."""
        past = [self._epochs[row][epoch - 1] for row in rows]
        return Measured(0.0, 0.0, _joined([e.train for e in past]), _joined([e.val for e in past]))

    def pace(self, row: int, epoch: int) -> tuple[float, int]:
        """Return seconds and images of an epoch that was trained before."""
        past = self._epochs[row][epoch - 1]
        return past.seconds, past.images

    def note(
        self, epoch: int, rows: Sequence[int], pace: tuple[float, int], train: Arrays, val: Arrays
    ) -> None:
        """Keep what an epoch gave for the next checkpoints of the runs that were trained in it."""
        if self._checkpoints is None:
            return
        for i, row in enumerate(rows):
            if epoch > self.starts[row]:
                both = ({k: float(v[i]) for k, v in metrics.items()} for metrics in (train, val))
                self._epochs[row].append(Epoch(*pace, *both))

    def save(self, parts: Sequence[Part], epoch: int) -> None:
        """Write a checkpoint of every run if the epoch is due for one.

        Raises:
            OSError: one cannot be written.
        """
        every = self._checkpoints.every if self._checkpoints else 0
        if every and (epoch % every == 0 or epoch == self._configs[0].epochs):
            self._save(parts, epoch)

    def stop(self, parts: Sequence[Part], epoch: int) -> None:
        """Write a checkpoint of every run, for training ends here; a failure is only logged."""
        try:
            self._save(parts, epoch)
        except OSError as error:
            said = "The last epochs could not be kept as checkpoints: %s"
            logging.getLogger(__name__).warning(said, error)

    def _save(self, parts: Sequence[Part], epoch: int) -> None:
        if self._checkpoints is None:
            return
        for part in parts:
            for row, state in zip(part.rows, part.step.states(), strict=True):
                if epoch > self.starts[row]:
                    saved = Saved(self._epochs[row], state)
                    self._checkpoints.save(self._configs[row], self._made_with, saved)


def _joined(every: Sequence[Mapping[str, float]]) -> Arrays:
    names = dict.fromkeys(name for values in every for name in values)
    return {name: np.array([values.get(name, np.nan) for values in every]) for name in names}
