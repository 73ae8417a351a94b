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
