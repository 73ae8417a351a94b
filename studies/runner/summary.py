"""The end of a study: table, answer, figures, pictures and report in a folder and a summary run."""

from __future__ import annotations

import json
import logging
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from filelock import FileLock, Timeout
from PIL import Image

from analysis import frames, plots, report, tables
from harness import provenance
from harness.data.dataset import Dataset
from harness.errors import SummaryError, UserError
from harness.metrics import pictures, probes
from harness.models.vae import VAE
from harness.tracking import load_run
from harness.tracking.addresses import without_password
from harness.tracking.models import log_best_model
from harness.tracking.page import save_view
from harness.tracking.record import FAILED, MADE_WITH, interruption
from harness.tracking.runs import Run
from harness.tracking.store import Store
from studies.runner.proposers import has_result, keys

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure
    from optuna.trial import FrozenTrial

    from harness.tracking.runs import RunLog
    from studies.runner.study import Plan, Study

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "mlflow", "optuna", "numpy", "pandas", "seaborn")

LONGEST_WAIT = 60.0
"""Seconds, at most, for which a process waits for another that writes the same report."""

SCATTERED = 1000
"""Test images of a latent scatter."""

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


@dataclass(frozen=True)
class Ended:
    """All that a study has to answer from.

    Attributes:
        trials: of the study and of its confirmation.
        runs: runs of trials that have a result, in the order of the plan.
    """

    plan: Plan
    data: Dataset = field(repr=False)
    store: Store = field(repr=False)
    study: optuna.Study = field(repr=False)
    trials: Sequence[FrozenTrial] = field(repr=False)
    runs: Sequence[Run] = field(repr=False)

    @property
    def finished(self) -> list[Run]:
        """The runs that finished."""
        return [run for run in self.runs if run.status == "FINISHED"]

    @property
    def diverged(self) -> list[Run]:
        """The runs that diverged."""
        return [run for run in self.runs if run.status == "FAILED"]


@dataclass(frozen=True)
class Findings:
    """What a study found, ready to be written.

    Attributes:
        table: the main table, for the terminal and the summary run.
        frame: all runs, written to runs.csv.
        tables: file name -> (table, caption), for the report.
        figures: file name -> (returns the figure, caption).
        models: label -> run id of the models that are pictured side by side.
        closer: label of the one that is pictured in detail, "" without models.
        best: the run whose model the summary run holds, a row of a frame of runs.
        shown: metrics of the summary run.
        settings: parameters of the summary run.
        columns: of MLflow's view of the runs; empty for seed and the table's.
        seed: of the pictured runs.
        sections: further parts of the outcome, for a page's own display.
    """

    table: pd.DataFrame
    answer: Callable[[], str]
    frame: pd.DataFrame
    tables: Mapping[str, tuple[pd.DataFrame, str]]
    figures: Mapping[str, tuple[Callable[[], Figure], str]]
    models: Mapping[str, str]
    closer: str
    best: pd.Series
    shown: Mapping[str, float]
    settings: Mapping[str, Any]
    columns: Sequence[str] = ()
    seed: int = 0
    sections: Any = None


@dataclass(frozen=True)
class Outcome:
    """What a finished study found.

    Attributes:
        folder: where tables, figures and pictures were written.
        failed: what could not be measured of the runs, "" if nothing.
    """

    plan: Plan
    table: pd.DataFrame
    answer: str
    folder: Path
    experiment_id: str
    failed: str = ""
    sections: Any = None


def ended(
    plan: Plan,
    data: Dataset,
    store: Store,
    study: optuna.Study,
    trials: Sequence[FrozenTrial],
) -> Ended:
    """Read the runs of a study back from MLflow, and check that none is missing."""
    log.info("reading the runs back from MLflow")
    known = {key for trial in trials if has_result(trial) for key in keys(trial)}
    every = store.runs(plan.experiment, study=plan.name, role="run")
    runs = _in_order([run for run in every if run.key in known], plan, trials)
    found = Ended(plan, data, store, study, trials, runs)
    finished = {run.key for run in found.finished}
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if not complete:
        raise UserError(f"study {plan.name!r} has no finished run: every one diverged")
    wanted = {key for trial in complete for key in keys(trial)}
    if missing := wanted - finished:
        raise UserError(
            f"study {plan.name!r} has {len(wanted)} finished runs in Optuna, of which "
            f"{len(missing)} are not in {without_password(store.uri)}; give the store that it was "
            "tracked in with --tracking-uri, or begin a new study with --study-name"
        )
    return found


