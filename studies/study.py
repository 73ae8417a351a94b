"""What a study is, and how it runs: ask -> stack -> train -> tell. The only import of optuna.

A trial is one point: a value of the axis, in one of the study's groups. Its objective is the mean
over seeds of validation `neg_elbo`, the one number whose meaning no KL weight, latent size or
normalisation changes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import lazy_loader

import harness
from harness import places
from harness.config import RunConfig, UserError
from studies.options import Point, first_unused

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    from matplotlib.figure import Figure

    from harness.data import Dataset
    from harness.tracking import Store
    from harness.vae import SingleVAE
    from studies.console import Console
    from studies.options import Common, Options, Plan
    from studies.summary import Outcome
else:
    optuna = lazy_loader.load("optuna")

Apply = Callable[[RunConfig, Any, str], RunConfig]
"""(config, value, dataset) -> config with the value set."""


TABLE = (
    *("val/neg_elbo", "best/val/neg_elbo", "best/epoch"),
    *("neg_elbo", "mse", "rate", "calibration_ratio", "active_units"),
)
"""Columns of a summary table: last and best validation neg_elbo, then test metrics."""


def set_field(name: str) -> Apply:
    """Return the way in which a field of `RunConfig` is swept: it is set to the value."""
    return lambda config, value, dataset: config.replace(**{name: value})


class Axis:
    """The quantity that a study sweeps.

    Args:
        name: column of the frames and axis of the figures.
        values: what is tried.
        apply: (config, value, dataset) -> config; by default `name` is a field that is set.
    """

    def __init__(self, name: str, values: tuple[Any, ...], apply: Apply | None = None) -> None:
        self.name, self.values = name, values
        self.apply = apply or set_field(name)


def no_groups(dataset: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the one group of a study that has none, for any dataset."""
    return {"": {}}


@dataclass(frozen=True)
class Study:
    """A question, and all that is needed to answer it.

    Attributes:
        name: of its experiments, and of its page if it is one: `python -m studies.NAME`.
        question: the page's docstring.
        base: settings shared by all runs.
        axis: the quantity that is swept.
        figures: file name -> (frame -> figure, caption).
        answer: frame of runs in, sentences out.
        group: column that tells the groups apart, "" without groups.
        groups: dataset -> {group: changes to base}; the axis is swept in every group.
        seeds: repetitions where the user names no number.
        objective: metric whose mean over seeds is told to Optuna.
        extras: further metrics of a finished run, e.g. a linear probe.
        table: columns of the summary table.
        reference: axis value that all others are compared with; None means the best one.
    """

    name: str
    question: str
    base: RunConfig
    axis: Axis
    figures: Mapping[str, tuple[Callable[[pd.DataFrame], Figure], str]]
    answer: Callable[[pd.DataFrame], str]
    group: str = ""
    groups: Callable[[str], Mapping[str, Mapping[str, Any]]] = no_groups
    seeds: int = 3
    objective: str = "val/neg_elbo"
    extras: Callable[[SingleVAE, Dataset], dict[str, float]] | None = None
    table: tuple[str, ...] = TABLE
    reference: Any = None


@dataclass(frozen=True)
class Grid:
    """The Optuna study behind a plan: which points are finished, and which are to be done."""

    plan: Plan
    study: optuna.Study = field(repr=False)

    def trials(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        """Return the trials in the named states (COMPLETE, RUNNING, WAITING, FAIL)."""
        wanted = tuple(optuna.trial.TrialState[state] for state in states)
        return self.study.get_trials(deepcopy=False, states=wanted)

    def point(self, trial: optuna.trial.FrozenTrial | optuna.Trial) -> Point:
        """Return the point of a trial, also while it waits."""
        given = trial.params
        if isinstance(trial, optuna.trial.FrozenTrial):
            given = {**trial.system_attrs.get("fixed_params", {}), **given}
        return Point(given.get(self.plan.study.group, ""), given[self.plan.study.axis.name])

    def finished(self) -> list[Point]:
        """Return the points that have a result."""
        return [self.point(trial) for trial in self.trials("COMPLETE")]

    def left(self) -> list[Point]:
        """Return the points that have no result and are not known to diverge."""
        failed = [self.point(t) for t in self.trials("FAIL") if "diverged" in t.user_attrs]
        return [p for p in self.plan.configs if p not in self.finished() + failed]

    def asked(self, at_once: int) -> Iterator[list[optuna.Trial]]:
        """Ask for the points that are left, as many trials together as a stack takes."""
        left = self.left()
        waiting = [self.point(t) for t in self.trials("WAITING")]
        for point in left:
            if point not in waiting:
                self.study.enqueue_trial(self.plan.coordinates(point))
        every = [self.plan.coordinates(point) for point in self.plan.configs]
        choices: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.CategoricalDistribution(
                list(dict.fromkeys(coordinates[name] for coordinates in every))
            )
            for name in every[0]
        }
        for start in range(0, len(left), at_once):
            trials = [self.study.ask(choices) for _ in left[start : start + at_once]]
            claim(trials)
            yield trials

    def tell(self, trial: optuna.Trial, objectives: Sequence[float | None]) -> None:
        """Tell the mean over seeds; a point of which a seed diverged has failed for good."""
        finite = [value for value in objectives if value is not None]
        if len(finite) < len(objectives):
            trial.set_user_attr("diverged", f"{len(objectives) - len(finite)} seeds")
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(trial, sum(finite) / len(finite))

    def bury(self) -> list[int]:
        """Tell the trials of dead processes as failed: `bury_trials`."""
        return bury_trials(self.study)


