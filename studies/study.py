"""What a study is, and how it runs: ask -> stack -> train -> tell. The only import of optuna.

A trial is one value of the axis; its objective is the mean over seeds of validation `neg_elbo`,
the one number whose meaning no KL weight, latent size or normalisation changes.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import lazy_loader

import harness
from harness.config import RunConfig, UserError
from harness.places import creation_lock, project_root

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    from matplotlib.figure import Figure

    from harness.data import Dataset
    from studies.console import Console
    from studies.options import Options, Plan
    from studies.summary import Outcome
else:
    optuna = lazy_loader.load("optuna")

OBJECTIVE = "val/neg_elbo"


@dataclass(frozen=True)
class Axis:
    """The setting that a study sweeps: a field of `RunConfig` and its values."""

    field: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Study:
    """A question, and all that is needed to answer it.

    Attributes:
        name: as in `python -m studies.NAME`.
        question: the page's docstring.
        base: settings shared by all runs.
        axis: the setting that is swept.
        figures: frame and axis field in, figure out; the first word of an answer.
        answer: frame and axis field in, sentences out.
    """

    name: str
    question: str
    base: RunConfig
    axis: Axis
    figures: tuple[Callable[[pd.DataFrame, str], Figure], ...]
    answer: Callable[[pd.DataFrame, str], str]


@dataclass(frozen=True)
class Grid:
    """The Optuna study behind a plan: which values are finished, and which are to be done."""

    plan: Plan
    study: optuna.Study = field(repr=False)

    def trials(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        """Return the trials in the named states (COMPLETE, RUNNING, WAITING, FAIL)."""
        wanted = tuple(optuna.trial.TrialState[state] for state in states)
        return self.study.get_trials(deepcopy=False, states=wanted)

    def value(self, trial: optuna.trial.FrozenTrial) -> Any:  # noqa: ANN401 - whatever is swept
        """Return the axis value of a trial, also while it waits."""
        fixed = trial.system_attrs.get("fixed_params", {})
        return {**fixed, **trial.params}[self.plan.study.axis.field]

    def finished(self) -> list[Any]:
        """Return the values that have a result."""
        return [self.value(trial) for trial in self.trials("COMPLETE")]

    def left(self) -> list[Any]:
        """Return the values that have no result and are not known to diverge."""
        failed = [self.value(t) for t in self.trials("FAIL") if "diverged" in t.user_attrs]
        return [v for v in self.plan.configs if v not in self.finished() + failed]

    def asked(self, at_once: int) -> Iterator[list[optuna.Trial]]:
        """Ask for the values that are left, as many trials together as a stack takes."""
        axis, left = self.plan.study.axis.field, self.left()
        waiting = [self.value(t) for t in self.trials("WAITING")]
        for value in left:
            if value not in waiting:
                self.study.enqueue_trial({axis: value})
        choice = optuna.distributions.CategoricalDistribution(list(self.plan.configs))
        for start in range(0, len(left), at_once):
            trials = [self.study.ask({axis: choice}) for _ in left[start : start + at_once]]
            for trial in trials:
                trial.set_user_attr("process", f"{socket.gethostname()}:{os.getpid()}")
            yield trials

    def tell(self, trial: optuna.Trial, objectives: Sequence[float | None]) -> None:
        """Tell the mean over seeds; a value of which a seed diverged has failed for good."""
        finite = [value for value in objectives if value is not None]
        if len(finite) < len(objectives):
            trial.set_user_attr("diverged", f"{len(objectives) - len(finite)} seeds")
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(trial, sum(finite) / len(finite))

    def bury(self) -> list[int]:
        """Tell the trials of dead processes as failed, so that their values are repeated.

        Returns:
            Their numbers.

        Raises:
            UserError: another process is running this study.
        """
        abandoned = self.trials("RUNNING")
        for trial in abandoned:
            host, _, process = trial.user_attrs.get("process", ":").rpartition(":")
            if host == socket.gethostname() and _alive(int(process)):
                raise UserError(
                    f"study {self.plan.name!r} is being run by process {process} on this machine; "
                    "wait for it, stop it, or start another with --study-name"
                )
        for trial in abandoned:
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return [trial.number for trial in abandoned]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def open_storage(url: str | None) -> optuna.storages.RDBStorage:
    """Open Optuna's database, creating its tables if need be.

    Args:
        url: SQLAlchemy URL; None means `optuna.db` in the repository.

    Raises:
        UserError: the storage cannot be used.
    """
    url = url or f"sqlite:///{project_root() / 'optuna.db'}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with creation_lock(url):
            return optuna.storages.RDBStorage(url)
    except Exception as error:  # any driver's error
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"storage {url} cannot be used ({reason}); give a writable place with --storage, "
            "for instance sqlite:///optuna.db"
        ) from error


def unused_name(storage: optuna.storages.RDBStorage, name: str) -> str:
    """Return the name, or the first of NAME-2, NAME-3, ... that no study has."""
    taken = set(optuna.get_all_study_names(storage))
    numbered = (f"{name}-{i}" for i in itertools.count(2))
    return name if name not in taken else next(n for n in numbered if n not in taken)


def open_grid(plan: Plan, storage: optuna.storages.RDBStorage) -> Grid:
    """Open or create the Optuna study of a plan.

    Raises:
        UserError: the study exists with other settings.
    """
    study = optuna.create_study(
        storage=storage, study_name=plan.name, direction="minimize", load_if_exists=True
    )
    there, here = study.user_attrs.get("settings"), plan.settings
    if there is None:
        study.set_user_attr("settings", here)
    elif there != here:
        changed = sorted(k for k in there | here if there.get(k) != here.get(k))
        listed = "; ".join(f"{k}: {there.get(k)} there, {here.get(k)} here" for k in changed)
        raise UserError(
            f"study {plan.name!r} exists with other settings ({listed}); repeat its settings to "
            "continue it, or start another with --fresh or --study-name"
        )
    return Grid(plan, study)


def run(plan: Plan, data: Dataset, options: Options[Any], console: Console) -> Outcome:
    """Run what is left of a plan, then answer its question.

    Raises:
        UserError: the tracking store or the storage cannot be used, or the study exists with
            other settings or is being run by another process.
    """
    from studies.stack import Place, train_tracked
    from studies.summary import summarize

    store = harness.tracking.connect(options.tracking_uri)
    storage = open_storage(options.storage)
    if options.fresh:
        plan = replace(plan, name=unused_name(storage, plan.name))
    grid = open_grid(plan, storage)
    experiment = harness.tracking.open_experiment(store, plan.experiment, plan.study.question)
    harness.ledger.bury_runs(store, plan.experiment, plan.name, grid.bury())
    device = harness.engine.resolve_device(options.device).type
    width = max(1, harness.engine.STACK_WIDTH[device] // options.seeds)
    with console.progress(plan, len(grid.left())) as on_epoch:
        place = Place(data, device, store, experiment, on_epoch)
        for trials in grid.asked(width):
            values = [t.params[plan.study.axis.field] for t in trials]
            configs = [config for value in values for config in plan.configs[value]]
            numbers = [t.number for t in trials for _ in range(options.seeds)]
            finals = train_tracked(
                configs, [plan.tags(c, n) for c, n in zip(configs, numbers, strict=True)], place
            )
            objectives = [None if final is None else final[OBJECTIVE] for final in finals]
            for i, trial in enumerate(trials):
                grid.tell(trial, objectives[i * options.seeds : (i + 1) * options.seeds])
    return summarize(plan, data, store, experiment, grid.finished())
