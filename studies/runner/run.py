"""The runner of every study: take trials, train and record their runs, write the summary."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import optuna

from harness import processes, provenance
from harness.config import RunConfig
from harness.errors import UserError
from harness.tracking import Planned, addresses, connect, removal, schema
from harness.tracking import record as recording
from harness.tracking.runs import RunLog
from harness.tracking.store import Store
from harness.training.checkpoint import Checkpoints
from harness.training.engine import STACK_WIDTH, resolve_device, together
from studies.runner import stopping, workers
from studies.runner.database import checked_address, has_study, open_storage, read_storage
from studies.runner.options import Places
from studies.runner.proposers import Cell, Listed, Proposer, Value, has_result, keys, part_of
from studies.runner.queue import (
    AFTER,
    REASSIGNED,
    Queue,
    check_settings,
    noted,
    open_queue,
    read_queue,
)
from studies.runner.terminal import counted, size, stored

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

RESTORED = "deleted in MLflow, made again, and restored"

SUPERSEDED = "superseded by a later summary"


@dataclass(frozen=True)
class Site:
    """Where a plan's runs are trained and recorded; `checkpoints` keep unfinished ones."""

    plan: Plan
    data: Dataset
    device: str
    store: Store
    start: Callable[[Planned], RunLog]
    checkpoints: Checkpoints | None
    command: str = ""  # which continues the study: a tag of its runs
    threads_per_run: int = 1


def run(plan: Plan, data: Dataset, options: Places, terminal: Terminal) -> Outcome | None:
    """Run the rest of a plan, alone or with other processes, then write its summary.

    Returns:
        The outcome; None if another process writes the summary.
    """
    log.info("opening MLflow and Optuna")
    store, storage = open_stores(options, plan)
    if options.fresh:
        taken = {run.tags.get("study", "") for run in store.runs(plan.experiment)}
        taken |= {study.study_name for study in storage.get_all_studies()}
        names = (plan.name, *(f"{plan.name}-{i}" for i in range(2, len(taken) + 3)))
        plan = replace(plan, name=next(name for name in names if name not in taken))
    check_settings(storage, plan.name, plan.proposer.settings)
    start = recording.log_in(store, plan.experiment, plan.question)
    queue = open_queue(storage, plan.name, plan.proposer, store.complete)
    folder = store.home / "cache" / "checkpoints" / plan.name
    kept = Checkpoints(folder, options.checkpoint_every or 1)
    checkpoints = kept if options.checkpoint_every else None
    device = resolve_device(options.device).type
    command, threads = plan.vary(plan.name) or plan.command, options.threads_per_run
    site = Site(plan, data, device, store, start, checkpoints, command, threads)
    close_failed(queue, site)
    lose_deleted(queue, site)
    _compare_making(site)
    done, left = _counts(queue)
    steps = terminal.progress(done + left, left)
    at_once = min(left, queue.proposer.at_once(STACK_WIDTH[device]) * queue.proposer.seeds)
    if left and device == "cpu" and options.workers == 1 and not workers.started():
        terminal.cores(at_once, threads, processes.available())
    if options.workers > 1:
        cache, counts = store.home / "cache", partial(_counts, queue)
        workers.train(options, plan.start, plan.name, cache, counts, steps.elsewhere)
    else:
        work(queue, site, steps, leave=options.leave)
    if workers.started() or _is_left(queue):
        return None
    if plan.confirm is not None:
        confirming = _after(queue, plan.confirm(queue.study))
        close_failed(confirming, site)
        if fresh := confirming.left():
            log.info("training the best configuration and the default with fresh seeds")
            work(confirming, site, terminal.progress(fresh, fresh), leave=options.leave)
        if _is_left(confirming):
            return None
    outcome = conclude(queue, site, terminal, again=options.workers > 1 or left == 0)
    kept.clear()
    if outcome is None or store.spool is not None:
        return outcome
    runs = store.runs(plan.experiment, study=plan.name)
    places = [removal.folder(store, run.artifacts, run.run_id) for run in runs]
    written = f"{size(*places)} of artifacts of {counted(len(runs), 'run')}, "
    written += f"{size(outcome.folder)} of the report; the database of all studies has "
    return replace(outcome, written=written + size(addresses.sqlite_file(store.uri)))


