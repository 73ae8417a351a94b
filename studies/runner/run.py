"""How every study runs: take trials, train and record their runs, answer once all are there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from harness import provenance
from harness.config import RunConfig
from harness.errors import UserError
from harness.tracking import Planned, addresses, connect
from harness.tracking import record as recording
from harness.tracking.runs import RunLog
from harness.tracking.store import Store
from harness.training.checkpoint import Checkpoints
from harness.training.engine import STACK_WIDTH, resolve_device, together
from studies.runner import stopping, workers
from studies.runner.database import check_kind, has_study, is_postgres, open_storage, study_names
from studies.runner.options import Places, first_unused
from studies.runner.proposers import Cell, Listed, Proposer, has_result, keys, part_of
from studies.runner.queue import REASSIGNED, LostError, Queue, check_settings, noted, open_queue
from studies.runner.terminal import way

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

    from harness.data.dataset import Dataset
    from harness.training.engine import EpochRecord
    from studies.runner.study import Plan
    from studies.runner.summary import Outcome
    from studies.runner.terminal import Steps, Terminal

log = logging.getLogger(__name__)

SERVER_PATIENCE = 600.0
"""Seconds for which a process that joins a study in PostgreSQL waits for the MLflow server."""

ENDED = "its process ended, or missed its heartbeats"
"""Reason of the runs of failed trials."""

SUPERSEDED = "superseded by a later summary"


@dataclass(frozen=True)
class Site:
    """Where a plan's runs are trained and recorded; `checkpoints` keep unfinished ones."""

    plan: Plan
    data: Dataset
    device: str
    store: Store
    experiment_id: str
    start: Callable[[Planned], RunLog]
    checkpoints: Checkpoints | None


def run(plan: Plan, data: Dataset, options: Places, terminal: Terminal) -> Outcome | None:
    """Run what is left of a plan, alone or with other processes, then answer its question.

    Returns:
        What was found; None if another process answers.
    """
    log.info("opening MLflow and Optuna")
    store, storage = open_stores(options, plan.name)
    if options.fresh:
        tracked = {run.tags.get("study", "") for run in store.runs(plan.experiment)}
        plan = replace(plan, name=first_unused(plan.name, {*study_names(storage), *tracked}))
    _check_storage(storage, store, plan)
    experiment_id = store.experiment(plan.experiment, plan.question)
    queue = open_queue(storage, plan.name, plan.proposer, store.complete)
    folder = store.home / "cache" / "checkpoints" / plan.name
    kept = Checkpoints(folder, options.checkpoint_every or 1)
    device = resolve_device(options.device).type
    checkpoints = kept if options.checkpoint_every else None
    start = recording.log_in(store, plan.experiment, plan.question)
    site = Site(plan, data, device, store, experiment_id, start, checkpoints)
    queue.reassign()
    close_failed(queue, site)
    _compare_making(site)
    done, left = _counts(queue)
    with terminal.progress(done + left, left) as steps:
        if options.workers > 1:
            logs = store.home / "cache"
            counts = partial(_counts, queue)
            workers.train(options, plan.page, plan.name, logs, counts, steps.elsewhere)
        else:
            work(queue, site, steps, leave=options.leave)
    if workers.rank() is not None or _is_left(queue):
        return None
    if plan.confirm is not None:
        confirming = _after(queue, plan.confirm(queue.study))
        confirming.reassign()
        close_failed(confirming, site)
        if fresh := confirming.left():
            log.info("training the best configuration and the default with fresh seeds")
            with terminal.progress(fresh, fresh) as steps:
                work(confirming, site, steps, leave=options.leave)
        if _is_left(confirming):
            return None
    outcome = conclude(queue, site, terminal, again=options.workers > 1 or left == 0)
    kept.clear()
    return outcome


def _is_left(queue: Queue) -> bool:
    """Return whether other processes train the last runs, which this one does not wait for."""
    if left := queue.left():
        log.info("other processes train the last %d runs", left * queue.proposer.runs)
    return left > 0


def _counts(queue: Queue) -> tuple[int, int]:
    runs = queue.proposer.runs
    return sum(map(has_result, queue.trials())) * runs, queue.left() * runs


def open_stores(options: Places, name: str) -> tuple[Store, RDBStorage]:
    """Open tracking store and storage, so that one that cannot be used leaves no other behind."""
    tracking, url = _addresses(options)
    if addresses.is_new(url) or addresses.is_server(tracking):  # opening a server writes nothing
        try:
            store = connect(tracking)
        except UserError as error:
            if not (is_postgres(url) and has_study(url, name)):
                raise
            log.warning("%s; this process waits up to 10 minutes for it", error)
            store = connect(tracking, patience=SERVER_PATIENCE)
        storage = open_storage(url)
    else:
        storage = open_storage(url)
        store = connect(tracking)
    store.check_home()
    return store, storage


