"""How a search runs: Optuna proposes batches as wide as a stack, the stack prunes, Optuna learns.

A trial is a configuration; its runs, one a seed, are rows of the stack. What it is told is their
mean. A trial that is pruned, or of which a seed diverges, leaves the stack with all its rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import harness
from studies.books import Books
from studies.hunt import Hunt, open_hunt
from studies.runner import stopping, workers
from studies.search_options import SearchOptions, SearchPlan
from studies.storage import check_storage, new_name, open_both

if TYPE_CHECKING:
    import optuna

    from harness.data.dataset import Dataset
    from harness.training.engine import EpochRecord
    from studies.place import Place
    from studies.runner.terminal import Terminal
    from studies.stack import End
    from studies.summary import Outcome

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judge:
    """Reports a batch's validation neg_elbo to Optuna, and ends what is not worth going on.

    Attributes:
        hunt: the search.
        trials: the batch; its runs are rows of the stack, seed by seed.
        pruned: numbers of the trials that were pruned.
    """

    hunt: Hunt
    trials: Sequence[optuna.Trial]
    pruned: set[int] = field(default_factory=set)

    def __call__(self, record: EpochRecord) -> dict[int, End]:
        """Return which rows of a record are to be ended, and why."""
        rows: dict[int, list[int]] = {}
        for row, origin in enumerate(record.rows):
            rows.setdefault(origin // self.hunt.plan.seeds, []).append(row)
        ends: dict[int, End] = {}
        for i, own in rows.items():
            wild = {row: why for row in own if (why := _divergence(record, row))}
            if wild:
                ends |= _diverged(record.epoch, own, wild)
            elif self._is_due(record, own) and (end := self._verdict(i, own, record)):
                ends |= dict.fromkeys(own, end)
        return ends

    def _is_due(self, record: EpochRecord, rows: list[int]) -> bool:
        """Say whether a trial is compared now: not while a warm-up lowers its KL weight."""
        judged = record.epoch in self.hunt.plan.judged and self.hunt.plan.pruner != "none"
        return judged and bool((record.kl_warmup[rows] == 1).all())

    def _verdict(self, i: int, rows: list[int], record: EpochRecord) -> End | None:
        from studies.stack import End

        values = [float(record.val["neg_elbo"][row]) for row in rows]
        trial, mean = self.trials[i], sum(values) / len(values)
        if not self.hunt.is_worse(trial, mean, record.epoch):
            return None
        self.pruned.add(trial.number)
        why = {
            "median": "worse than the median of finished trials",
            "hyperband": "not among the best third of its bracket",
        }[self.hunt.plan.pruner]
        said = f"pruned at epoch {record.epoch}: validation neg_elbo {mean:.2f} is {why}"
        return End("KILLED", said, pruned=True)


def _divergence(record: EpochRecord, row: int) -> str | None:
    """Say why a run has diverged: also where only its neg_elbo, which is compared, is no number."""
    from studies.measures import divergence

    value = float(record.val["neg_elbo"][row])
    lost = None if math.isfinite(value) else f"validation neg_elbo is {value}"
    return divergence(record, row) or lost


def _diverged(epoch: int, rows: list[int], wild: dict[int, str]) -> dict[int, End]:
    """End a trial of which some rows have diverged: its other runs have nothing to be part of."""
    from studies.stack import End

    other = End("KILLED", f"another seed of its configuration diverged in epoch {epoch}")
    said = f"diverged in epoch {epoch}"
    return {row: End("FAILED", f"{said}: {wild[row]}") if row in wild else other for row in rows}


def run(
    plan: SearchPlan, data: Dataset, options: SearchOptions, console: Terminal
) -> Outcome | None:
    """Run what is left of a search, train the best configuration again, then answer.

    Returns:
        What was found; None if another process says it.

    Raises:
        UserError: the tracking store or the storage cannot be used, or the search exists with
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
    hunt = open_hunt(plan, storage)
    experiment = harness.tracking.open_experiment(store, plan.experiment, plan.search.question)
    books = Books(hunt.desk, store, plan.experiment, trial_label)
    hunt.desk.section(hunt.desk.bury)
    books.settle()
    device = resolve_device(options.device).type
    left = hunt.left()
    runs = plan.trials * plan.seeds
    with console.progress(runs, left * plan.seeds, plan.base.epochs) as progress:
        kept = keep(store, plan.name, options.checkpoint_every)
        watching = hunt.desk.watching(progress)
        place = Place(None, data, device, store, experiment, watching, kept)
        if options.workers > 1:
            workers.train(
                options,
                plan.search.name,
                plan.name,
                store.home / "cache",
                lambda: ((plan.trials - hunt.left()) * plan.seeds, hunt.left() * plan.seeds),
                progress.elsewhere,
            )
        else:
            work(hunt, books, place)
    if workers.rank():
        return None

    def finish() -> Outcome:
        from studies.search_summary import summarize  # seaborn, which training does not wait for

        confirm(hunt, place, console)
        return summarize(hunt, data, store, experiment)

    ended = books.conclude(finish, worked=left > 0 and options.workers == 1)
    forget_all(store, plan.name)
    if isinstance(ended, str):
        console.line(ended)
        return None
    return ended


def work(hunt: Hunt, books: Books, place: Place) -> None:
    """Ask for trials, train and tell them until none is left."""
    from harness.training.engine import STACK_WIDTH
    from studies.stack import train_stack

    plan = hunt.plan
    for trials in hunt.asked(plan.at_once(STACK_WIDTH[place.device])):
        books.settle()
        judge = Judge(hunt, trials)
        with hunt.desk.working():
            planned = [
                plan.planned(trial_label(trial.number), trial.number, config)
                for trial in trials
                for config in plan.configs(trial.params)
            ]
            hunt.tell(trials, train_stack(planned, place, judge), judge.pruned)
            place.forget([config for config, *_ in planned])
        books.settle()
        stopping.check()
    place.store.writer.settle()  # whoever writes the summary reads these runs


def trial_label(number: int) -> str:
    """Name a trial's configuration in MLflow."""
    return f"trial {number}"


def confirm(hunt: Hunt, place: Place, console: Terminal) -> None:
    """Train the best configuration and the baseline with fresh seeds, unless that is done."""
    from studies.stack import train_stack

    plan, best = hunt.plan, hunt.best()
    wanted = {
        f"best, trial {best.number}": (best.number, plan.base.replace(**best.params)),
        "default": (-1, plan.search.baseline(plan.base, plan.source)),
    }
    mine = f"tags.study = '{plan.name}'"
    runs = harness.tracking.read_runs(place.store, plan.experiment, mine)
    done = [run["tags"].get("trial") for run in runs if harness.ledger.has_ended(run)]
    missing = [label for label in wanted if done.count(label) < len(plan.fresh_seeds)]
    harness.ledger.bury_runs(place.store, plan.experiment, plan.name, missing)
    planned = [
        plan.planned(label, wanted[label][0], wanted[label][1].replace(seed=seed), "confirmation")
        for label in missing
        for seed in plan.fresh_seeds
    ]
    if planned:
        console.out.print(f"Again with fresh seeds: {', '.join(missing)}.")
        with console.progress(len(planned), len(planned), plan.base.epochs) as on_epoch:
            train_stack(planned, replace(place, on_epoch=on_epoch))
        place.forget([config for config, *_ in planned])
