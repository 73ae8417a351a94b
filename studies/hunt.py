"""The Optuna study behind a search: what is asked, by whom, what is told, what is best."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import lazy_loader

from harness.config import UserError
from studies.databases import exclusive, patiently
from studies.desk import Desk, LostError
from studies.search_options import Range, SearchPlan
from studies.storage import agree

if TYPE_CHECKING:
    import optuna

    from studies.measures import Metrics
else:
    optuna = lazy_loader.load("optuna")

SELECTION = "val/neg_elbo"
"""What the best trial is chosen by, with one objective or two: neg_elbo of a front's points is
their own, and the lowest of all lies on the front, since it rises with rate and with mse."""


@dataclass(frozen=True)
class Hunt:
    """The Optuna study behind a search."""

    plan: SearchPlan
    desk: Desk = field(repr=False)
    _seen: list[int] = field(default_factory=list, repr=False)

    @property
    def study(self) -> optuna.Study:
        """The Optuna study."""
        return self.desk.study

    @property
    def choices(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """The plan's space in Optuna's terms."""
        return {name: _distribution(values) for name, values in self.plan.space.items()}

    def trials(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        """Return the trials in the named states (COMPLETE, PRUNED, FAIL)."""
        return self.desk.trials(*states)

    def diverged(self) -> list[optuna.trial.FrozenTrial]:
        """Return the trials that failed for good."""
        return self.desk.diverged()

    def left(self) -> int:
        """Return how many trials are still to be run."""
        done = len(self.trials("COMPLETE", "PRUNED")) + len(self.diverged())
        return max(0, self.plan.trials - done)

    def asked(self, at_once: int) -> Iterator[list[optuna.Trial]]:
        """Ask for the trials that are left, batch by batch; wait for those that others run."""
        while self.left():
            if trials := self.desk.section(lambda: self._take(at_once)):
                yield trials
            else:
                self.desk.wait()

    def _take(self, at_once: int) -> list[optuna.Trial]:
        self.desk.give_back()  # what an attempt took that broke off
        self.desk.bury()
        left = self.left() - len(self.trials("RUNNING"))
        return [self._ask() for _ in range(self.desk.share(max(0, left), at_once))]

    def _ask(self) -> optuna.Trial:
        """Ask for a trial; with a sampler of its own where others have asked in between.

        Keyed by the trials so far: a search that goes on does not draw its first points again, and
        two processes never draw the same.
        """
        known = len(self.study.get_trials(deepcopy=False))
        if self._seen != [known]:
            self.study.sampler = optuna.samplers.TPESampler(seed=known)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that heartbeats are not Optuna's own
            trial = self.study.ask(self.choices)
        self.desk.sign(trial)
        self._seen[:] = [known + 1]
        return trial

    def tell(
        self,
        trials: Sequence[optuna.Trial],
        results: Sequence[Metrics | None],
        pruned: set[int],
    ) -> None:
        """Tell what became of a batch.

        Args:
            trials: the batch.
            results: final metrics of its runs, seed by seed, None for one that was ended.
            pruned: numbers of the trials that were pruned.

        Raises:
            LostError: others have taken a trial.
        """
        for i, trial in enumerate(trials):
            runs = results[i * self.plan.seeds : (i + 1) * self.plan.seeds]
            finals = [metrics for metrics in runs if metrics is not None]
            if trial.number in pruned:
                self.desk.tell(trial, "PRUNED")
            elif len(finals) < len(runs):
                self.desk.tell(trial, "FAIL", said={"diverged": "a seed did"})
            else:
                means = [_mean([m[name] for m in finals]) for name in self.plan.objectives]
                chosen_by = {SELECTION: _mean([m[SELECTION] for m in finals])}
                self.desk.tell(trial, "COMPLETE", means, said=chosen_by)

    def is_worse(self, trial: optuna.Trial, value: float, epoch: int) -> bool:
        """Report a trial's value of an epoch, and say whether it is not worth going on.

        Raises:
            LostError: others have taken the trial.
        """

        def report() -> bool:
            trial.report(value, epoch)
            return trial.should_prune()

        try:
            return patiently(report, self.desk.storage.url)
        except optuna.exceptions.UpdateFinishedTrialError as error:
            raise LostError from error

    def front(self) -> list[optuna.trial.FrozenTrial]:
        """Return the trials that no other beats in every objective; with one, the best."""
        return self.study.best_trials

    def best(self) -> optuna.trial.FrozenTrial:
        """Return the trial with the lowest validation neg_elbo, of the front if there is one.

        Raises:
            UserError: no trial finished.
        """
        if not self.trials("COMPLETE"):
            raise UserError(
                f"search {self.plan.name!r} has no finished trial: all diverged or were pruned"
            )
        return min(self.front(), key=lambda trial: trial.user_attrs[SELECTION])

    def importances(self) -> dict[str, dict[str, float]]:
        """Return the share of each objective's variation that each parameter explains.

        Variation of ranks over finished trials (fANOVA, Hutter et al. 2014), so that a few
        hopeless trials do not explain everything. Empty for fewer than two finished trials.
        """
        done = self.trials("COMPLETE")
        if len(done) < 2:
            return {}
        found = {}
        for i, name in enumerate(self.plan.objectives):
            order = sorted(done, key=lambda trial, i=i: trial.values[i])  # type: ignore[misc]
            rank = {trial.number: float(place) for place, trial in enumerate(order)}
            shares = optuna.importance.get_param_importances(
                self.study,
                evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
                target=lambda trial, rank=rank: rank[trial.number],  # type: ignore[misc]
            )
            found[name] = {setting: float(share) for setting, share in shares.items()}
        return found


def _distribution(values: Range | tuple[str, ...]) -> optuna.distributions.BaseDistribution:
    if not isinstance(values, Range):
        return optuna.distributions.CategoricalDistribution(values)
    low, high, log = values
    if isinstance(low, int) and isinstance(high, int):
        return optuna.distributions.IntDistribution(low, high, log=log)
    return optuna.distributions.FloatDistribution(low, high, log=log)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def open_hunt(plan: SearchPlan, storage: optuna.storages.RDBStorage) -> Hunt:
    """Open or create the Optuna study of a search.

    Raises:
        UserError: it exists with other settings.
    """

    def create() -> optuna.Study:
        with exclusive(storage.url, plan.name):
            study = optuna.create_study(
                storage=storage,
                study_name=plan.name,
                directions=["minimize"] * len(plan.objectives),
                pruner=_pruner(plan),
                load_if_exists=True,
            )
            agree(study, plan.settings)
            return study

    return Hunt(plan, Desk(patiently(create, storage.url), storage))


def _pruner(plan: SearchPlan) -> optuna.pruners.BasePruner:
    if plan.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(plan.judged.start, plan.base.epochs)
    return optuna.pruners.MedianPruner() if plan.pruner == "median" else optuna.pruners.NopPruner()