def _is_left(queue: Queue) -> bool:
    """Return whether other processes train the last runs, which this one does not wait for."""
    if left := queue.left():
        log.info("other processes train the last %s", counted(left * queue.proposer.seeds, "run"))
    return left > 0


def _counts(queue: Queue) -> tuple[int, int]:
    # Runs that have a result, and runs that have none yet.
    seeds = queue.proposer.seeds
    return sum(map(has_result, queue.trials())) * seeds, queue.left() * seeds


def open_stores(options: Places, plan: Plan) -> tuple[Store, RDBStorage]:
    """Open tracking store and storage; if either cannot be used for a plan, create neither."""
    tracking, url = _addresses(options)
    late = addresses.is_new(url) or addresses.is_server(tracking)  # opening a server writes nothing
    storage = None if late else open_storage(url)
    if addresses.is_new(tracking):
        _check_results(plan, options, storage, None)
    try:
        store = connect(tracking)
    except UserError as error:
        shared = addresses.is_server(tracking) and addresses.sqlite_file(url) is None
        if not (shared and has_study(url, plan.name)):
            raise
        log.warning("%s; this process waits up to 10 minutes for it", error)
        store = connect(tracking, patience=SERVER_PATIENCE)
    store.check_home()
    storage = storage if storage or addresses.is_new(url) else open_storage(url)
    _check_results(plan, options, storage, store)
    return store, storage or open_storage(url)


def _addresses(options: Places) -> tuple[str, str]:
    tracking = addresses.tracking_address(options.tracking_uri)
    schema.check_database(tracking, "--tracking-uri")
    url = checked_address(options.storage)
    if addresses.sqlite_file(tracking) == addresses.sqlite_file(url) is not None:
        raise UserError(f"--storage {url} is the tracking database too; give each its own file")
    return tracking, url


def check_study(plan: Plan, options: Places) -> None:
    """Raise UserError if the plan's study exists with other settings; nothing is written."""
    _, url = _addresses(options)
    if not options.fresh and not addresses.is_new(url) and has_study(url, plan.name):
        check_settings(read_storage(url), plan.name, plan.proposer.settings)


def standing(plan: Plan, options: Places) -> tuple[int, int]:
    """Return how many runs are finished and missing, or raise UserError as a start would.

    Nothing is written, and a server gets no records that wait for it.
    """
    tracking, url = _addresses(options)
    storage = None if addresses.is_new(url) else read_storage(url)
    new = addresses.is_new(tracking)
    store = None if new else connect(tracking, write=False, deliver=False)
    if store is not None:
        store.check_home()
    _check_results(plan, options, storage, store)
    runs, seeds = len(plan.configs), plan.proposer.seeds
    if storage is None or options.fresh or not has_study(url, plan.name):
        return 0, runs
    missing = read_queue(storage, plan.name, plan.proposer).left() * seeds
    if missing:
        missing += runs - plan.proposer.left([]) * seeds  # of the confirmation
    return max(0, runs - missing), missing


def _check_results(
    plan: Plan, options: Places, storage: RDBStorage | None, store: Store | None
) -> None:
    """Refuse a study with results in one store and none in the other: it is another one."""

    def done() -> set[str] | None:
        if storage is None or not has_study(storage.url, plan.name):
            return None
        trials = optuna.load_study(study_name=plan.name, storage=storage).get_trials(deepcopy=False)
        return {*keys(*(trial for trial in trials if trial.state.name == "COMPLETE"))}

    tracking, url = _addresses(options)
    there, here = f"--tracking-uri {tracking}", f"--storage {addresses.without_secrets(url)}"
    ended = done()  # before their runs are read
    deleted = ended is not None
    found = store.runs(plan.experiment, deleted=deleted, study=plan.name) if store else []
    # Another process may have created the study before it wrote these runs.
    results = len(found) if done() is None else 0
    if ended is not None:
        results = 0 if ended & {run.key for run in found} else len(ended)
        there, here = here, there
    if results and not options.fresh:
        raise UserError(
            f"{there} has {counted(results, 'run')} of study {plan.name!r}, and {here} has none of "
            "them; give the address that it was run with, or start another with --fresh or "
            "--study-name"
        )