def _addresses(options: Places) -> tuple[str, str]:
    tracking = addresses.tracking_address(options.tracking_uri)
    url = addresses.storage_address(options.storage)
    addresses.check_database(tracking, "--tracking-uri")
    addresses.check_database(url, "--storage")
    check_kind(url)
    if addresses.sqlite_file(tracking) == addresses.sqlite_file(url) is not None:
        raise UserError(f"--storage {url} is the tracking database too; give each its own file")
    return tracking, url


def check_study(plan: Plan, options: Places) -> None:
    """Raise UserError if the plan's study exists with other settings; nothing is written."""
    _, url = _addresses(options)
    if not options.fresh and not addresses.is_new(url) and has_study(url, plan.name):
        check_settings(open_storage(url), plan.name, plan.proposer.settings)


def _check_storage(storage: RDBStorage, store: Store, plan: Plan) -> None:
    """Refuse a study of which MLflow has runs and the storage none: they would be trained again."""
    if plan.name in study_names(storage):
        return
    runs = store.runs(plan.experiment, study=plan.name)
    # Read again: who writes runs created the study before, maybe just now.
    if runs and plan.name not in study_names(storage):
        raise UserError(
            f"{addresses.without_password(store.uri)} has {len(runs)} runs of study "
            f"{plan.name!r}, which --storage {addresses.without_password(storage.url)} does not "
            "have; give the storage that it was run with, start another with --study-name, or "
            "delete those runs"
        )


def _compare_making(site: Site) -> None:
    """Warn if finished runs were made with other code, versions or kind of device than here."""
    tags = provenance.tags(provenance.provenance(site.data, site.device))
    here = {"tags": tags, "params": {"device": site.device}}
    finished = site.store.runs(site.plan.experiment, study=site.plan.name, role="run")
    for part, (kind, name) in recording.MADE_WITH.items():
        others = {getattr(run, kind).get(name) for run in finished if run.status == "FINISHED"}
        if different := others - {here[kind].get(name), None}:
            log.warning(
                "Finished runs of this study were made with other %s (%s; here %s); they will be "
                "compared with the runs of this process.",
                part, ", ".join(sorted(different)), here[kind].get(name),
            )  # fmt: skip


def close_failed(queue: Queue, site: Site) -> None:
    """Close the runs of failed trials, finished ones too: a kill falls between run and trial."""
    site.store.close(site.plan.experiment, queue.failed_keys(), ENDED)


@dataclass(frozen=True)
class Recorded:
    """A trial whose runs are recorded; its value is None if it diverged or was pruned."""

    trial: FrozenTrial
    value: tuple[list[float], dict[str, Any]] | None
    configs: Sequence[RunConfig] = ()


def work(queue: Queue, site: Site, steps: Steps, *, leave: bool = False) -> None:
    """Take trials, train and record their runs and finish them, until none is left.

    A trial is finished once MLflow has its runs; while a server is away, others are trained. With
    `leave` this returns, too, where other processes have all that is left.
    """
    left, told, failed = queue.left(), 0, len(queue.failed_keys())
    recorded: list[Recorded] = []
    ranked = workers.rank()
    with queue.working():
        while True:
            recorded += [Recorded(trial, noted(trial)) for trial in queue.adopt()]
            told += _finish(queue, site, recorded)
            count = queue.proposer.at_once(STACK_WIDTH[site.device])
            trials = queue.take(count, ranked.workers if ranked else 1)
            if len(queue.failed_keys()) > failed:
                close_failed(queue, site)
                failed = len(queue.failed_keys())
            steps.elsewhere((left - queue.left() - told) * queue.proposer.runs)
            if trials:
                recorded += train(queue, site, trials, steps)
                names = [key for trial in trials for key in keys(trial)]
                site.store.deliver(names, wait_while_answering=True)
                told += _finish(queue, site, recorded)  # before a signal is looked at: they ended
            elif recorded:
                site.store.deliver([key for one in recorded for key in keys(one.trial)])
            elif queue.left() and not leave:
                queue.wait()
            else:
                return
            stopping.check()