def _in_order(runs: Sequence[Run], plan: Plan, trials: Sequence[FrozenTrial]) -> list[Run]:
    """Return runs in the order of the plan, which changes when a study grows; others come last."""
    places = {key: plan.proposer.place(trial) for trial in trials for key in keys(trial)}

    def order(run: Run) -> tuple[bool, int]:
        place = places[run.key]
        return place is None, place or 0

    return sorted(runs, key=order)


def summarize(found: Ended, experiment_id: str, key: str) -> tuple[Outcome, str]:
    """Write folder, report and summary run of a study; return the outcome and the run's id.

    Where `write` raises SummaryError there is no summary run.
    """
    findings = found.plan.find(found)
    outcome = write(findings, found, experiment_id)
    for place, known in enumerate(found.runs):
        if known.tags.get("place") != str(place):
            found.store.tag(known.run_id, "place", str(place))
    tags = provenance.tags(provenance.provenance(found.data, "cpu"))
    del tags["device_name"]  # of the runs, if they were trained on a GPU
    tags |= {"study": found.plan.name, "role": "summary"}
    tags |= {"configuration": f"best: {findings.best['name']}"}
    run = found.store.start(experiment_id, key, "summary", tags, dict(findings.settings))
    try:
        log_summary(outcome, findings, found, run)
    except BaseException as error:
        run.end(*interruption(error))
        raise
    run.end()
    found.store.deliver([key])
    return outcome, run.run_id


def write(findings: Findings, found: Ended, experiment_id: str) -> Outcome:
    """Write the folder and the report of a study, one process of this disk after the other.

    Raises:
        SummaryError: a figure or the answer failed; all the others are written.
    """
    folder = make_folder(found.store.home / "reports" / found.plan.name)
    lock = FileLock(f"{folder}.lock")
    with suppress(Timeout):  # of a process that is stopped
        lock.acquire(LONGEST_WAIT)
    try:
        return _write(folder, findings, found, experiment_id)
    finally:
        lock.release()


