"""How a search runs: Optuna proposes batches as wide as a stack, the stack prunes, Optuna learns.

A trial is a configuration; its runs, one a seed, are rows of the stack. What it is told is their
mean. A trial that is pruned, or of which a seed diverges, leaves the stack with all its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import lazy_loader

import harness
from harness.config import UserError
from studies.search_options import Range, SearchOptions, SearchPlan
from studies.study import agree, bury_trials, claim, open_both, unused_name

if TYPE_CHECKING:
    import optuna

    from harness.data import Dataset
    from harness.engine import EpochRecord
    from studies.console import Console
    from studies.stack import End, Metrics, Place
    from studies.summary import Outcome
else:
    optuna = lazy_loader.load("optuna")

SELECTION = "val/neg_elbo"
"""What the best trial is chosen by, with one objective or two: neg_elbo of a front's points is
their own, and the lowest of all lies on the front, since it rises with rate and with mse."""


@dataclass(frozen=True)
class Hunt:
    """The Optuna study behind a search."""

    plan: SearchPlan
    study: optuna.Study = field(repr=False)

    @property
    def choices(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """The plan's space in Optuna's terms."""
        return {name: _distribution(values) for name, values in self.plan.space.items()}

    def trials(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        """Return the trials in the named states (COMPLETE, PRUNED, FAIL)."""
        wanted = tuple(optuna.trial.TrialState[state] for state in states)
        return self.study.get_trials(deepcopy=False, states=wanted)

    def diverged(self) -> list[optuna.trial.FrozenTrial]:
        """Return the trials that failed for good."""
        return [trial for trial in self.trials("FAIL") if "diverged" in trial.user_attrs]

    def left(self) -> int:
        """Return how many trials are still to be run."""
        done = len(self.trials("COMPLETE", "PRUNED")) + len(self.diverged())
        return max(0, self.plan.trials - done)

    def asked(self, at_once: int) -> Iterator[list[optuna.Trial]]:
        """Ask for the trials that are left, batch by batch."""
        while left := self.left():
            trials = [self.study.ask(self.choices) for _ in range(min(left, at_once))]
            claim(trials)
            yield trials

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
        """
        for i, trial in enumerate(trials):
            runs = results[i * self.plan.seeds : (i + 1) * self.plan.seeds]
            finals = [metrics for metrics in runs if metrics is not None]
            if trial.number in pruned:
                self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            elif len(finals) < len(runs):
                trial.set_user_attr("diverged", "a seed did")
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                means = [_mean([m[name] for m in finals]) for name in self.plan.objectives]
                trial.set_user_attr(SELECTION, _mean([m[SELECTION] for m in finals]))
                self.study.tell(trial, means)

    def front(self) -> list[optuna.trial.FrozenTrial]:
        """Return the trials that no other beats in every objective; with one, the best."""
        return self.study.best_trials

    def best(self) -> optuna.trial.FrozenTrial:
        """Return the trial with the lowest validation neg_elbo, of the front if there is one.

        Raises:
            UserError: no trial finished.
        """
        if not self.trials("COMPLETE"):
            raise UserError(f"search {self.plan.name!r} has no finished trial: all diverged")
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