def train(queue: Queue, site: Site, trials: Sequence[FrozenTrial], steps: Steps) -> list[Recorded]:
    """Train and record the runs of trials, and note the trials' results."""
    proposer, plan = queue.proposer, site.plan
    runs = [(trial, run) for trial in trials for run in proposer.planned(trial)]
    planned = [_tagged(run, plan.name) for _, run in runs]
    finals: dict[int, dict[str, float] | None] = {}

    def on_epoch(current: EpochRecord) -> None:
        steps(current)
        stopping.check()

    for rows in together([run.config for run in planned], len(planned)):
        found = recording.record(
            [planned[row] for row in rows],
            site.data,
            site.device,
            site.start,
            judge=partial(queue.judge, [runs[row][0] for row in rows]),
            on_epoch=on_epoch,
            checkpoints=site.checkpoints,
            objective=plan.objective,
            extras=plan.extras,
            study=plan.study,
        )
        finals |= {row: one.metrics or None for row, one in zip(rows, found, strict=True)}
    recorded = []
    for trial in trials:
        rows = [row for row, (of, _) in enumerate(runs) if of is trial]
        value = proposer.value([finals[row] for row in rows])
        recorded.append(Recorded(trial, value, [planned[row].config for row in rows]))
        if value is not None:
            with _if_held(site, trial):
                queue.result(trial, *value)
    return recorded


def _tagged(run: Planned, study: str) -> Planned:
    group = f"{study}/{run.tags['configuration']}"
    return run._replace(tags={**run.tags, "study": study, "role": "run", "seed_group": group})


def _finish(queue: Queue, site: Site, recorded: list[Recorded]) -> int:
    """Finish the recorded trials whose runs MLflow has; they leave the list."""
    waiting = site.store.undelivered()
    ready = [one for one in recorded if waiting.isdisjoint(keys(one.trial))]
    for one in ready:
        recorded.remove(one)
        with _if_held(site, one.trial):
            if one.value is not None:
                queue.done(one.trial, *one.value)
            elif one.trial.number in queue.pruned:
                queue.prune(one.trial)
            else:
                queue.diverged(one.trial, {})
        if site.checkpoints is not None:
            site.checkpoints.remove(one.configs)
    return len(ready)


@contextmanager
def _if_held(site: Site, trial: FrozenTrial) -> Iterator[None]:
    """Discard the result of a trial that was reassigned, and close its runs."""
    try:
        yield
    except LostError as error:
        log.warning("%s", error)
        site.store.close(site.plan.experiment, keys(trial), REASSIGNED)


def conclude(queue: Queue, site: Site, terminal: Terminal, *, again: bool) -> Outcome | None:
    """Write the summary, which is a trial; show where it is if another process wrote it.

    With `again` a summary that is there is written to its folder once more.
    """
    from studies.runner import summary  # seaborn, which training does not wait for

    plan, store = site.plan, site.store
    trials = queue.trials()
    confirmed = _after(queue, Listed([], {})).trials()
    confirmed = [trial for trial in confirmed if part_of(trial) == "confirmation"]
    ended = [[trial.number for trial in part if has_result(trial)] for part in (trials, confirmed)]
    of = hashlib.sha256(json.dumps([ended, plan.summary_key]).encode()).hexdigest()[:16]
    cell = Cell({"part": "summary", "of": of}, plan.configs[0], "summary", {}, {})
    listed = Listed([cell], {})
    summaries = _after(queue, listed)
    for one in (queue, summaries):
        one.reassign()
        close_failed(one, site)
    with summaries.working():
        while summaries.left():
            for trial in summaries.take(1):
                close_failed(summaries, site)  # of a process that died while this one waited
                older = [t for t in summaries.trials("COMPLETE") if part_of(t) == "summary"]
                store.close(plan.experiment, [key for t in older for key in keys(t)], SUPERSEDED)
                found = summary.ended(plan, site.data, store, queue.study, [*trials, *confirmed])
                (key,) = keys(trial)
                outcome, run_id = summary.summarize(found, site.experiment_id, key)
                attrs = {"run_id": run_id, "answer": outcome.answer}
                with _if_held(site, trial):
                    summaries.done(trial, [0.0], attrs)
                    return outcome
            summaries.wait()
    if again:
        found = summary.ended(plan, site.data, store, queue.study, [*trials, *confirmed])
        return summary.write(plan.find(found), found, site.experiment_id)
    written = [t for t in summaries.trials("COMPLETE") if listed.place(t) == 0][-1]
    run_id = written.user_attrs["run_id"]
    page = f"/#/experiments/{site.experiment_id}/runs/{run_id}"
    address = way(addresses.without_password(store.uri)) + page
    terminal.summary_elsewhere(run_id, address, written.user_attrs["answer"])
    return None


def _after(queue: Queue, proposer: Proposer) -> Queue:
    """Open the companion study, which holds the confirmation and the summary of a study."""
    name = f"{queue.study.study_name}/after"
    return open_queue(queue.storage, name, proposer, queue.store_complete)
