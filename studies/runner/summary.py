"""The end of a study: table, answer, figures, pictures and report in a folder and a summary run."""

from __future__ import annotations

import json
import logging
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pandas as pd
from filelock import FileLock
from matplotlib.figure import Figure
from matplotlib.text import Text
from optuna.trial import FrozenTrial
from PIL import Image

from analysis import comparisons, frames, plots, report, tables
from analysis.comparisons import Ranking, rank
from harness import provenance, registry
from harness.data.dataset import Dataset
from harness.errors import SummaryError, UserError, line_of
from harness.metrics import pictures, probes
from harness.metrics.likelihood import amortization_gap
from harness.processes import one_thread
from harness.tracking import load_run
from harness.tracking import record as recording
from harness.tracking.addresses import without_secrets
from harness.tracking.page import save_view
from harness.tracking.record import ACTS, FAILED, MADE_WITH, interruption
from harness.tracking.runs import NOTE, Epoch, Run, RunLog
from harness.tracking.store import Store
from studies.runner import answers
from studies.runner.proposers import CELL, Listed, has_result, keys
from studies.runner.terminal import counted, records

if TYPE_CHECKING:
    from studies.runner.study import Plan, Study

log = logging.getLogger(__name__)

# Columns of MLflow's page after the axes and the objective.
VIEWED = ("rate", "mse", "active_units", "seed", "kl_weight", "latent_size", "val/neg_elbo")
PACKAGES = ("torch", "torchvision", "mlflow", "optuna", "numpy", "pandas", "seaborn")

TABLE_CAPTION = (
    "Mean and 95 % t interval over seeds; val/ on validation data, all others on test data, both "
    "after the last epoch. best/epoch has the best validation value, best/val/ is that value."
)

COMPARED = ("val/neg_elbo", "neg_elbo", "mse", "probe_accuracy", "frechet")
"""Metrics of the table of paired differences: none whose error differs between settings."""


@dataclass(frozen=True)
class Ended:
    """The trials of a study and its confirmation, and their runs in the order of the plan."""

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


@dataclass(frozen=True)
class Findings:
    """The results of a study, ready to be written.

    Attributes:
        frame: all runs; `best` is its row whose model is pictured and held by the summary run, of
            the median seed.
        tables, figures: file name -> (table or function that draws, caption), for the report.
        models: label -> run id of the models that are pictured side by side.
        shown, settings: metrics and parameters of the summary run.
        ranking: the best value and those not distinguishable from it; None where nothing is ranked.
        verdict: three lines: the best setting, how sure that is, and what to do next.
        best_value, not_distinguishable: values of the axis as the user gave them, of several
            columns objects {column: value}.
        groups: group -> both of them within it.
        procedure: by which they are compared, where there is no ranking.
    """

    table: pd.DataFrame
    answer: Callable[[], str]
    frame: pd.DataFrame
    tables: Mapping[str, tuple[pd.DataFrame, str]]
    figures: Mapping[str, tuple[Callable[[], Figure], str]]
    models: Mapping[str, str]
    best: pd.Series
    shown: Mapping[str, float]
    settings: Mapping[str, Any]
    ranking: Ranking | None = None
    verdict: Sequence[str] = ()
    warnings: Sequence[str] = ()
    next_command: str = ""
    best_value: Any = None
    not_distinguishable: Sequence[Any] = ()
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    procedure: str = ""
    best_row: int | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished study, as it is shown.

    `failures` are sentences on metrics that failed, `written` is what the study takes on this disk.
    """

    plan: Plan
    table: pd.DataFrame
    answer: str
    folder: Path
    experiment_id: str
    failures: Sequence[str] = ()
    run_ids: Sequence[str] = ()
    best: Any = None
    not_distinguishable: Sequence[Any] = ()
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    procedure: str = ""
    verdict: Sequence[str] = ()
    warnings: Sequence[str] = ()
    next_command: str = ""
    best_row: int | None = None
    model_run_id: str = ""
    written: str = ""


def ended(
    plan: Plan, data: Dataset, store: Store, study: optuna.Study, trials: Sequence[FrozenTrial]
) -> Ended:
    """Read the runs of a study from MLflow, and check that none is missing."""
    log.info("reading the runs back from MLflow")
    # The plan's order, which changes when a study grows; trials that it lacks come last.
    places = {key: plan.proposer.place(t) for t in trials if has_result(t) for key in keys(t)}
    every = store.runs(plan.experiment, study=plan.name, role="run")
    runs = [_as_planned(run) for run in every if run.key in places]
    runs.sort(key=lambda run: (places[run.key] is None, places[run.key] or 0))
    found = Ended(plan, data, store, study, trials, runs)
    complete = {*keys(*(trial for trial in trials if trial.state.name == "COMPLETE"))}
    if not complete:
        raise UserError(f"study {plan.name!r} has no finished run: every one diverged")
    if missing := complete - {run.key for run in found.finished}:
        raise UserError(
            f"study {plan.name!r} has {len(complete)} finished runs in Optuna, of which "
            f"{len(missing)} are not in {without_secrets(store.uri)}; the same command makes "
            "them again"
        )
    return found


def _as_planned(run: Run) -> Run:
    """Return a run under the name that it was made with, which MLflow's page can change."""
    return run._replace(name=f"{run.tags['configuration']} seed={run.params['seed']}")


