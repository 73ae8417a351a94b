"""How a study runs: ask -> stack -> train -> tell.

A trial is one point: a value of the axis, in one of the study's groups. Its objective is the mean
over seeds of validation `neg_elbo`, the one number whose meaning no KL weight, latent size or
normalisation changes.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import harness
from studies.books import Books
from studies.grid import Grid, open_grid
from studies.question import TABLE as TABLE
from studies.question import Axis as Axis
from studies.question import Study as Study
from studies.runner import stopping, workers
from studies.storage import check_storage, new_name, open_both

if TYPE_CHECKING:
    from harness.data.dataset import Dataset
    from studies.place import Place
    from studies.plan import Plan
    from studies.runner.options import Options
    from studies.runner.terminal import Steps, Terminal
    from studies.summary import Outcome

log = logging.getLogger(__name__)


def run(plan: Plan, data: Dataset, options: Options[Any], console: Terminal) -> Outcome | None:
    """Run what is left of a plan, alone or with others, then answer its question.

    Returns:
        What was found; None if another process says it.

    Raises:
        UserError: the tracking store or the storage cannot be used, or the study exists with
            other settings or is being run by another process.
    """
    from harness.training.engine import resolve_device
    from studies.place import Place
    from studies.stack import forget_all, keep

    log.info("opening MLflow and Optuna")
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
    with console.progress(len(plan.runs), left * plan.seeds, plan.runs[0].epochs) as progress:
        if options.workers > 1:
            workers.train(
                options,
                plan.study.name,
                plan.name,
                store.home / "cache",
                lambda: (len(grid.finished()) * plan.seeds, len(grid.left()) * plan.seeds),
                progress.elsewhere,
            )
        else:
            device = resolve_device(options.device).type
            watching = grid.desk.watching(progress)
            place = Place(plan, data, device, store, experiment, watching, kept)
            work(grid, books, place, progress)
    if workers.rank():
        return None

    def finish() -> Outcome:
        from studies.summary import summarize  # seaborn, which training does not wait for

        return summarize(plan, data, store, experiment, grid.finished())

    ended = books.conclude(finish, worked=left > 0 and options.workers == 1)
    forget_all(store, plan.name)
    if isinstance(ended, str):
        console.line(ended)
        return None
    return ended


def work(grid: Grid, books: Books, place: Place, progress: Steps) -> None:
    """Take points, train and tell them until none is left."""
    from harness.training.engine import STACK_WIDTH
    from studies.stack import train_tracked

    plan, told, left = grid.plan, 0, len(grid.left())
    at_once = max(1, STACK_WIDTH[place.device] // plan.seeds)
    for trials in grid.asked(at_once):
        books.settle()
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
