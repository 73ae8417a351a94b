"""Is the ledger of a study exact? What Optuna and MLflow hold, compared with the plan.

Every point has one finished trial; every configuration and seed has one finished run with all its
epochs and its model, made by that trial; one summary is finished; whatever else was begun says that
it was killed, and why.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from studies.grid import Grid, open_grid
from studies.measures import WALL_CLOCK
from studies.plan import Plan
from studies.storage import open_storage

import harness
from harness.tracking.addresses import sqlite_file

Runs = list[dict[str, Any]]


def faults(plan: Plan, tracking_uri: str, storage: str) -> list[str]:
    """Return what is wrong with the ledger of a study that has ended, one sentence each."""
    store = harness.tracking.connect(tracking_uri)
    grid = open_grid(plan, open_storage(storage))
    runs = harness.tracking.read_runs(store, plan.experiment, f"tags.study = '{plan.name}'")
    found = [*_broken(tracking_uri), *_broken(storage), *_of_trials(plan, grid)]
    found += [*_of_runs(plan, grid, runs), *_of_summaries(runs), *_of_the_dead(runs)]
    done = [run for run in runs if run["status"] == "FINISHED" and run["tags"]["role"] == "run"]
    return found + [fault for run in done for fault in _of_contents(store, run)]


def _broken(url: str) -> Iterator[str]:
    """Check a database file with SQLite's own check."""
    file = sqlite_file(url)
    if file is None:
        return
    with closing(sqlite3.connect(file)) as connection:
        (said,) = connection.execute("pragma integrity_check").fetchone()
    if said != "ok":
        yield f"{file} is broken: {said}"


def _of_trials(plan: Plan, grid: Grid) -> Iterator[str]:
    for trial in grid.trials("RUNNING", "WAITING"):
        yield f"trial {trial.number} is {trial.state.name}"
    finished = grid.finished()
    for point in {*plan.configs, *finished}:
        if finished.count(point) != (point in plan.configs):
            yield f"{point} has {finished.count(point)} finished trials"


def _of_runs(plan: Plan, grid: Grid, runs: Runs) -> Iterator[str]:
    trial = {grid.point(done): done.number for done in grid.trials("COMPLETE")}
    wanted = {
        (plan.label(point), str(config.seed)): str(trial.get(point))
        for point, configs in plan.configs.items()
        for config in configs
    }
    done = [r for r in runs if r["tags"]["role"] == "run" and r["status"] == "FINISHED"]
    made = [((r["tags"]["configuration"], r["params"]["seed"]), r["tags"]["trial"]) for r in done]
    for cell in {*wanted, *(cell for cell, _ in made)}:
        by = [number for own, number in made if own == cell]
        if by != [wanted.get(cell)]:
            yield f"{cell} was finished by trials {by}, not by {wanted.get(cell)}"


def _of_summaries(runs: Runs) -> Iterator[str]:
    ends = [run["status"] for run in runs if run["tags"]["role"] == "summary"]
    if ends.count("FINISHED") != 1:
        yield f"{ends.count('FINISHED')} summaries are finished"


def _of_the_dead(runs: Runs) -> Iterator[str]:
    for run in runs:
        which = f"run {run['run_id']} ({run['name']}) is {run['status']}"
        if run["status"] not in ("FINISHED", "KILLED", "FAILED"):
            yield which
        elif run["status"] != "FINISHED" and "reason" not in run["tags"]:
            yield f"{which} for no reason"


def _of_contents(store: harness.tracking.Store, run: dict[str, Any]) -> Iterator[str]:
    epochs = [*range(1, int(run["params"]["epochs"]) + 1)]
    for metric in ("train/mse", "val/mse"):
        steps = [entry.step for entry in store.client.get_metric_history(run["run_id"], metric)]
        if steps != epochs:
            yield f"run {run['run_id']} has {metric} of epochs {steps}, not of {epochs}"
    files = {file.path for file in store.client.list_artifacts(run["run_id"], "model")}
    if files != {"model/config.json", "model/weights.safetensors"}:
        yield f"run {run['run_id']} has the model files {sorted(files)}"


Course = dict[str, tuple[tuple[int, float], ...]]
"""Metric -> every (epoch, value) that was logged."""


def results(plan: Plan, tracking_uri: str) -> dict[tuple[str, str], Course]:
    """Return all that was measured of every finished run, wall time left out.

    Two studies of one plan have equal results, to the last bit, if nothing was lost in either.

    Returns:
        (configuration, seed) -> the run's metrics.
    """
    store = harness.tracking.connect(tracking_uri)
    mine = f"tags.study = '{plan.name}' and tags.role = 'run' and attributes.status = 'FINISHED'"
    return {
        (run["tags"]["configuration"], run["params"]["seed"]): {
            name: tuple(
                (m.step, m.value) for m in store.client.get_metric_history(run["run_id"], name)
            )
            for name in sorted(run["metrics"])
            if name not in WALL_CLOCK
        }
        for run in harness.tracking.read_runs(store, plan.experiment, mine)
    }