@dataclass(frozen=True)
class Judge:
    """Reports a batch's validation neg_elbo to Optuna, and ends what is not worth going on.

    Attributes:
        plan: the search.
        trials: the batch; its runs are rows of the stack, seed by seed.
        pruned: numbers of the trials that were pruned.
    """

    plan: SearchPlan
    trials: Sequence[optuna.Trial]
    pruned: set[int] = field(default_factory=set)

    def __call__(self, record: EpochRecord) -> dict[int, End]:
        """Return which rows of a record are to be ended, and why."""
        rows: dict[int, list[int]] = {}
        for row, origin in enumerate(record.rows):
            rows.setdefault(origin // self.plan.seeds, []).append(row)
        ends: dict[int, End] = {}
        for i, own in rows.items():
            values = [float(record.val["neg_elbo"][row]) for row in own]
            if not all(math.isfinite(value) for value in values):
                ends |= self._diverged(record.epoch, dict(zip(own, values, strict=True)))
            elif self._is_due(record, own):
                ends |= dict.fromkeys(own, end) if (end := self._verdict(i, values, record)) else {}
        return ends

    def _is_due(self, record: EpochRecord, rows: list[int]) -> bool:
        """Say whether a trial is compared now: not while a warm-up lowers its KL weight."""
        judged = record.epoch in self.plan.judged and self.plan.pruner != "none"
        return judged and bool((record.kl_warmup[rows] == 1).all())

    def _diverged(self, epoch: int, values: dict[int, float]) -> dict[int, End]:
        from studies.stack import End

        said = f"diverged in epoch {epoch}: validation neg_elbo is"
        other = End("KILLED", f"another seed of its configuration diverged in epoch {epoch}")
        return {
            row: other if math.isfinite(value) else End("FAILED", f"{said} {value}")
            for row, value in values.items()
        }

    def _verdict(self, i: int, values: list[float], record: EpochRecord) -> End | None:
        from studies.stack import End

        trial, mean = self.trials[i], _mean(values)
        trial.report(mean, record.epoch)
        if not trial.should_prune():
            return None
        self.pruned.add(trial.number)
        why = {
            "median": "worse than the median of finished trials",
            "hyperband": "not among the best third of its bracket",
        }[self.plan.pruner]
        said = f"pruned at epoch {record.epoch}: validation neg_elbo {mean:.2f} is {why}"
        return End("KILLED", said, pruned=True)


def open_hunt(plan: SearchPlan, storage: optuna.storages.BaseStorage) -> Hunt:
    """Open or create the Optuna study of a search.

    Raises:
        UserError: it exists with other settings.
    """
    study = optuna.create_study(
        storage=storage,
        study_name=plan.name,
        directions=["minimize"] * len(plan.objectives),
        pruner=_pruner(plan),
        load_if_exists=True,
    )
    agree(study, plan.settings)
    # Keyed by the trials so far: a search that goes on does not draw its first points again.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.get_trials(deepcopy=False)))
    return Hunt(plan, study)


def _pruner(plan: SearchPlan) -> optuna.pruners.BasePruner:
    if plan.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(plan.judged.start, plan.base.epochs)
    return optuna.pruners.MedianPruner() if plan.pruner == "median" else optuna.pruners.NopPruner()


def run(plan: SearchPlan, data: Dataset, options: SearchOptions, console: Console) -> Outcome:
    """Run what is left of a search, train the best configuration again, then answer.

    Raises:
        UserError: the tracking store or the storage cannot be used, or the search exists with
            other settings or is being run by another process.
    """
    from studies.stack import Place, keep, train_stack

    store, storage = open_both(options)
    if options.fresh:
        plan = replace(plan, name=unused_name(storage, plan.name))
    hunt = open_hunt(plan, storage)
    experiment = harness.tracking.open_experiment(store, plan.experiment, plan.search.question)
    bury_trials(hunt.study)
    failed = [t.number for t in hunt.trials("FAIL") if "diverged" not in t.user_attrs]
    dead = [trial_label(number) for number in failed]
    harness.ledger.bury_runs(store, plan.experiment, plan.name, dead)
    device = harness.engine.resolve_device(options.device).type
    left = hunt.left()
    if left < plan.trials:
        console.out.print(f"{plan.trials - left} trials are finished; {left} are left.")
    with console.bar(left * plan.seeds, plan.base.epochs) as on_epoch:
        kept = keep(store, plan.name, options.checkpoint_every)
        place = Place(None, data, device, store, experiment, on_epoch, kept)
        for trials in hunt.asked(plan.at_once(harness.engine.STACK_WIDTH[device])):
            judge = Judge(plan, trials)
            planned = [
                plan.planned(trial_label(trial.number), trial.number, config)
                for trial in trials
                for config in plan.configs(trial.params)
            ]
            hunt.tell(trials, train_stack(planned, place, judge), judge.pruned)
            place.forget([config for config, *_ in planned])
    confirm(hunt, replace(place, on_epoch=lambda record: None))
    place.close()
    from studies.search_summary import summarize  # seaborn, which training does not wait for

    return summarize(hunt, data, store, experiment)


def trial_label(number: int) -> str:
    """Name a trial's configuration in MLflow."""
    return f"trial {number}"


def confirm(hunt: Hunt, place: Place) -> None:
    """Train the best configuration and the baseline with fresh seeds, unless that is done."""
    from studies.stack import train_stack

    plan, best = hunt.plan, hunt.best()
    wanted = {
        f"best, trial {best.number}": (best.number, plan.base.replace(**best.params)),
        "default": (-1, plan.search.baseline(plan.base, plan.source)),
    }
    mine = f"tags.study = '{plan.name}' and status = 'FINISHED'"
    runs = harness.tracking.read_runs(place.store, plan.experiment, mine)
    done = [run["tags"].get("trial") for run in runs]
    missing = [label for label in wanted if done.count(label) < len(plan.fresh_seeds)]
    harness.ledger.bury_runs(place.store, plan.experiment, plan.name, missing)
    planned = [
        plan.planned(label, wanted[label][0], wanted[label][1].replace(seed=seed), "confirmation")
        for label in missing
        for seed in plan.fresh_seeds
    ]
    if planned:
        train_stack(planned, place)
        place.forget([config for config, *_ in planned])