def _compare_making(site: Site) -> None:
    """Warn if finished runs were made with other code, versions or kind of device than here."""
    here = recording.tags_of(provenance.provenance(site.data, site.device))
    here["device"] = site.device
    runs = site.store.runs(site.plan.experiment, study=site.plan.name, role="run")
    for part, (kind, name) in recording.MADE_WITH.items():
        others = {getattr(run, kind).get(name) for run in runs if run.status == "FINISHED"}
        if different := ", ".join(sorted(others - {here[name], None})):
            log.warning(
                f"Finished runs of this study were made with other {part} ({different}; here "
                f"{here[name]}); they will be compared with the runs of this process."
            )


def close_failed(queue: Queue, site: Site) -> int:
    """Fail trials of ended processes and close the runs of all failed trials; return their number.

    Finished runs are closed too: a process can be killed between the end of its run and its trial.
    """
    queue.reassign()
    failed = queue.failed_keys()
    site.store.close(site.plan.experiment, queue.lost_keys(), RESTORED)
    site.store.close(site.plan.experiment, failed, ENDED)
    return len(failed)


def lose_deleted(queue: Queue, site: Site) -> bool:
    """Count ended trials as failed whose runs were deleted or changed in MLflow; return if any.

    Runs of pruned trials are not missed, nor is a summary that a later one has superseded.
    """
    proposer, lost = queue.proposer, []
    trials = [trial for trial in queue.trials() if has_result(trial)]  # before their runs are read
    runs = site.store.runs(site.plan.experiment, study=site.plan.name) if trials else []
    statuses = {run.key: run.status for run in runs}
    for trial in trials:
        summary, planned = part_of(trial) == "summary", proposer.place(trial) is not None
        other = {"KILLED", "FAILED"} if summary or trial.state.name == "FAIL" else set[str]()
        gone = [key for key in keys(trial) if statuses.get(key) not in {"FINISHED", *other}]
        if gone and trial.state.name != "PRUNED" and (planned or not summary):
            names = {run.key: run.name for run in proposer.planned(trial)} if planned else {}
            run = "summary" if summary else ", ".join(names.get(key, key) for key in gone)
            way = "another is made in its place" if planned else "the study answers without it"
            log.warning("Run %s was deleted or changed in MLflow; %s.", run, way)
            lost.append(trial)
    if lost:
        queue.lose(lost)
    return bool(lost)


class Recorded(NamedTuple):
    """A trial whose runs are recorded; its value is None if it diverged or was pruned."""

    trial: FrozenTrial
    value: Value | None
    configs: Sequence[RunConfig] = ()


def work(queue: Queue, site: Site, steps: Steps, *, leave: bool = False) -> None:
    """Take trials, train and record their runs and finish them, until none is left.

    A trial is finished once MLflow has its runs; while a server does not answer, other trials are
    trained. With `leave`, also return when all remaining trials belong to other processes.
    """
    left, finished, failed = queue.left(), 0, len(queue.failed_keys())
    recorded: list[Recorded] = []
    with queue.working(), _long_lived():
        while True:
            count = queue.proposer.at_once(STACK_WIDTH[site.device])
            trials = queue.take(count, workers.started() or 1)
            if len(queue.failed_keys()) > failed:
                failed = close_failed(queue, site)
            steps.elsewhere((left - queue.left() - finished) * queue.proposer.seeds)
            if adopted := [Recorded(t, value) for t in trials if (value := noted(t))]:
                recorded += adopted
            elif trials:
                recorded += train(queue, site, trials, steps)
                site.store.deliver(keys(*trials), wait_while_answering=True)
            elif recorded:
                site.store.deliver(keys(*(one.trial for one in recorded)))
            elif queue.left() and not leave:
                queue.wait()
            elif queue.left() or not lose_deleted(queue, site):
                return
            finished += _finish(queue, site, recorded)
            stopping.check()  # after the runs that have ended are finished


