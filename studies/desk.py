"""Where the processes that share an Optuna study take trials and bring back results.

A trial has one process as long as it is RUNNING. A process that dies or falls silent loses its
trials: they fail for good, their work is handed out again under new numbers, and what it may still
bring is refused. All that reads and then writes happens under the study's lock and may be repeated,
so a database that goes away in between costs time and nothing else.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import lazy_loader

from harness.config import UserError
from studies import worker
from studies.databases import exclusive, is_postgres, patiently, pulse
from studies.runner import stopping, workers

if TYPE_CHECKING:
    import optuna

    from harness.training.engine import EpochRecord

    Trial = optuna.Trial | optuna.trial.FrozenTrial
else:
    optuna = lazy_loader.load("optuna")

Result = TypeVar("Result")

OWNER = "process"
"""User attribute of a trial: `worker.name` of the process that runs it."""

LONGEST_WAIT = 15.0
"""Seconds, at most, between two looks of a process that waits for the others."""


SILENCED = "This process was silent too long: others have its trials, its results do not count."


class LostError(Exception):
    """Others have taken the trials that are being trained here."""


@dataclass
class Desk:
    """An Optuna study that one or several processes run.

    Attributes:
        study: the study.
        storage: its database.
        me: name of this process.
        held: numbers of the trials that this process runs -> their ids.
        lost: whether others have taken some of them.
    """

    study: optuna.Study = field(repr=False)
    storage: optuna.storages.RDBStorage = field(repr=False)
    me: str = field(default_factory=worker.name)
    held: dict[int, int] = field(default_factory=dict)
    lost: bool = False

    @property
    def shared(self) -> bool:
        """Whether other processes may run the study at the same time."""
        return is_postgres(self.storage.url) or workers.rank() is not None

    def section(self, work: Callable[[], Result]) -> Result:
        """Do something alone among all processes of the study; it may be done twice."""

        def alone() -> Result:
            with exclusive(self.storage.url, self.study.study_name):
                return work()

        return patiently(alone, self.storage.url)

    def trials(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        """Return the trials in the named states (COMPLETE, PRUNED, RUNNING, WAITING, FAIL)."""
        wanted = tuple(optuna.trial.TrialState[state] for state in states)

        def read() -> list[optuna.trial.FrozenTrial]:
            return self.study.get_trials(deepcopy=False, states=wanted)

        return patiently(read, self.storage.url)

    def diverged(self) -> list[optuna.trial.FrozenTrial]:
        """Return the trials that failed for good."""
        return [trial for trial in self.trials("FAIL") if "diverged" in trial.user_attrs]

    def dead(self) -> list[int]:
        """Return the numbers of the trials whose processes were lost: their runs do not count."""
        return [trial.number for trial in self.trials("FAIL") if "diverged" not in trial.user_attrs]

    def bury(self) -> list[int]:
        """Fail the trials of dead processes; only within a `section`.

        Dead is who took a trial without signing it, whose process is not on this machine any more,
        or who has been silent for `worker.SILENT` heartbeats; where nobody shares the study,
        whoever is not on this machine.

        Returns:
            Numbers of the trials.

        Raises:
            UserError: another process is running this study, which is not shared.
        """
        gone = self._of_the_dead()
        for trial in gone:
            self.fail(trial)
        return [trial.number for trial in gone]

    def _of_the_dead(self) -> list[optuna.trial.FrozenTrial]:
        running = [t for t in self.trials("RUNNING") if t.user_attrs.get(OWNER) != self.me]
        # Not Optuna's fail_stale_trials: it does not say which, and what has no heartbeat stays.
        silent = self.storage._get_stale_trial_ids(self.study._study_id) if running else []
        return [t for t in running if self._is_gone(t) or t._trial_id in silent]

    def _is_gone(self, trial: optuna.trial.FrozenTrial) -> bool:
        owner = trial.user_attrs.get(OWNER)
        if owner is None or worker.is_gone(owner):
            return True
        if not self.shared and worker.is_here(owner):
            raise UserError(
                f"study {self.study.study_name!r} is being run by process "
                f"{worker.process_of(owner)} on this machine; wait for it, stop it, or start "
                "another with --study-name"
            )
        return not self.shared

    def others(self) -> set[str]:
        """Return who else runs trials now."""
        owners = {trial.user_attrs.get(OWNER, "") for trial in self.trials("RUNNING")}
        return owners - {self.me}

    def share(self, left: int, at_once: int) -> int:
        """Return how many of the trials that are left this process should take: its share."""
        crowd = workers.rank()
        count = max(len(self.others()) + 1, crowd.workers if crowd else 1)
        return min(at_once, math.ceil(left / count))

    def take(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Make a waiting trial this process's, in a `section`; False if it waits no longer."""
        if not self._set_state(trial, "RUNNING"):
            return False
        self.sign(trial)
        return True

    def sign(self, trial: Trial) -> None:
        """Write down that this process runs a trial."""
        self.storage.record_heartbeat(trial._trial_id)
        self.storage.set_trial_user_attr(trial._trial_id, OWNER, self.me)
        self.held[trial.number] = trial._trial_id

    def fail(self, trial: Trial) -> None:
        """Fail a trial, unless it is finished."""
        self._set_state(trial, "FAIL")

    def _set_state(self, trial: Trial, state: str) -> bool:
        """Change a trial's state, atomically under PostgreSQL; False if it cannot be."""
        try:
            return self.storage.set_trial_state_values(
                trial._trial_id, optuna.trial.TrialState[state]
            )
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    def tell(
        self,
        trial: Trial,
        state: str,
        values: Sequence[float] | None = None,
        said: Mapping[str, object] | None = None,
    ) -> None:
        """Bring the result of a trial.

        Args:
            trial: the trial.
            state: COMPLETE, PRUNED or FAIL.
            values: of its objectives, if it is complete.
            said: attributes to be set before.

        Raises:
            LostError: others have taken it; its result does not count.
        """
        self.held.pop(trial.number, None)
        ended, noted = optuna.trial.TrialState[state], said or {}

        def bring() -> None:
            now = self.storage.get_trial(trial._trial_id)
            if now.state == ended and noted.keys() <= now.user_attrs.keys():
                return  # an attempt whose reply was lost
            if now.state.is_finished():
                raise LostError
            for name, value in noted.items():
                self.storage.set_trial_user_attr(trial._trial_id, name, value)
            self.study.tell(trial.number, values, ended)

        try:
            self.section(bring)
        except optuna.exceptions.UpdateFinishedTrialError as error:
            raise LostError from error

    def watching(self, note: Callable[[EpochRecord], None]) -> Callable[[EpochRecord], None]:
        """Return what notes an epoch, and ends training whose trials others have taken.

        They are known from the last heartbeat; what counts is whether `tell` is refused.
        """

        def on_epoch(record: EpochRecord) -> None:
            note(record)
            if self.lost:
                raise LostError

        return on_epoch

    @contextmanager
    def working(self) -> Iterator[None]:
        """Keep the trials that were taken alive while they are trained and told.

        What is not told in the end is given back: after an interruption, or because others have
        taken a part of it. `LostError` ends the work and is not raised further; `lost` tells.
        """
        self.lost = False
        try:
            with pulse(self._beat, worker.beat()):
                yield
        except LostError:
            self.lost = True
            print(SILENCED, file=sys.stderr)
        except BaseException:
            with suppress(Exception):  # what matters is what interrupted
                self.give_back()
            raise
        self.section(self.give_back)

    def _beat(self) -> None:
        for number, trial in list(self.held.items()):
            self.storage.record_heartbeat(trial)
            if self.storage.get_trial(trial).state.is_finished() and number in self.held:
                self.lost = True

    def give_back(self) -> None:
        """Fail the trials of this process: of an attempt to take some that broke off, too."""
        for trial in self.trials("RUNNING"):
            if trial.user_attrs.get(OWNER) == self.me:
                self.fail(trial)
        self.held.clear()

    def _open(self) -> list[int]:
        return [trial.number for trial in self.trials("RUNNING", "WAITING")]

    def wait(self) -> None:
        """Wait as long as others run trials, none of them dies or ends, and nothing is waiting."""
        before, pause = self._open(), 0.5
        while before and self._open() == before:
            if patiently(self._of_the_dead, self.storage.url):
                return
            stopping.check()
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_WAIT)
