"""How every study runs: take trials, train and record their runs, and answer once all are there."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.config import UserError
from harness.tracking import addresses
from studies.runner import cli, workers
from studies.runner.database import first_unused, open_storage, studies_in
from studies.runner.options import Common
from studies.runner.queue import LostError, Queue, check_settings, open_queue
from studies.runner.study import Plan

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from harness.data.dataset import Dataset
    from harness.tracking import Store
    from harness.tracking.record import End, Planned
    from harness.training.checkpoint import Checkpoints
    from harness.training.engine import EpochRecord
    from studies.runner.proposers import Proposer
    from studies.runner.summary import Outcome
    from studies.runner.terminal import Terminal

log = logging.getLogger(__name__)

SERVER_PATIENCE = 600.0
"""Seconds for which a process that joins a study in PostgreSQL waits for the MLflow server."""


@dataclass(frozen=True)
class Site:
    """Where a plan's runs are trained and recorded.

    Attributes:
        plan: the plan.
        data: its dataset.
        device: "cpu" or "cuda".
        store: where the runs are tracked.
        experiment_id: their experiment.
        terminal: shows the progress.
        checkpoints: where unfinished runs are kept, if they are.
    """

    plan: Plan
    data: Dataset
    device: str
    store: Store
    experiment_id: str
    terminal: Terminal
    checkpoints: Checkpoints | None


def run(plan: Plan, data: Dataset, options: Common, terminal: Terminal) -> Outcome | None:
    """Run what is left of a plan, alone or with other processes, then answer its question.

    Returns:
        What was found; None if another process answers.

    Raises:
        UserError: a store cannot be used, or the study exists with other settings or is being run
            by another process.
    """
    from harness.training.checkpoint import Checkpoints
    from harness.training.engine import resolve_device

    log.info("opening MLflow and Optuna")
    store, storage = open_stores(options, plan.name)
    if options.fresh:
        taken = {run.tags.get("study", "") for run in store.runs(plan.experiment)}
        plan = replace(plan, name=first_unused(plan.name, taken | studies_in(storage)))
    _check_storage(storage, store, plan)
    queue = open_queue(storage, plan.name, plan.proposer, store.complete)
    experiment_id = store.experiment(plan.experiment, plan.question)
    kept = Checkpoints(store.home / "cache" / "checkpoints" / plan.name, options.checkpoint_every)
    device = resolve_device(options.device).type
    checkpoints = kept if options.checkpoint_every else None
    site = Site(plan, data, device, store, experiment_id, terminal, checkpoints)
    queue.clear()
    close_failed(queue, site)
    left = queue.left()
    terminal.begin(queue.progress())
    if options.workers > 1:
        workers.train(options, plan, queue.progress, terminal)
    else:
        work(queue, site)
    if workers.rank() is not None:
        return None
    _check_done(queue, plan)
    after = partial(open_queue, storage, f"{plan.name}/after", store_complete=store.complete)
    if plan.confirm is not None:
        confirming = after(plan.confirm(queue.trials("COMPLETE")))
        close_failed(confirming, site)
        work(confirming, site)
    outcome = conclude(queue, after, site, worked=left > 0 and options.workers == 1)
    kept.clear()
    return outcome


def work(queue: Queue, site: Site) -> None:
    """Take trials, train and record their runs, and finish them, until none is left.

    A trial is finished only when MLflow has its runs; while a server is away, the next ones are
    trained.
    """
    from harness.training.engine import STACK_WIDTH

    recorded: list[FrozenTrial] = []
    with queue.working():
        while True:
            recorded += queue.adopt()
            recorded = _finish(queue, site, recorded)
            trials = queue.take(site.plan.at_once(STACK_WIDTH[site.device]))
            close_failed(queue, site)
            if trials:
                train(queue, site, trials)
                recorded += trials
                keys = [key for trial in trials for key in trial.user_attrs["keys"]]
                site.store.deliver(keys, wait_while_answering=True)
            elif recorded:
                site.store.deliver()
            elif queue.left():
                queue.wait()
            else:
                return
            cli.check()


def train(queue: Queue, site: Site, trials: Sequence[FrozenTrial]) -> None:
    """Train and record the runs of trials, and note each trial's result in the database."""
    from harness.tracking.record import record
    from harness.training.engine import together

    proposer, plan = queue.proposer, site.plan
    of_trial = [proposer.planned(trial) for trial in trials]
    planned = [_tagged(run, plan.name) for runs in of_trial for run in runs]
    owner = [i for i, runs in enumerate(of_trial) for _ in runs]
    finals: dict[int, dict[str, float] | None] = {}
    for rows in together([run.config for run in planned], len(planned)):
        found = record(
            [planned[row] for row in rows],
            site.data,
            site.device,
            partial(_start, site),
            judge=partial(_judge, proposer, trials, [owner[row] for row in rows]),
            on_epoch=partial(_on_epoch, site),
            checkpoints=site.checkpoints,
            objective=plan.objective,
            extras=plan.extras,
        )
        finals |= dict(zip(rows, found, strict=True))
    for i, trial in enumerate(trials):
        queue.note(trial, [finals[row] for row, of in enumerate(owner) if of == i])
    if site.checkpoints is not None:
        site.checkpoints.remove([run.config for run in planned])
