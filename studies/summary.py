"""The end of a study: table, answer and figures, in one summary run and in a folder beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

import harness
from analysis import frames, tables
from harness.config import UserError
from harness.data import Dataset
from harness.tracking import RunLog, Store
from studies.options import Plan

TABLE = ["val/neg_elbo", "neg_elbo", "mse", "rate", "calibration_ratio", "active_units"]
"""Metrics of the summary table; all but the first are test metrics."""


@dataclass(frozen=True)
class Outcome:
    """What a finished study found.

    Attributes:
        table: one row per value, columns of `frames.along_axis`.
        answer: the answer in sentences.
        folder: where table and figures were written.
        experiment_id: MLflow experiment of the runs.
    """

    table: pd.DataFrame
    answer: str
    folder: Path
    experiment_id: str


def summarize(
    plan: Plan, data: Dataset, store: Store, experiment_id: str, finished: list[Any]
) -> Outcome:
    """Answer a finished plan's question and record the answer once.

    Args:
        plan: the study as it was run.
        data: its dataset.
        store: where its runs are.
        experiment_id: their experiment.
        finished: axis values that Optuna holds a result of.

    Raises:
        UserError: nothing finished, or the tracking store lacks runs of finished values.
    """
    axis = plan.study.axis.field
    frame = frames.load_runs(plan.experiment, plan.name, store.uri)
    _check_complete(plan, frame, finished, store)
    table = frames.along_axis(frame, axis, ["decoder_variance", *TABLE])
    answer = plan.study.answer(frame, axis)
    folder = store.home / "reports" / plan.name
    _write(folder, plan, frame, table)
    outcome = Outcome(table, answer, folder, experiment_id)
    if not _recorded(plan, store):
        _log(plan, data, store, frame, outcome)
    return outcome


def _check_complete(plan: Plan, frame: pd.DataFrame, finished: list[Any], store: Store) -> None:
    if not finished:
        raise UserError(f"study {plan.name!r} has no finished value: every one diverged")
    seeds = len(plan.configs[finished[0]])
    found = 0 if frame.empty else int(frame[plan.study.axis.field].isin(finished).sum())
    if found != len(finished) * seeds:
        raise UserError(
            f"study {plan.name!r} has {len(finished)} finished values x {seeds} seeds in Optuna "
            f"but {found} finished runs in {store.uri}; name the store it was tracked in with "
            "--tracking-uri, or start anew with --fresh"
        )


def _write(folder: Path, plan: Plan, frame: pd.DataFrame, table: pd.DataFrame) -> None:
    """Write the figures and both tables, single runs and means, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / "runs.csv", index=False)
    table.to_csv(folder / "table.csv", index=False)
    for figure in plan.study.figures:
        drawn = figure(frame, plan.study.axis.field)
        drawn.savefig(folder / f"{figure.__name__}.png", dpi=150)


def _recorded(plan: Plan, store: Store) -> bool:
    mine = f"tags.study = '{plan.name}' and tags.role = 'summary' and status = 'FINISHED'"
    return bool(harness.tracking.read_runs(store, plan.experiment, mine))


def _log(plan: Plan, data: Dataset, store: Store, frame: pd.DataFrame, outcome: Outcome) -> None:
    """Write the summary run: answer and table as description, files, and the best run's model."""
    axis = plan.study.axis.field
    best = frame[frame[axis] == frames.best_value(frame, axis)].sort_values("val/neg_elbo").iloc[0]
    tags = {"study": plan.name, "role": "summary", "configuration": f"best: {best['name']}"}
    log = RunLog(store, outcome.experiment_id, "summary", tags, plan.settings)
    try:
        log.dataset(data)
        log.describe(describe(plan.study.question, outcome))
        log.metrics({metric: float(best[metric]) for metric in TABLE}, step=int(best["epochs"]))
        log.folder(outcome.folder)
        model = harness.load_run(best["run_id"], store.uri).model
        harness.tracking.log_best_model(store, log, model, data.test.head(4))
    except BaseException:
        log.end("FAILED")
        raise
    log.end()


def describe(question: str, outcome: Outcome) -> str:
    """Write the summary as Markdown: question, answer, table."""
    table = tables.markdown(tables.cells(outcome.table))
    return f"**{question.strip()}**\n\n{outcome.answer}\n\n{table}\n"
