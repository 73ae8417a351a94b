"""What a study is, and how it runs: ask -> stack -> train -> tell.

A trial is one point: a value of the axis, in one of the study's groups. Its objective is the mean
over seeds of validation `neg_elbo`, the one number whose meaning no KL weight, latent size or
normalisation changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import harness
from harness.config import RunConfig, UserError, checked_name
from studies import stopping, worker, workers
from studies.books import Books
from studies.grid import Grid, open_grid
from studies.sources import Source
from studies.storage import check_storage, new_name, open_both

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from harness.dataset import Dataset
    from harness.vae import SingleVAE
    from studies.console import Console
    from studies.options import Options, Plan
    from studies.progress import Steps
    from studies.stack import Place
    from studies.summary import Outcome

Apply = Callable[[RunConfig, Any, Source], RunConfig]
"""(config, value, source of the data) -> config with the value set."""

Groups = Callable[[RunConfig, Source], Mapping[str, Mapping[str, Any]]]
"""(base, source of the data) -> {group: changes to base}."""


TABLE = (
    *("val/neg_elbo", "best/val/neg_elbo", "best/epoch"),
    *("neg_elbo", "mse", "rate", "calibration_ratio", "active_units"),
)
"""Columns of a summary table: last and best validation neg_elbo, then test metrics."""


def set_field(name: str) -> Apply:
    """Return the way in which a field of `RunConfig` is swept: it is set to the value."""
    return lambda config, value, data: config.replace(**{name: value})


class Axis:
    """The quantity that a study sweeps.

    Args:
        name: column of the frames and axis of the figures.
        values: what is tried.
        apply: (config, value, source) -> config; by default `name` is a field that is set.

    Raises:
        UserError: there is no value, or one that Optuna does not give back as it was.
    """

    def __init__(self, name: str, values: tuple[Any, ...], apply: Apply | None = None) -> None:
        plain = all(isinstance(value, str | int | float) for value in values)
        if not values or not plain:
            raise UserError(
                f"axis {name!r} has the values {list(values)}: give at least one, each a number or "
                "a word"
            )
        self.name, self.values = name, tuple(values)
        self.apply = apply or set_field(name)


def no_groups(base: RunConfig, data: Source) -> Mapping[str, Mapping[str, Any]]:
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
        groups: (base, source of the data) -> {group: changes to base}; the axis is swept in every
            group.
        seeds: repetitions where the user names no number.
        objective: metric whose mean over seeds is told to Optuna.
        extras: further metrics of a finished run, e.g. a linear probe.
        table: columns of the summary table.
        reference: axis value that all others are compared with; None means the best one.

    Raises:
        UserError: its name cannot be one, or it asks nothing.
    """

    name: str
    question: str
    base: RunConfig
    axis: Axis
    figures: Mapping[str, tuple[Callable[[pd.DataFrame], Figure], str]]
    answer: Callable[[pd.DataFrame], str]
    group: str = ""
    groups: Groups = no_groups
    seeds: int = 3
    objective: str = "val/neg_elbo"
    extras: Callable[[SingleVAE, Dataset], dict[str, float]] | None = None
    table: tuple[str, ...] = TABLE
    reference: Any = None

    def __post_init__(self) -> None:
        checked_name(self.name)
        if not (self.question or "").strip():
            raise UserError(f"study {self.name!r} asks nothing; give its question, or a docstring")


def run(plan: Plan, data: Dataset, options: Options[Any], console: Console) -> Outcome | None:
    """Run what is left of a plan, alone or with others, then answer its question.

    Returns:
        What was found; None if another process says it.

    Raises:
        UserError: the tracking store or the storage cannot be used, or the study exists with
            other settings or is being run by another process.
    """
    from studies.stack import Place, forget_all, keep

    harness.doing.say("opening MLflow and Optuna")
    store, storage = open_both(options)
    if options.fresh:
        plan = replace(plan, name=new_name(storage, store, plan.experiment, plan.name))
    check_storage(storage, store, plan.experiment, plan.name)
    grid = open_grid(plan, storage)
    experiment = harness.tracking.open_experiment(store, plan.experiment, plan.study.question)
    books = Books(grid.desk, store, plan.experiment)
    grid.bury()
    books.settle()
    left = len(grid.left())
    kept = keep(store, plan.name, options.checkpoint_every)
    refused = False
    with console.progress(plan, left) as progress:
        if options.workers > 1:
            refused = workers.train(options, plan.study.name, plan.name, progress.advance)
        else:
            device = harness.engine.resolve_device(options.device).type
            watching = grid.desk.watching(progress)
            place = Place(plan, data, device, store, experiment, watching, kept)
            work(grid, books, place, progress)
    if worker.crowd():
        return None
    workers.check_done(len(grid.left()), plan.name, refused=refused)

    def finish() -> Outcome:
        from studies.summary import summarize  # seaborn, which training does not wait for

        return summarize(plan, data, store, experiment, grid.finished())

    ended = books.conclude(finish, worked=left > 0 and options.workers == 1)
    forget_all(store, plan.name)
    return console.conclusion(ended)


def work(grid: Grid, books: Books, place: Place, progress: Steps) -> None:
    """Take points, train and tell them until none is left."""
    from studies.stack import train_tracked

    plan, told, left = grid.plan, 0, len(grid.left())
    at_once = max(1, harness.engine.STACK_WIDTH[place.device] // plan.seeds)
    for trials in grid.asked(at_once):
        books.settle()
        if not worker.crowd():  # else each worker would tell its parent of the others
            progress.elsewhere((left - len(grid.left()) - told) * plan.seeds)
        with grid.desk.working():
            points = [grid.point(trial) for trial in trials]
            finals = train_tracked(points, [t.number for t in trials], place)
            for trial, results in zip(trials, finals, strict=True):
                grid.tell(trial, [None if r is None else r[plan.study.objective] for r in results])
                told += 1
            place.forget([config for point in points for config in plan.configs[point]])
        books.settle()
        stopping.check()
    place.store.writer.settle()  # whoever writes the summary reads these runs
