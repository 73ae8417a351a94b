"""The end of a study: table, answer, figures and pictures, in a folder and in one summary run."""

from __future__ import annotations

import json
import logging
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

import harness
from analysis import frames, report, tables
from harness.config import UserError
from harness.data.dataset import Dataset
from harness.places import without_password
from harness.tracking import RunLog, Store
from studies import diverged
from studies.gallery import write_pictures
from studies.plan import Plan, Point
from studies.runner.options import flags, program

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "mlflow", "optuna", "numpy", "pandas", "seaborn")


@dataclass(frozen=True)
class Outcome:
    """What a finished study found.

    Attributes:
        table: one row per point, columns of `frames.along_axis`.
        answer: the answer in sentences.
        folder: where tables, figures and pictures were written.
        experiment_id: MLflow experiment of the runs.
    """

    table: pd.DataFrame
    answer: str
    folder: Path
    experiment_id: str


def summarize(
    plan: Plan, data: Dataset, store: Store, experiment_id: str, finished: list[Point]
) -> Outcome:
    """Answer a finished plan's question and record the answer once.

    Args:
        plan: the study as it was run.
        data: its dataset.
        store: where its runs are.
        experiment_id: their experiment.
        finished: points that Optuna holds a result of.

    Raises:
        UserError: nothing finished, or the tracking store lacks runs of finished points.
    """
    logger.info("reading the runs back from MLflow")
    frame = frames.load_runs(plan.experiment, plan.name, store.uri)
    _check_complete(plan, frame, finished, store)
    keys = list(plan.coordinates(finished[0]))
    table = frames.along_axis(frame, keys, [m for m in plan.study.table if m in frame])
    wild = diverged.runs_of(plan, store)
    ranked = diverged.without(frame, wild)
    answer = plan.study.answer(ranked)
    if wild:
        table = diverged.with_column(table, plan, wild)
        answer += f"\n\n{diverged.sentence(wild)}"
    outcome = Outcome(table, answer, store.home / "reports" / plan.name, experiment_id)
    _write(outcome, plan, data, frame, ranked, store)
    if not _recorded(plan, store):
        _log(plan, data, store, ranked, outcome)
    return outcome


def _check_complete(plan: Plan, frame: pd.DataFrame, finished: list[Point], store: Store) -> None:
    if not finished:
        raise UserError(f"study {plan.name!r} has no finished point: every one diverged")
    found = len(frame)
    if found < len(finished) * plan.seeds:
        raise UserError(
            f"study {plan.name!r} has {len(finished)} finished points x {plan.seeds} seeds in "
            f"Optuna but {found} finished runs in {without_password(store.uri)}; name the store it "
            "was tracked in with --tracking-uri, or start anew with --fresh"
        )


def _write(
    outcome: Outcome,
    plan: Plan,
    data: Dataset,
    frame: pd.DataFrame,
    ranked: pd.DataFrame,
    store: Store,
) -> None:
    """Write all that a report is made of into the outcome's folder."""
    folder = make_folder(outcome.folder)
    frame.to_csv(folder / "runs.csv", index=False)
    tables.cells(outcome.table).to_csv(folder / "table.csv", index=False)
    reference = reference_runs(plan, ranked)
    keys = list(plan.coordinates(next(iter(plan.configs))))
    compared = [metric for metric in plan.study.table if metric in COMPARED and metric in frame]
    differences = frames.differences(frame, keys, reference, compared)
    tables.cells(differences).to_csv(folder / "differences.csv", index=False)
    logger.info("drawing figures")
    figures = plan.study.figures.items()
    drawn = {name: (draw(frame), caption) for name, (draw, caption) in figures}
    compared_with = reference["name"].iloc[0].split(" seed=")[0]
    difference_caption = (
        f"Difference from {compared_with}, paired by seed, with its 95 % t interval."
    )
    write_summary(
        outcome,
        data,
        store,
        study=plan.study.name,
        name=plan.name,
        question=plan.study.question.strip(),
        command=command(plan),
        settings=plan.settings,
        figures=save_figures(folder, drawn),
        pictures=write_pictures(folder, plan, data, ranked, store),
        tables=[
            {"file": "table.csv", "caption": TABLE_CAPTION},
            {"file": "differences.csv", "caption": difference_caption},
        ],
    )