def _write(folder: Path, findings: Findings, found: Ended, experiment_id: str) -> Outcome:
    plan, store, data, failures = found.plan, found.store, found.data, list[str]()

    def tried(what: str, function: Callable[[], Any]) -> Any:  # noqa: ANN401 - the result
        try:
            return function()
        except UserError:
            raise
        except Exception as error:
            log.warning("%s failed", what, exc_info=True)
            failures.append(f"{what}: {error!r}")
            return None

    answer = tried("the answer", findings.answer) or "The answer failed."
    failed = _failed_metrics(found.finished)
    answer = "\n\n".join(filter(None, [answer, failed, *differing(found.finished)]))
    findings.frame.to_csv(folder / "runs.csv", index=False)
    for name, (table, _) in findings.tables.items():
        tables.cells(table).to_csv(folder / f"{name}.csv", index=False)
    log.info("drawing figures")
    figures = []
    for name, (draw, caption) in findings.figures.items():
        figure = tried(f"figure {name!r}", draw)
        if figure is not None:
            figure.savefig(folder / f"figures/{name}.png", dpi=150)
            figures.append({"file": f"figures/{name}.png", "caption": caption})
    drawn = tried("the pictures", lambda: write_pictures(folder, findings, data, store)) or []
    outcome = Outcome(
        plan, findings.table, answer, folder, experiment_id, failed, findings.sections
    )
    summary = {
        "study": plan.page,
        "name": plan.name,
        "question": plan.question.strip(),
        "command": plan.command,
        "settings": dict(findings.settings),
        "figures": figures,
        "pictures": drawn,
        "tables": [
            {"file": f"{name}.csv", "caption": caption}
            for name, (_, caption) in findings.tables.items()
        ],
        "dataset": data.name,
        "answer": answer,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "dataset_digest": data.digest,
        "experiment_id": experiment_id,
        "tracking_uri": without_password(store.uri),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    report.build(folder)
    if failures:
        raise SummaryError(
            f"everything is trained and recorded, but {'; '.join(failures)}; the rest of the "
            f"report is in {folder}, and the same command tries again"
        )
    return outcome


def make_folder(folder: Path) -> Path:
    """Make a summary's folder with its two parts."""
    for part in ("figures", "pictures"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    return folder


def log_summary(outcome: Outcome, findings: Findings, found: Ended, run: RunLog) -> None:
    """Write the summary run: answer and table as description, files, and the best run's model."""
    store, best = found.store, findings.best
    # First: a study whose summary is complete does not come by again.
    columns = findings.columns or ["seed", *outcome.table.columns]
    save_view(store, outcome.experiment_id, columns, best["run_id"])
    log.info("writing the summary to MLflow, with the best run's model")
    run.dataset(found.data)
    description = describe(outcome)
    run.describe(description)
    run.folder(outcome.folder)
    # Named as in the runs, so that they share columns and charts.
    logged = {k.removeprefix("test/"): k for k in store.run(best["run_id"]).metrics}
    named = {logged.get(name, name): value for name, value in findings.shown.items()}
    loaded = load_run(best["run_id"], store.uri)
    examples = found.data.test.head(4)
    log_best_model(store, run, loaded.config, loaded.model, examples, named, description)


def describe(outcome: Outcome) -> str:
    """Return the summary as Markdown: question, answer, table."""
    table = tables.markdown(tables.cells(outcome.table))
    return f"**{outcome.plan.question.strip()}**\n\n{outcome.answer}\n\n{table}\n"


def _failed_metrics(runs: Sequence[Run]) -> str:
    failed = [run for run in runs if FAILED in run.tags]
    if not failed:
        return ""
    example = f"{failed[0].name}: {failed[0].tags[FAILED]}"
    return f"The study's further metrics of {len(failed)} runs failed ({example})."


def differing(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for each part of their making in which compared runs differ."""
    sentences = []
    for part, (kind, name) in MADE_WITH.items():
        counts = Counter(getattr(run, kind).get(name) for run in runs)
        counts.pop(None, None)  # a run of an earlier version has none
        if len(counts) > 1:
            each = "; ".join(f"{count} with {made}" for made, count in counts.most_common())
            sentences.append(
                f"The compared runs differ in their {part} ({each}), which may explain differences "
                "between them."
            )
    return sentences


# --- the answer of a grid -----------------------------------------------------------------------


def compare_points(study: Study, found: Ended) -> Findings:
    """Return what the runs of a grid of points found."""
    frame = frames.tidy(found.finished)
    axes = study.columns
    lost = {_coordinates(run, axes) for run in found.diverged}
    ranked = frame[[_coordinates(run, axes) not in lost for run in found.finished]]
    table = frames.along_axis(frame, axes, [m for m in study.table if m in frame])
    if found.diverged:
        table = _with_diverged(table, study, found)
    reference = _reference(study, ranked, axes)
    compared = [metric for metric in study.table if metric in COMPARED and metric in frame]
    differences = frames.differences(frame, axes, reference, compared)
    compared_with = reference["name"].iloc[0].rpartition(" seed=")[0]
    caption = f"Difference from {compared_with}, paired by seed, with its 95 % t interval."
    models = _first_seeds(study, frame)
    values = frame.set_index("name")[study.objective]
    best = ranked.loc[ranked[study.objective].idxmin()]

    def answer() -> str:
        sentences = [study.answer(ranked)]
        return "\n\n".join(sentences + ([_diverged(found.diverged)] if found.diverged else []))

    return Findings(
        table=table,
        answer=answer,
        frame=frame,
        tables={"table": (table, TABLE_CAPTION), "differences": (differences, caption)},
        figures={
            name: (partial(draw, frame), text) for name, (draw, text) in study.figures.items()
        },
        models=models,
        closer=min(models, key=lambda label: values[f"{label} seed=0"], default=""),
        best=best,
        shown={m: float(best[m]) for m in study.table if m in best and best[m] == best[m]},
        settings=_settings(study, found.plan, frame),
    )


def _coordinates(run: Run, axes: Sequence[str]) -> tuple[str, ...]:
    return tuple(run.params[axis] for axis in axes)


def _settings(study: Study, plan: Plan, frame: pd.DataFrame) -> dict[str, Any]:
    """Return the dataset, the size of the study, and the settings in which its runs agree."""
    first, *others = (json.loads(config.to_json()) for config in plan.configs)
    shared = {k: v for k, v in first.items() if all(other[k] == v for other in others)}
    shared.pop("seed", None)
    values = list(dict.fromkeys(frame[study.axis.name].tolist()))
    seeds = int(frame["seed"].nunique())
    return {**plan.source.settings, "values": values, "seeds": seeds, **shared}


def _reference(study: Study, frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return the runs that all points are compared with: the study's reference, or the best."""
    if study.reference in set(frame[keys[-1]]):
        return frame[frame[keys[-1]] == study.reference]
    best = frame.groupby(keys)[study.objective].mean().idxmin()
    best = best if isinstance(best, tuple) else (best,)
    return frame[(frame[keys] == list(best)).all(axis=1)]


def _diverged(runs: Sequence[Run]) -> str:
    named = "; ".join(f"{run.name} {run.tags['reason']}" for run in runs)
    count = "1 run diverged, and its" if len(runs) == 1 else f"{len(runs)} runs diverged, and their"
    return f"{count} values are not ranked: {named}."


def _with_diverged(table: pd.DataFrame, study: Study, found: Ended) -> pd.DataFrame:
    """Add to a table of points how many runs of each diverged, and the points without another."""
    axes = study.columns
    every = frames.tidy([*found.finished, *found.diverged])
    lost = frames.tidy(found.diverged).groupby(axes, sort=False).size()
    counts = every.groupby(axes, sort=False).size().rename("runs").reset_index()
    texts = [
        f"{lost.get(point[0] if len(axes) == 1 else tuple(point), 0)} of {runs}"
        for *point, runs in counts.itertuples(index=False)
    ]
    return counts[axes].assign(diverged=texts).merge(table, on=axes, how="left")


def _first_seeds(study: Study, frame: pd.DataFrame) -> dict[str, str]:
    """Return the runs of seed 0 in the study's last group: label -> run id."""
    first = frame[frame["seed"] == 0]
    if study.group and len(first):
        first = first[first[study.group] == first[study.group].iloc[-1]]
    labels = first["name"].str.rpartition(" seed=")[0]
    return dict(zip(labels, first["run_id"], strict=True))


# --- pictures -----------------------------------------------------------------------------------


def write_pictures(
    folder: Path, findings: Findings, data: Dataset, store: Store
) -> list[dict[str, Any]]:
    """Draw models side by side, and one of them closer; return what the report shows of each."""
    if not findings.models:
        return []
    log.info("drawing pictures of the models")
    models = {label: load_run(run, store.uri).model for label, run in findings.models.items()}
    labels, stack, seed = list(models), list(models.values()), findings.seed
    closer = findings.closer
    drawn = [
        (
            "reconstructions",
            pictures.reconstructions(stack, data.test),
            "Test images (top row) and their reconstructions from the posterior mean, "
            f"seed {seed}.",
            ["test images", *labels],
        ),
        (
            "prior_samples",
            pictures.sample_rows(stack, seed),
            f"Decoder means of z drawn from the prior N(0, I), seed {seed}.",
            labels,
        ),
        (
            "traversals",
            pictures.traversals(models[closer], data),
            f"{closer}: one latent a row from -3 to 3, largest KL first, the others 0.",
            None,
        ),
        (
            "interpolations",
            pictures.interpolations(models[closer], data.test),
            f"{closer}: straight lines between the posterior means of pairs of test images.",
            None,
        ),
    ]
    listed = []
    for name, picture, caption, rows in drawn:
        Image.fromarray(picture).save(folder / f"pictures/{name}.png")
        listed.append({"file": f"pictures/{name}.png", "caption": caption, "rows": rows})
    return [*listed, _scatter(folder, models, data)]


def _scatter(folder: Path, models: Mapping[str, VAE], data: Dataset) -> dict[str, Any]:
    part = data.test.head(SCATTERED)
    classes = [data.class_name(label) if data.classes else "" for label in part.labels.tolist()]
    planes_of = []
    for label, model in models.items():
        x, y = probes.latent_plane(model, part).T
        planes_of.append(pd.DataFrame({"model": label, "x": x, "y": y, "class": classes}))
    plots.latent_scatter(pd.concat(planes_of)).savefig(folder / "pictures/latents.png", dpi=130)
    coloured = ", coloured by class" if data.classes > 1 else ""
    caption = (
        f"Posterior means of {len(classes)} test images{coloured}: both latents of two, the first "
        "two principal components of more. Each panel has its own scale."
    )
    return {"file": "pictures/latents.png", "caption": caption, "rows": None}
