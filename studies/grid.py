"""The Optuna study behind a plan: which points are finished, which are to be done, by whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import lazy_loader

from studies.databases import exclusive, patiently
from studies.desk import Desk
from studies.plan import Point
from studies.storage import agree

if TYPE_CHECKING:
    import optuna

    from studies.plan import Plan

    Trial = optuna.Trial | optuna.trial.FrozenTrial
else:
    optuna = lazy_loader.load("optuna")


@dataclass(frozen=True)
class Grid:
    """The points of a plan, one trial each, as a desk hands them out."""

    plan: Plan
    desk: Desk = field(repr=False)

    @property
    def study(self) -> optuna.Study:
        """The Optuna study."""
        return self.desk.study

    def trials(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        """Return the trials in the named states (COMPLETE, RUNNING, WAITING, FAIL)."""
        return self.desk.trials(*states)

    def point(self, trial: Trial) -> Point:
        """Return the point of a trial; of one that was enqueued, too."""
        given = trial.params
        if isinstance(trial, optuna.trial.FrozenTrial):
            given = {**trial.system_attrs.get("fixed_params", {}), **given}
        return Point(given.get(self.plan.study.group, ""), given[self.plan.study.axis.name])

    def finished(self) -> list[Point]:
        """Return the points that have a result."""
        return [self.point(trial) for trial in self.trials("COMPLETE")]

    def left(self) -> list[Point]:
        """Return the points that have no result and are not known to diverge."""
        failed = [self.point(trial) for trial in self.desk.diverged()]
        done = self.finished() + failed
        return [point for point in self.plan.configs if point not in done]

    def replenish(self) -> list[optuna.trial.FrozenTrial]:
        """Let every point wait that is left and that nobody runs; only in a section of the desk.

        Of a point that has more trials than one, all but the first are failed.

        Returns:
            The trials that wait, one for each of those points.
        """
        running = [self.point(trial) for trial in self.trials("RUNNING")]
        left = [point for point in self.left() if point not in running]
        waiting = {}
        for trial in self.trials("WAITING"):
            if (point := self.point(trial)) in left and point not in waiting:
                waiting[point] = trial
            else:
                self.desk.fail(trial)
        missing = [point for point in left if point not in waiting]
        for point in missing:
            self.study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.WAITING,
                    params=self.plan.coordinates(point),
                    distributions=self._choices(),
                )
            )
        return self.trials("WAITING") if missing else list(waiting.values())

    def _choices(self) -> dict[str, optuna.distributions.BaseDistribution]:
        every = [self.plan.coordinates(point) for point in self.plan.configs]
        return {
            name: optuna.distributions.CategoricalDistribution(
                list(dict.fromkeys(coordinates[name] for coordinates in every))
            )
            for name in every[0]
        }

    def bury(self) -> list[int]:
        """Fail the trials of dead processes and let their points wait again: `Desk.bury`."""

        def work() -> list[int]:
            buried = self.desk.bury()
            self.replenish()
            return buried

        return self.desk.section(work)

    def asked(self, at_once: int) -> Iterator[list[optuna.trial.FrozenTrial]]:
        """Take the points that are left, as many trials together as a stack takes or fewer.

        Where others run the study too, this waits for what they may leave, and ends when no point
        is left.
        """
        while True:
            if trials := self.desk.section(lambda: self._take(at_once)):
                yield trials
            elif self.trials("RUNNING", "WAITING"):
                self.desk.wait()
            else:
                return

    def _take(self, at_once: int) -> list[optuna.trial.FrozenTrial]:
        # What an attempt took whose lock was lost may have been taken by another, too.
        self.desk.give_back()
        self.desk.bury()
        waiting = self.replenish()
        share = self.desk.share(len(waiting), at_once)
        return [trial for trial in waiting[:share] if self.desk.take(trial)]

    def tell(self, trial: Trial, objectives: Sequence[float | None]) -> None:
        """Tell the mean over seeds; a point of which a seed diverged has failed for good.

        Raises:
            LostError: others have taken the trial.
        """
        finite = [value for value in objectives if value is not None]
        if gone := len(objectives) - len(finite):
            self.desk.tell(trial, "FAIL", said={"diverged": f"{gone} seeds"})
        else:
            self.desk.tell(trial, "COMPLETE", [sum(finite) / len(finite)])


def open_grid(plan: Plan, storage: optuna.storages.RDBStorage) -> Grid:
    """Open or create the Optuna study of a plan.

    Raises:
        UserError: the study exists with other settings.
    """

    def create() -> optuna.Study:
        with exclusive(storage.url, plan.name):
            study = optuna.create_study(
                storage=storage, study_name=plan.name, direction="minimize", load_if_exists=True
            )
            agree(study, plan.settings)
            return study

    return Grid(plan, Desk(patiently(create, storage.url), storage))
