"""What MLflow says of a study, kept true to what Optuna says, and its end written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import harness
from studies.databases import exclusive, patiently

if TYPE_CHECKING:
    from harness.tracking import Store
    from studies.desk import Desk
    from studies.summary import Outcome

TAKEN = "others took its trial, for its process was silent too long"


@dataclass
class Books:
    """The MLflow runs of a study that one or several processes run.

    Attributes:
        desk: the Optuna study.
        store: where runs are.
        experiment: name of their experiment.
        label: number of a trial -> its tag in MLflow.
    """

    desk: Desk = field(repr=False)
    store: Store = field(repr=False)
    experiment: str
    label: Callable[[int], str] = str
    _settled: set[int] = field(default_factory=set)

    @property
    def study(self) -> str:
        """Name of the study."""
        return self.desk.study.study_name

    def settle(self) -> None:
        """Close the runs of trials that were lost: KILLED even where they were finished."""
        dead = set(self.desk.dead())
        if dead - self._settled:
            reason = TAKEN if self.desk.lost else "its process is gone"
            labels = [self.label(number) for number in dead]
            harness.ledger.bury_runs(self.store, self.experiment, self.study, labels, reason)
            self._settled = dead
        self.desk.lost = False

    def conclude(self, summarize: Callable[[], Outcome], *, worked: bool) -> Outcome | str:
        """Write the summary, once among all processes; who dies over it is followed by another.

        Args:
            summarize: writes it, unless it is there.
            worked: whether this process took part; then it repeats no summary of another's.

        Returns:
            What was found, or a sentence on who wrote it.
        """
        attempts: list[bool] = []

        def alone() -> Outcome | str:
            with exclusive(self.desk.storage.url, f"{self.study}/summary"):
                self._settled.clear()
                self.settle()
                # A summary of an attempt that lost its lock may have a twin.
                own = bool(attempts)
                attempts.append(True)
                done = harness.ledger.bury_summaries(
                    self.store, self.experiment, self.study, own=own
                )
                if done and worked and self.desk.shared:
                    return _elsewhere(done[-1])
                return summarize()

        return patiently(alone, self.desk.storage.url)


def _elsewhere(summary: dict[str, dict[str, str]]) -> str:
    tags = summary["tags"]
    return (
        f"The summary was written by process {tags['process']} on {tags['host']}: run "
        f"{summary['run_id']} in MLflow."
    )