@contextmanager
def _long_lived() -> Iterator[None]:
    """Spare the garbage collector all objects there are: a fifth of the time of MLflow's writes."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def train(queue: Queue, site: Site, trials: Sequence[FrozenTrial], steps: Steps) -> list[Recorded]:
    """Train and record the runs of trials, and note the trials' values."""
    proposer, plan = queue.proposer, site.plan
    of = [trial for trial in trials for _ in range(proposer.seeds)]  # trial of each run
    planned = [_tagged(run, site) for trial in trials for run in proposer.planned(trial)]
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
            judge=partial(queue.judge, [of[row] for row in rows]),
            on_epoch=on_epoch,
            checkpoints=site.checkpoints,
            objective=plan.objective,
            threads_per_run=site.threads_per_run,
        )
        finals |= {row: one.metrics or None for row, one in zip(rows, found, strict=True)}
    recorded = []
    for trial in trials:
        rows = [row for row, one in enumerate(of) if one is trial]
        value = proposer.value([finals[row] for row in rows])
        recorded.append(Recorded(trial, value, [planned[row].config for row in rows]))
        if value is not None:
            queue.note(trial, value)
    return recorded


def _tagged(run: Planned, site: Site) -> Planned:
    tags = {"study": site.plan.name, "role": "run", "command": site.command}
    tags["seed_group"] = f"{site.plan.name}/{run.tags['configuration']}"
    return run._replace(tags=run.tags | tags)


def _finish(queue: Queue, site: Site, recorded: list[Recorded]) -> int:
    """Finish recorded trials whose runs are all in MLflow, and remove them from the list."""
    waiting = site.store.undelivered()
    ready = [one for one in recorded if waiting.isdisjoint(keys(one.trial))]
    for one in ready:
        recorded.remove(one)
        if not queue.finish(one.trial, one.value):
            site.store.close(site.plan.experiment, keys(one.trial), REASSIGNED)
        if site.checkpoints is not None:
            site.checkpoints.remove(one.configs)
    return len(ready)


def conclude(queue: Queue, site: Site, terminal: Terminal, *, again: bool) -> Outcome | None:
    """Write the summary, which is a trial; show its address if another process wrote it.

    With `again` the folder of a summary that exists is written once more.
    """
    from studies.runner import summary  # imports seaborn: not needed for training

    plan, store = site.plan, site.store
    experiment = store.find(plan.experiment)
    assert experiment is not None  # it has runs
    experiment_id = experiment.experiment_id
    summaries = _after(queue, Listed([], {}))
    trials, confirmed = queue.trials(), summaries.trials()
    confirmed = [trial for trial in confirmed if part_of(trial) == "confirmation"]
    ended = [[trial.number for trial in part if has_result(trial)] for part in (trials, confirmed)]
    of = hashlib.sha256(json.dumps([ended, plan.summary_key]).encode()).hexdigest()[:16]
    cell = Cell({"part": "summary", "of": of}, plan.configs[0], "summary", {})
    summaries.proposer = Listed([cell], {})
    find = partial(summary.ended, plan, site.data, store, queue.study, [*trials, *confirmed])
    for one in (queue, summaries):
        close_failed(one, site)
    lose_deleted(summaries, site)
    with summaries.working():
        while summaries.left():
            for trial in summaries.take(1):
                close_failed(summaries, site)  # of a process that ended during the wait
                older = [t for t in summaries.trials("COMPLETE") if part_of(t) == "summary"]
                store.close(plan.experiment, keys(*older), SUPERSEDED)
                outcome, run_id = summary.summarize(find(), experiment_id, *keys(trial))
                if summaries.finish(trial, Value([0.0], {"run_id": run_id})):
                    return outcome
                store.close(plan.experiment, keys(trial), REASSIGNED)
            summaries.wait()
    if again:
        found = find()
        return summary.write(plan.find(found), found, experiment_id)
    written = [t for t in summaries.trials("COMPLETE") if summaries.proposer.place(t) == 0][-1]
    run_id = written.user_attrs["run_id"]
    terminal.line(f"Another process wrote the summary, run {run_id}.")
    terminal.show(stored(store, run_id))
    return None


def _after(queue: Queue, proposer: Proposer) -> Queue:
    """Open the companion study, which holds the confirmation and the summary of a study."""
    name = queue.study.study_name + AFTER
    return open_queue(queue.storage, name, proposer, queue.store_complete)