def make_folder(folder: Path) -> Path:
    """Make a summary's folder with its two parts."""
    for part in ("figures", "pictures"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    return folder


def save_figures(folder: Path, drawn: Mapping[str, tuple[Figure, str]]) -> list[dict[str, str]]:
    """Save figures with their captions; returns what the report needs of each."""
    for name, (figure, _) in drawn.items():
        figure.savefig(folder / f"figures/{name}.png", dpi=150)
    return [{"file": f"figures/{name}.png", "caption": text} for name, (_, text) in drawn.items()]


def write_summary(outcome: Outcome, data: Dataset, store: Store, **fields: object) -> None:
    """Write `summary.json`, the given fields and those that every study has, and the report."""
    versions = {"python": platform.python_version()} | {p: version(p) for p in PACKAGES}
    summary = {
        **fields,
        "dataset": data.name,
        "answer": outcome.answer,
        "versions": versions,
        "dataset_digest": data.digest,
        "experiment_id": outcome.experiment_id,
        "tracking_uri": without_password(store.uri),
    }
    (outcome.folder / "summary.json").write_text(json.dumps(summary, indent=2))
    report.build(outcome.folder)


def reference_runs(plan: Plan, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that all points are compared with: the study's reference, or the best."""
    keys = list(plan.coordinates(next(iter(plan.configs))))
    if plan.study.reference in set(frame[keys[-1]]):
        return frame[frame[keys[-1]] == plan.study.reference]
    best = frame.groupby(keys)[plan.study.objective].mean().idxmin()
    best = best if isinstance(best, tuple) else (best,)
    return frame[(frame[keys] == list(best)).all(axis=1)]


COMPARED = (
    *("val/neg_elbo", "neg_elbo", "neg_log_likelihood"),
    *("mse", "probe_accuracy", "frechet"),
)
"""Metrics of the table of paired differences."""

TABLE_CAPTION = (
    "Mean and 95 % t interval over seeds; val/ on validation data, all else on test data, both "
    "after the last epoch. best/epoch is the epoch in which validation was best, best/val/ its "
    "value."
)


def command(plan: Plan) -> str:
    """Return the command line that repeats a plan."""
    first, study = plan.runs[0], plan.study
    words = [f"{program(study.name)} {plan.source.words}"]
    words += [f"--epochs {first.epochs} --seeds {plan.seeds} --batch-size {first.batch_size}"]
    words += [f"--study-name {plan.name}"]
    words += flags(first, study.base, plan.settings.keys() - {study.axis.name, study.group})
    values = list(dict.fromkeys(point.value for point in plan.configs))
    if tuple(values) != study.axis.values:
        words.append("--values " + " ".join(shlex.quote(str(value)) for value in values))
    return " ".join(words)


def _recorded(plan: Plan, store: Store) -> bool:
    mine = f"tags.study = '{plan.name}' and tags.role = 'summary' and status = 'FINISHED'"
    return bool(harness.tracking.read_runs(store, plan.experiment, mine))


def _log(plan: Plan, data: Dataset, store: Store, frame: pd.DataFrame, outcome: Outcome) -> None:
    """Write the summary run: answer and table as description, files, and the best run's model."""
    best = frame.loc[frame[plan.study.objective].idxmin()]
    shown = {m: float(best[m]) for m in plan.study.table if m in best and best[m] == best[m]}
    description = describe(plan.study.question, outcome)
    log_summary(outcome, plan.name, plan.settings, description, best, shown, data, store)


def log_summary(
    outcome: Outcome,
    study: str,
    settings: Mapping[str, object],
    description: str,
    best: pd.Series,
    shown: Mapping[str, float],
    data: Dataset,
    store: Store,
    columns: Sequence[str] = (),
) -> None:
    """Write the summary run of a study, with the model of its best run.

    Args:
        outcome: what was found; its folder is logged.
        study: name of the study, as tagged.
        settings: parameters of the summary run.
        description: Markdown that its page shows.
        best: the best run, a row of the frame of runs.
        shown: metrics of the summary run.
        data: the dataset.
        store: where runs are.
        columns: of the experiment's view of its runs; of the outcome's table if none are given.
    """
    # Before the summary: a study with a summary that is killed here would not come by again.
    columns = columns or ["seed", *outcome.table.columns]
    harness.tracking.save_view(store, outcome.experiment_id, columns, best["run_id"])
    tags = {"study": study, "role": "summary", "configuration": f"best: {best['name']}"}
    made = harness.provenance.tags(harness.provenance.provenance(data, "cpu"))
    del made["device_name"]  # of the runs, if they were trained on a GPU
    tags |= made
    logger.info("writing the summary to MLflow, with the best run's model")
    log = RunLog(store, outcome.experiment_id, "summary", tags, settings)
    try:
        log.dataset(data)
        log.describe(description)
        # Named as in the runs, so that they share columns and charts.
        names = harness.tracking.metric_names(store, best["run_id"])
        named = {names.get(name, name): value for name, value in shown.items()}
        log.folder(outcome.folder)
        run = harness.load_run(best["run_id"], store.uri)
        examples = data.test.head(4)
        harness.tracking.log_best_model(
            store, log, run.config, run.model, examples, named, description
        )
    except BaseException as error:
        status, reason = harness.ledger.interruption(error)
        log.tag("reason", reason)
        log.end(status)
        raise
    log.end()
    store.writer.settle()


def describe(question: str, outcome: Outcome) -> str:
    """Write the summary as Markdown: question, answer, table."""
    table = tables.markdown(tables.cells(outcome.table))
    return f"**{question.strip()}**\n\n{outcome.answer}\n\n{table}\n"
