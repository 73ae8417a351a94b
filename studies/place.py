"""Where stacks of runs are trained and recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness.config import RunConfig
from harness.data.dataset import Dataset
from harness.tracking import Store
from harness.training.engine import EpochRecord

if TYPE_CHECKING:
    from harness.training.checkpoint import Checkpoints
    from studies.plan import Plan
    from studies.question import Study


@dataclass(frozen=True)
class Place:
    """Where stacks are trained and recorded.

    Attributes:
        plan: None for runs that are no study's points.
        data: their dataset.
        device: "cpu" or "cuda".
        store: where they are tracked.
        experiment_id: their experiment.
        on_epoch: called after every epoch.
        checkpoints: where unfinished runs are kept, if they are.
    """

    plan: Plan | None
    data: Dataset
    device: str
    store: Store
    experiment_id: str
    on_epoch: Callable[[EpochRecord], None] = field(repr=False)
    checkpoints: Checkpoints | None = None

    @property
    def study(self) -> Study | None:
        """The study whose points the runs are."""
        return None if self.plan is None else self.plan.study

    def forget(self, configs: Sequence[RunConfig]) -> None:
        """Remove the checkpoints of runs that have ended and been told."""
        if self.checkpoints is not None:
            self.checkpoints.remove(configs)
