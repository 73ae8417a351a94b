"""Is the ledger of a study exact? What Optuna, MLflow and the spool hold, compared with the plan.

Every trial that is wanted is complete once; every key of a complete trial has one finished run with
all its epochs, pictures and its model; one summary is finished; no run is open, none is finished
whose trial is not complete, and what ended otherwise has a reason; nothing waits in a spool.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from harness.tracking import connect
from harness.tracking.addresses import is_server, project_root, sqlite_file
from harness.tracking.record import WALL_CLOCK, picture_epochs
from harness.tracking.runs import PROVENANCE, Run
from harness.tracking.store import Store
from studies.runner.database import open_storage
from studies.runner.proposers import has_result, keys, part_of
from studies.runner.study import Plan

FINAL = ("mse", "neg_elbo", "neg_log_likelihood", "frechet")
"""Metrics of the test split that every run is measured by at its end."""


def faults(plan: Plan, tracking_uri: str, storage: str, homes: Iterable[Path] = ()) -> list[str]:
    """Return what is wrong with the ledger of a study that has ended, one sentence each.

    Args:
        plan: the study.
        tracking_uri: where its runs are.
        storage: where its trials are.
        homes: the copies of the project that it was run from; none given means this one.
    """
    found = [*_spooled(tracking_uri, [*homes] or [project_root()])]
    found += [*_broken(tracking_uri), *_broken(storage)]
    store = connect(tracking_uri)
    opened = open_storage(storage)
    try:
        names = optuna.get_all_study_names(opened)
        trials, after = (
            optuna.load_study(study_name=name, storage=opened).trials if name in names else []
            for name in (plan.name, f"{plan.name}/after")
        )
    finally:
        opened.engine.dispose()
    runs = store.runs(plan.experiment, study=plan.name)
    found += [*_of_trials(plan, trials, after), *_of_runs(plan, [*trials, *after], runs)]
    done = [run for run in runs if run.status == "FINISHED" and run.tags["role"] == "run"]
    return found + [fault for run in done for fault in _of_contents(store, run)]


def spooled(home: Path) -> list[Path]:
    """Return the folders of runs that wait for a server in a copy of the project."""
    return [file.parent for file in (home / "cache" / "spool").glob("*/*/*/writes.jsonl")]


def _spooled(tracking_uri: str, homes: Sequence[Path]) -> Iterator[str]:
    if is_server(tracking_uri):
        for home in homes:
            yield from (f"{folder} has not been delivered" for folder in spooled(home))


def _broken(url: str) -> Iterator[str]:
    """Check a database file with SQLite's own check."""
    file = sqlite_file(url)
    if file is None:
        return
    with closing(sqlite3.connect(file)) as connection:
        (result,) = connection.execute("pragma integrity_check").fetchone()
    if result != "ok":
        yield f"{file} is broken: {result}"


def _of_trials(
    plan: Plan, trials: Sequence[FrozenTrial], after: Sequence[FrozenTrial]
) -> Iterator[str]:
    for trial in [*trials, *after]:
        if not trial.state.is_finished():
            yield f"trial {trial.number} is {trial.state.name}"
    if left := plan.proposer.left(trials):
        yield f"{left} trials are left"
    done = [trial for trial in trials if has_result(trial)]
    for place, count in Counter(map(plan.proposer.place, done)).items():
        if count > 1:
            yield f"{count} trials are finished at place {place} of the plan"
    for key, count in Counter(key for trial in [*trials, *after] for key in keys(trial)).items():
        if count > 1:
            yield f"{count} trials have the key {key}"


def _of_runs(plan: Plan, trials: Sequence[FrozenTrial], runs: Sequence[Run]) -> Iterator[str]:
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    wanted = {key for trial in complete for key in keys(trial) if part_of(trial) != "summary"}
    finished = Counter(run.key for run in runs if run.status == "FINISHED")
    for key in wanted:
        if finished[key] != 1:
            yield f"{finished[key]} runs with key {key} of a complete trial are finished"
    summaries = [run for run in runs if run.tags["role"] == "summary"]
    ended = [run.key for run in summaries if run.status == "FINISHED"]
    if len(ended) != 1:
        yield f"{len(ended)} summaries are finished"
    last = {key for trial in complete for key in keys(trial) if part_of(trial) == "summary"}
    for run in runs:
        which = f"run {run.run_id} ({run.name}, key {run.key}) is {run.status}"
        if run.status not in ("FINISHED", "KILLED", "FAILED"):
            yield which
        elif run.status == "FINISHED":
            if run.key not in wanted | last:
                yield f"{which}, and its trial is not complete"
            if "reason" in run.tags:
                yield f"{which} with the reason {run.tags['reason']!r}"
        elif "reason" not in run.tags:
            yield f"{which} for no reason"


def _of_contents(store: Store, run: Run) -> Iterator[str]:
    which, epochs = f"run {run.run_id}", int(run.params["epochs"])
    for metric in ("train/neg_elbo", "val/neg_elbo", *WALL_CLOCK):
        steps = [entry.step for entry in store.client.get_metric_history(run.run_id, metric)]
        if steps != [*range(1, epochs + 1)]:
            yield f"{which} has {metric} of epochs {steps}, not of {epochs}"
    for metric in (f"test/{name}" for name in FINAL):
        steps = [entry.step for entry in store.client.get_metric_history(run.run_id, metric)]
        if steps != [epochs]:
            yield f"{which} has {metric} of epochs {steps}, not once"
    files = {file.path for file in store.client.list_artifacts(run.run_id, "model")}
    if files != {"model/config.json", "model/weights.safetensors"}:
        yield f"{which} has the model files {sorted(files)}"
    names = [Path(file.path).name for file in store.client.list_artifacts(run.run_id, "images")]
    first = int(run.tags.get("resumed_from_epoch", 0))
    wanted = {f"reconstructions+step+{e}+" for e in picture_epochs(epochs) if e >= first}
    wanted |= {"reconstructions+step+0+", f"prior_samples+step+{epochs}+"}
    for start in wanted:
        if sum(name.startswith(start) and name.endswith(".png") for name in names) != 1:
            yield f"{which} has not one picture {start}: {sorted(names)}"
    if PROVENANCE not in {file.path for file in store.client.list_artifacts(run.run_id)}:
        yield f"{which} has no {PROVENANCE}"


Course = dict[str, tuple[tuple[int, float], ...]]
"""Metric -> every (epoch, value) that was logged."""


def results(plan: Plan, tracking_uri: str) -> dict[tuple[str, str], Course]:
    """Return all that was measured of every finished run, wall time left out.

    Two studies of one plan have equal results, to the last bit, if nothing was lost in either.

    Returns:
        (configuration, seed) -> the run's metrics.
    """
    store = connect(tracking_uri)
    found: dict[tuple[str, str], Course] = {}
    for run in store.runs(plan.experiment, study=plan.name, role="run"):
        if run.status == "FINISHED":
            course: dict[str, list[tuple[int, float]]] = {}
            for metric, step, value in store.history(run.run_id):
                course.setdefault(metric, []).append((step, value))
            cell = run.tags["configuration"], run.params["seed"]
            found[cell] = {k: tuple(v) for k, v in course.items() if k not in WALL_CLOCK}
    return found