def claim(trials: Sequence[optuna.Trial]) -> None:
    """Write down that this process runs some trials."""
    for trial in trials:
        trial.set_user_attr("process", f"{socket.gethostname()}:{os.getpid()}")


def bury_trials(study: optuna.Study) -> list[int]:
    """Tell the trials of dead processes as failed, so that they are repeated.

    Returns:
        Their numbers.

    Raises:
        UserError: another process is running this study.
    """
    abandoned = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    for trial in abandoned:
        host, _, process = trial.user_attrs.get("process", ":").rpartition(":")
        if host == socket.gethostname() and places.alive(int(process)):
            raise UserError(
                f"study {study.study_name!r} is being run by process {process} on this machine; "
                "wait for it, stop it, or start another with --study-name"
            )
    for trial in abandoned:
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return [trial.number for trial in abandoned]


def open_storage(url: str | None) -> optuna.storages.RDBStorage:
    """Open Optuna's database, creating its tables if need be.

    Args:
        url: SQLAlchemy URL; None means `optuna.db` in the repository.

    Raises:
        UserError: the storage cannot be used.
    """
    url = places.storage_address(url)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    places.check_database(url, "--storage")
    try:
        with places.creation_lock(url):
            return optuna.storages.RDBStorage(url)
    except Exception as error:  # any driver's error
        raise places.unusable(url, "--storage", error) from error


def open_both(options: Common) -> tuple[Store, optuna.storages.RDBStorage]:
    """Open tracking store and storage, so that one that cannot be used leaves no other behind.

    Raises:
        UserError: one of them cannot be used, or they are the same file.
    """
    tracking = places.tracking_address(options.tracking_uri)
    storage = places.storage_address(options.storage)
    places.check_database(tracking, "--tracking-uri")
    places.check_database(storage, "--storage")
    if places.sqlite_file(tracking) == places.sqlite_file(storage) is not None:
        raise UserError(f"--storage {storage} is the tracking database too; give each its own file")
    if places.is_new(storage):
        return harness.tracking.connect(tracking), open_storage(storage)
    found = open_storage(storage)
    return harness.tracking.connect(tracking), found


def unused_name(storage: optuna.storages.RDBStorage, name: str) -> str:
    """Return the name, or the first of NAME-2, NAME-3, ... that no study has."""
    return first_unused(name, optuna.get_all_study_names(storage))


def open_grid(plan: Plan, storage: optuna.storages.RDBStorage) -> Grid:
    """Open or create the Optuna study of a plan.

    Raises:
        UserError: the study exists with other settings.
    """
    study = optuna.create_study(
        storage=storage, study_name=plan.name, direction="minimize", load_if_exists=True
    )
    agree(study, plan.settings)
    return Grid(plan, study)


def agree(study: optuna.Study, here: dict[str, Any]) -> None:
    """Write down the settings of a new study, or check that they are those of an old one.

    Raises:
        UserError: the study exists with other settings.
    """
    there = study.user_attrs.get("settings")
    if there is None:
        study.set_user_attr("settings", here)
    elif there != here:
        changed = sorted(k for k in there | here if there.get(k) != here.get(k))
        listed = "; ".join(f"{k}: {there.get(k)} there, {here.get(k)} here" for k in changed)
        raise UserError(
            f"study {study.study_name!r} exists with other settings ({listed}); repeat its "
            "settings to continue it, or start another with --fresh or --study-name"
        )


def run(plan: Plan, data: Dataset, options: Options[Any], console: Console) -> Outcome:
    """Run what is left of a plan, then answer its question.

    Raises:
        UserError: the tracking store or the storage cannot be used, or the study exists with
            other settings or is being run by another process.
    """
    from studies.stack import Place, train_tracked

    store, storage = open_both(options)
    if options.fresh:
        plan = replace(plan, name=unused_name(storage, plan.name))
    grid = open_grid(plan, storage)
    experiment = harness.tracking.open_experiment(store, plan.experiment, plan.study.question)
    harness.ledger.bury_runs(store, plan.experiment, plan.name, grid.bury())
    device = harness.engine.resolve_device(options.device).type
    at_once = max(1, harness.engine.STACK_WIDTH[device] // plan.seeds)
    with console.progress(plan, len(grid.left())) as on_epoch:
        place = Place(plan, data, device, store, experiment, on_epoch)
        for trials in grid.asked(at_once):
            points = [grid.point(trial) for trial in trials]
            finals = train_tracked(points, [t.number for t in trials], place)
            for trial, results in zip(trials, finals, strict=True):
                grid.tell(trial, [None if r is None else r[plan.study.objective] for r in results])
    from studies.summary import summarize  # seaborn, which training does not wait for

    return summarize(plan, data, store, experiment, grid.finished())