def summarize(found: Ended, experiment_id: str, key: str) -> tuple[Outcome, str]:
    """Write folder, report and summary run of a study; return the outcome and the run's id."""
    findings = found.plan.find(found)
    outcome = write(findings, found, experiment_id)
    for place, run in enumerate(found.runs):
        if run.tags.get("place") != str(place):
            found.store.tag(run.run_id, "place", str(place))
    tags = recording.tags_of(provenance.provenance(found.data, "cpu"))
    del tags["device_name"]  # of the runs, if they were trained on a GPU
    tags |= {"study": found.plan.name, "role": "summary"}
    tags |= {"configuration": f"best: {findings.best['name']}"}
    started = found.store.start(experiment_id, key, "summary", tags, dict(findings.settings))
    try:
        log_summary(outcome, findings, found, started)
    except BaseException as error:
        started.end(*interruption(error))
        raise
    started.end()
    found.store.deliver([key])
    return outcome, found.store.run(key).run_id


def write(findings: Findings, found: Ended, experiment_id: str) -> Outcome:
    """Write the folder and the report of a study, one process of this disk after the other.

    Where a figure or the answer fails, all others are written before SummaryError is raised.
    """
    reports, name = found.store.home / "reports", found.plan.name
    reports.mkdir(parents=True, exist_ok=True)
    with FileLock(reports / f"{name}.lock"):
        folder, number = reports / name, 1
        while not _is_free(folder, found):
            number += 1
            folder = reports / f"{name}.{number}"
        for part in ("figures", "pictures"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        return _write(folder, findings, found, experiment_id)


def _is_free(folder: Path, found: Ended) -> bool:
    """Return whether a folder holds no report of other runs: of a study in a store beside."""
    try:
        theirs = {*pd.read_csv(folder / "runs.csv", usecols=["run_id"])["run_id"]}
    except (OSError, ValueError):  # there is none, or a torn one
        return True
    return not theirs or not theirs.isdisjoint(run.run_id for run in found.runs)


def _write(folder: Path, findings: Findings, found: Ended, experiment_id: str) -> Outcome:
    plan, failures = found.plan, list[str]()
    words = str if found.data.columns is None else plots.of_a_table

    def attempt(part: str, function: Callable[[], Any]) -> Any:  # noqa: ANN401 - the result
        try:
            return function()
        except Exception as error:
            log.warning("%s failed", part, exc_info=True)
            failures.append(f"{part} failed: {line_of(error)}")

    answer = words(attempt("the answer", findings.answer) or "The answer failed.")
    failed = failed_metrics(found.finished)
    best = next(run for run in found.runs if run.run_id == findings.best["run_id"])
    acts = [f"Best setting: {best.tags[ACTS]}."] if ACTS in best.tags else []
    answer = "\n\n".join([answer, *acts, *differing(found.finished), *failed])
    findings.frame.to_csv(folder / "runs.csv", index=False)
    for name, (table, _) in findings.tables.items():
        tables.cells(table).to_csv(folder / f"{name}.csv", index=False)
    log.info("drawing figures")
    figures = []
    for name, (draw, caption) in findings.figures.items():
        file = f"figures/{name}.png"
        if attempt(f"figure {name!r}", partial(_draw, draw, folder / file, words)):
            figures.append({"file": file, "caption": words(caption)})
    result = {
        "best": findings.best_value,
        "not_distinguishable": [*findings.not_distinguishable],
        "groups": {**findings.groups},
        "procedure": answers.BY if findings.ranking else findings.procedure,
        "verdict": [*map(words, findings.verdict)],
        "warnings": [*map(words, findings.warnings)],
        "next_command": findings.next_command,
        "best_row": findings.best_row,
        "model_run_id": findings.best["run_id"],
        "run_ids": [run.run_id for run in found.runs],
    }
    drawn = attempt("the pictures", partial(write_pictures, folder, findings, found)) or []
    left_out = [f"Left out: {'; '.join(failures)}."] if failures else []
    summary = {
        "study": plan.page,
        "name": plan.name,
        "question": plan.question.strip(),
        "command": plan.command,
        "settings": findings.settings,
        "figures": figures,
        "pictures": [shown | {"caption": words(shown["caption"])} for shown in drawn],
        "tables": [
            {"file": f"{n}.csv", "caption": text} for n, (_, text) in findings.tables.items()
        ],
        "dataset": found.data.name,
        "answer": "\n\n".join([answer, *left_out]),
        **result,
        "rows": records(findings.table),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "dataset_digest": found.data.digest,
        "experiment_id": experiment_id,
        "tracking_uri": without_secrets(found.store.uri),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    report.build(folder)
    if failures:
        raise SummaryError(
            f"everything is trained and recorded, but {'; '.join(failures)}; the rest is in "
            f"{folder}, and the same command tries again"
        )
    return Outcome(plan, findings.table, answer, folder, experiment_id, failed, **result)


def _draw(draw: Callable[[], Figure], file: Path, words: Callable[[str], str]) -> bool:
    figure = draw()
    for text in figure.findobj(Text):
        text.set_text(words(text.get_text()))
    figure.savefig(file, dpi=150)
    return True


def log_summary(outcome: Outcome, findings: Findings, found: Ended, run: RunLog) -> None:
    """Write the summary run: answer and table as description, files, and the best run's model."""
    store, best = found.store, findings.best
    # First: a study whose summary is complete is not summarized again.
    axes = findings.ranking.keys if findings.ranking else ()
    columns = [*axes, found.plan.objective, *VIEWED, *outcome.table.columns]
    save_view(store, outcome.experiment_id, found.plan.name, columns, best["run_id"])
    log.info("writing the summary to MLflow, with the best run's model")
    run.dataset(found.data)
    table = tables.markdown(tables.cells(outcome.table))
    warned = (f"Warning: {text}" for text in outcome.warnings)
    answer = tables.unmarked("\n\n".join([*outcome.verdict, *warned, outcome.answer]))
    run.tag(NOTE, f"**{found.plan.question.strip()}**\n\n{answer}\n\n{table}\n")
    run.folder(outcome.folder)
    # Named as in the runs, so that they share columns and charts.
    logged = {k.removeprefix("test/"): k for k in store.run(best["run_id"]).metrics}
    named = {logged.get(name, name): value for name, value in findings.shown.items()}
    loaded = load_run(best["run_id"], store.uri)
    run.metrics(named, loaded.config.epochs)
    run.model(loaded.config, loaded.model)


def differing(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for each of code, versions and device in which compared runs differ."""
    sentences = []
    for part, (kind, name) in MADE_WITH.items():
        counts = Counter(filter(None, (getattr(run, kind).get(name) for run in runs)))
        if len(counts) > 1:
            each = "; ".join(f"{count} with {made}" for made, count in counts.most_common())
            sentences.append(f"The compared runs differ in their {part} ({each}).")
    return sentences


def failed_metrics(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for each error by which registered metrics failed."""
    counts = Counter(run.tags[FAILED] for run in runs if FAILED in run.tags)
    of = counted(len(runs), "run")
    return [f"Metrics failed in {n} of {of}: {why}." for why, n in counts.items()]


def compare_points(study: Study, found: Ended) -> Findings:
    """Return the results of a grid of points."""
    axes, diverged = study.columns, [run for run in found.runs if run.status == "FAILED"]
    every = study.prepare(frames.tidy([*found.finished, *diverged]))
    frame, lost = every[: len(found.finished)], every[len(found.finished) :][axes]
    refit = min(found.plan.refit, len(found.data.test))
    frame = _refitted(frame, found, refit) if refit else frame
    # A point of which a seed diverged is not ranked.
    ranked = frame[~frame.set_index(axes).index.isin(lost.set_index(axes).index)]
    columns = dict.fromkeys([*study.table, *(answers.REFITTED, answers.GAP), *registry.METRICS])
    by = study.ranking if _has(ranked, study.ranking) else study.objective
    if not _has(ranked, by):
        why = f"a seed of every one diverged or has no {by}"
        raise UserError(f"study {found.plan.name!r} has no point to rank: {why}")
    table = frames.along_axis(frame, axes, [m for m in columns if m in frame])
    ranking = rank(study.compared(ranked), axes, by)
    given = _given(study, found, frame)
    as_given = given if study.group else {k: v[study.axis.name] for k, v in given.items()}
    best_runs = _runs_of(ranked, axes, ranking.best).dropna(subset=[by])
    best = _median(best_runs, by, study.objective)
    same = frame if not study.group else frame[frame[study.group] == best[study.group]]
    shown = [_median(runs, by, study.objective) for _, runs in same.groupby(axes, sort=False)]
    histories = histories_of(found, frame, by)
    of_best = histories[histories["run_id"].isin(best_runs["run_id"])]
    epochs = 0 if "epochs" in axes else study.epochs(found.plan.source)
    warned = answers.warnings(
        best_runs, by, of_best, epochs, likelihood="neg_log_likelihood" in study.table
    )
    along = {name: _along(given, given[ranking.best], name) for name in axes}
    warned += filter(None, map(answers.at_an_end, along, along.values()))
    improving = epochs and answers.still_improving(of_best, by)
    more = max(2 * int(best["epochs"]), epochs) if improving else 0
    vary = partial(found.plan.vary, found.plan.name, **_grown(study, found, given))
    following, next_command = answers.next_step(vary, ranking, along[study.axis.name], more)
    configs = [json.loads(config.to_json()) for config in found.plan.configs]
    shared = {k: v for k, v in configs[0].items() if all(c[k] == v for c in configs)}
    named = "; ".join(f"{run.name} {run.tags.get('reason', '')}" for run in diverged)
    notes = [answers.decoders(ranked, ranking, refit), answers.to_quote(best_runs, ranking)]
    notes += [f"Diverged and not ranked, {len(diverged)} in number: {named}."] * bool(diverged)
    compared, drawn = _differences(study, frame, ranking), frame.map(plots.plain_text)
    curves = partial(plots.learning_curves, histories, drawn, study.axis.name, study.group, by)
    return Findings(
        table=table,
        answer=lambda: "\n\n".join([study.answer(ranked), *filter(None, notes)]).strip(),
        frame=frame,
        tables={"table": (table, TABLE_CAPTION), "differences": compared},
        figures={
            **{name: (partial(draw, drawn), text) for name, (draw, text) in study.figures.items()},
            "learning_curves": (curves, plots.CURVES_CAPTION),
        },
        models={run["name"].rpartition(" seed=")[0]: run["run_id"] for run in shown},
        best=best,
        shown={m: float(best[m]) for m in columns if m in best and best[m] == best[m]},
        settings={
            **found.plan.source.settings,
            "values": list(dict.fromkeys(frame[study.axis.name].tolist())),
            "seeds": int(frame["seed"].nunique()),
            **{k: v for k, v in shared.items() if k != "seed"},
        },
        ranking=ranking,
        verdict=answers.verdict(ranking, following),
        warnings=warned,
        next_command=next_command,
        best_value=as_given[ranking.best],
        not_distinguishable=[as_given[value] for value in ranking.not_distinguishable],
        groups=_groups(study, ranked, by, given),
        best_row=int(_runs_of(table, axes, ranking.best).index[0]),
    )


def _has(frame: pd.DataFrame, metric: str) -> bool:
    return metric in frame and bool(frame[metric].notna().any())


def _runs_of(frame: pd.DataFrame, axes: list[str], value: Any) -> pd.DataFrame:  # noqa: ANN401
    wanted = value if len(axes) > 1 else (value,)
    return frame[np.logical_and.reduce([frame[a] == v for a, v in zip(axes, wanted, strict=True)])]


def _median(runs: pd.DataFrame, metric: str, other: str) -> pd.Series:
    metric = other if runs[metric].isna().all() else metric
    runs = runs.dropna(subset=[metric]).sort_values([metric, "seed"])
    return runs.iloc[(len(runs) - 1) // 2]


def histories_of(found: Ended, frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return a metric of finished runs by epoch, without the further value of kept weights."""
    rows = pd.DataFrame(found.store.histories([*frame["run_id"]], metric), columns=Epoch._fields)
    kept = frame[["run_id"]][frame.get("keep", frame["run_id"]) == "best"]
    return rows[rows["run_id"].duplicated(keep="last") | ~rows["run_id"].isin(kept["run_id"])]


def _given(study: Study, found: Ended, frame: pd.DataFrame) -> dict[Any, dict[str, Any]]:
    """Return each value of a frame -> its columns, as JSON of what the user gave."""
    cells = {key: trial.user_attrs[CELL] for trial in found.trials for key in keys(trial)}
    given, axis = dict[Any, dict[str, Any]](), study.axis.name
    for run, row in zip(found.finished, frame.to_dict("records"), strict=True):
        tried_out = {"group": row.get(study.group), "value": row[axis]}  # has no trial
        cell = cells.get(run.key, tried_out)
        name = study.group_values.get(cell["group"], cell["group"])
        group = {study.group: name} if study.group else {}
        point = (row[study.group], row[axis]) if group else row[axis]
        given[point] = group | {axis: cell["value"]}
    return given


def _along(given: Mapping[Any, Mapping[str, Any]], best: Mapping[str, Any], name: str) -> list[Any]:
    """Return the values of a column that go with the best of all others, the best first."""
    same = [v for v in given.values() if all(v[k] == best[k] for k in best if k != name)]
    return [best[name], *(value[name] for value in same if value != best)]


def _grown(study: Study, found: Ended, given: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    """Return all values as an option, if the study has more of them than its plan."""
    assert isinstance(found.plan.proposer, Listed)
    planned = [cell.identity["value"] for cell in found.plan.proposer.cells]
    of_runs = [value[study.axis.name] for value in given.values()]
    every = json.loads(json.dumps([*planned, *of_runs]))  # a tuple is a list, as in a stored trial
    unique = [value for place, value in enumerate(every) if value not in every[:place]]
    return {"values": unique} if unique[-1] not in every[: len(planned)] else {}


def _groups(
    study: Study, ranked: pd.DataFrame, metric: str, given: Mapping[Any, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    found, axis = dict[str, dict[str, Any]](), study.axis.name
    for group, part in ranked.groupby(study.group, sort=False) if study.group else ():
        if _has(part, metric):
            of = rank(part, axis, metric)
            best, *equal = (given[group, v][axis] for v in (of.best, *of.not_distinguishable))
            found[str(group)] = {"best": best, "not_distinguishable": equal}
    return found


def _refitted(frame: pd.DataFrame, found: Ended, images: int) -> pd.DataFrame:
    log.info("refitting the posteriors of %d runs to %d test images", len(frame), images)
    rows = list[dict[str, float]]()
    with one_thread():  # several wait for each other on tensors this small
        for run_id in frame["run_id"]:
            loaded = load_run(run_id, found.store.uri)
            rows.append(amortization_gap(loaded.config, loaded.model, found.data, images=images))
    return frame.assign(**pd.DataFrame(rows, frame.index, columns=[answers.REFITTED, answers.GAP]))


def _differences(study: Study, frame: pd.DataFrame, ranking: Ranking) -> tuple[pd.DataFrame, str]:
    axes = study.columns
    reference = frame[frame[study.axis.name] == study.reference]
    if reference.empty:
        reference = _runs_of(frame, axes, ranking.best)
    compared = [metric for metric in study.table if metric in COMPARED and metric in frame]
    name = reference["name"].iloc[0].rpartition(" seed=")[0]
    caption = f"Difference from {name}. {comparisons.CAPTION}"
    return frames.differences(frame, axes, reference, compared), caption


def write_pictures(folder: Path, findings: Findings, found: Ended) -> list[dict[str, Any]]:
    """Draw models side by side, and one of them in detail; return files, captions and rows."""
    if not findings.models:
        return []
    log.info("drawing pictures of the models")
    data, uri, best = found.data, found.store.uri, findings.best
    seeds = findings.ranking.seeds if findings.ranking else 1
    median = f", the median seed of {seeds}" * (seeds > 1)
    models = {label: load_run(run, uri).model for label, run in findings.models.items()}
    labels, stack = [*models], [*models.values()]
    written = []

    def write(name: str, picture: np.ndarray, caption: str, *rows: str) -> None:
        file = f"pictures/{name}.png"
        Image.fromarray(picture).save(folder / file)
        written.append({"file": file, "caption": caption} | ({"rows": rows} if rows else {}))

    if data.is_image:
        detailed = load_run(best["run_id"], uri).model
        of, each = f"{best['name']}{median}", median and f"{median} of each setting"
        shown = f"Test images (top row) and reconstructions from the posterior mean{each}."
        picture = pictures.reconstructions(stack, data.test)
        write("reconstructions", picture, shown, "test images", *labels)
        shown = f"Decoder means of z drawn from the prior N(0, I){each}."
        write("prior_samples", pictures.sample_rows(stack), shown, *labels)
        shown = f"{of}: a latent a row from -3 to 3, largest KL first, others 0."
        write("traversals", pictures.traversals(detailed, data), shown)
        shown = f"{of}: lines between posterior means of pairs of test images."
        write("interpolations", pictures.interpolations(detailed, data.test), shown)
    part = data.test.head(1000)
    classes = [data.class_name(label) if data.classes else "" for label in part.labels.tolist()]
    planes = []
    for label, model in models.items():
        x, y = probes.latent_plane(model, part).T
        planes.append(pd.DataFrame({"model": label, "x": x, "y": y, "class": classes}))
    plots.latent_scatter(pd.concat(planes)).savefig(folder / "pictures/latents.png", dpi=130)
    shown = f"Posterior means of {len(classes)} test images: both latents of two, the first two "
    shown += (
        "principal components of more. A panel shows 3 standard deviations of the prior each way, "
    )
    shown += "so that collapsed latents are a point, or as many as its title has."
    return [*written, {"file": "pictures/latents.png", "caption": shown}]
