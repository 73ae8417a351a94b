"""How a ledger is checked: train what has no finished run yet, judge every claim, write it down."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import pandas as pd

import harness
from harness.config import RunConfig, UserError, checked_name
from harness.training.engine import STACK_WIDTH, resolve_device, together
from studies.claims import (
    FAIL,
    NOT_RUN,
    PASS,
    Reproduction,
    Row,
    count,
    judge,
    required,
)
from studies.evidence import Evidence
from studies.gallery import draw_models
from studies.place import Place
from studies.runner.options import first_unused
from studies.runs import Runs
from studies.stack import Planned, forget_all, keep, train_stack
from studies.summary import (
    Outcome,
    describe,
    log_summary,
    make_folder,
    save_figures,
    write_summary,
)

if TYPE_CHECKING:
    from harness.data.dataset import Dataset
    from studies.runner.options import ReproduceOptions
    from studies.runner.terminal import Terminal


COLUMNS = (
    *("latent_size", "head", "kl_weight", "val/neg_elbo", "loss", "mse", "rate"),
    "active_units",
)
"""Of the view of a ledger's runs in MLflow."""


@dataclass(frozen=True)
class Check:
    """A ledger being checked on a dataset.

    Attributes:
        page: the ledger and its presentation.
        name: tag of its runs in MLflow.
        place: data, device and tracking.
    """

    page: Reproduction
    name: str
    place: Place

    def evidence(self) -> Evidence:
        """Return what has ended so far."""
        mine = f"tags.study = '{self.name}' and tags.role = 'run'"
        runs = harness.tracking.read_runs(self.place.store, self.experiment, mine)
        done = [run for run in runs if run["status"] == "FINISHED"]
        lost = [run for run in runs if harness.ledger.has_diverged(run)]
        return Evidence(self.place.data, self.place.store, done, lost)

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment."""
        return f"{self.page.name}-{self.place.data.name}"

    def planned(self, runs: Runs, config: RunConfig) -> Planned:
        """Return what `stack.train_stack` needs of a run."""
        tags = {
            "study": self.name,
            "role": "run",
            "trial": runs.label,
            "configuration": runs.label,
            "seed_group": f"{self.name}/{runs.label}",
        }
        return config, {}, tags

    @property
    def settings(self) -> dict[str, Any]:
        """What was checked, for people."""
        wanted = self.page.trained_on(self.place.device)
        listed = [f"{runs.label} ({runs.seeds} seeds)" for runs in wanted]
        return {"dataset": self.place.data.name, "full": self.page.full, "runs": listed}


def run(
    page: Reproduction, data: Dataset, options: ReproduceOptions, console: Terminal
) -> tuple[list[Row], Outcome]:
    """Train what is missing, judge every claim and record the ledger.

    Raises:
        UserError: the tracking store cannot be used, or another process is checking this ledger.
    """
    check = open_check(page, data, options)
    train_missing(check, console)
    evidence = check.evidence()
    rows = judge(page.ledger, evidence)
    return rows, summarize(check, rows, evidence)


def open_check(page: Reproduction, data: Dataset, options: ReproduceOptions) -> Check:
    """Open the experiment of a ledger, and close what dead processes left open in it.

    Raises:
        UserError: as `run`.
    """
    store = harness.tracking.connect(options.tracking_uri)
    store.check_home()
    device = resolve_device(options.device).type
    experiment = f"{page.name}-{data.name}"
    experiment_id = harness.tracking.open_experiment(store, experiment, page.question)
    name = checked_name(options.study_name or experiment)
    if options.fresh:
        runs = harness.tracking.read_runs(store, experiment)
        name = first_unused(name, {found["tags"].get("study") for found in runs})
    harness.ledger.bury_open_runs(store, experiment, name)
    kept = keep(store, name, options.checkpoint_every)
    quiet = lambda record: None  # noqa: E731
    return Check(page, name, Place(None, data, device, store, experiment_id, quiet, kept))


def train_missing(check: Check, console: Terminal) -> None:
    """Train the runs that have not finished, as many together as a stack takes."""
    evidence, place = check.evidence(), check.place
    missing = [
        (runs, config)
        for runs in check.page.trained_on(place.device)
        for config in evidence.untrained(runs)
    ]
    if not missing:
        console.out.print("Every run is finished already; nothing is trained again.")
    width = STACK_WIDTH[place.device]
    for rows in together([config for _, config in missing], width):
        stack = [missing[row] for row in rows]
        epochs = stack[0][1].epochs
        labels = "; ".join(label for label, _ in groupby(runs.label for runs, _ in stack))
        console.out.print(f"{len(stack)} runs of {epochs} epochs: {labels}")
        with console.progress(len(stack), len(stack), epochs) as on_epoch:
            planned = [check.planned(*run) for run in stack]
            train_stack(planned, replace(place, on_epoch=on_epoch))
            place.forget([config for config, *_ in planned])
    forget_all(place.store, check.name)


def ledger_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Return judged claims as text, a row each."""
    return pd.DataFrame(
        {
            "claim": row.claim.name,
            "reference": row.claim.reference,
            "obtained": row.obtained,
            "tolerance": row.claim.tolerance,
            "verdict": f"{row.verdict}: {row.note}" if row.note else row.verdict,
            "source": row.claim.source,
            "why this tolerance": row.claim.reason,
        }
        for row in rows
    )


def without_constants(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Take out the columns of words that say the same in every row; return them too."""
    wordy = ("source", "why this tolerance")
    same = {name: table[name].iloc[0] for name in wordy if table[name].nunique() == 1}
    return table.drop(columns=list(same)), same


def summarize(check: Check, rows: Sequence[Row], evidence: Evidence) -> Outcome:
    """Write the ledger, figures and pictures, and record them once for each result.

    Raises:
        UserError: no run finished.
    """
    page, place = check.page, check.place
    every = [runs for runs in required(page.ledger) if not evidence.unfinished(runs)]
    if not every:
        raise UserError(f"{page.name}: no configuration has all its runs; every one diverged")
    frame = pd.concat([evidence.frame(runs) for runs in every], ignore_index=True)
    folder = make_folder(place.store.home / "reports" / check.name)
    table = ledger_table(rows)
    answer = page.answer(rows, evidence)
    outcome = Outcome(table.iloc[:, :5], answer, folder, place.experiment_id)
    _write(outcome, check, rows, frame, evidence)
    settings = {**check.settings, "ledger": _digest(table)}
    if not _recorded(check, settings["ledger"]):
        best = frame.loc[frame["val/neg_elbo"].idxmin()]
        counts = {f"claims/{v.replace(' ', '_')}": count(rows, v) for v in (PASS, FAIL, NOT_RUN)}
        description = describe(page.question, outcome)
        log_summary(
            outcome,
            check.name,
            settings,
            description,
            best,
            counts,
            place.data,
            place.store,
            COLUMNS,
        )
    return outcome


def _write(
    outcome: Outcome, check: Check, rows: Sequence[Row], frame: pd.DataFrame, evidence: Evidence
) -> None:
    folder, page, place = outcome.folder, check.page, check.place
    frame.to_csv(folder / "runs.csv", index=False)
    listed = []
    for i, (heading, part) in enumerate(groupby(rows, key=lambda row: row.heading), 1):
        table, same = without_constants(ledger_table(list(part)))
        table.to_csv(folder / f"ledger-{i}.csv", index=False)
        caption = "".join(f" {name.capitalize()}: {value}." for name, value in same.items())
        listed.append({"file": f"ledger-{i}.csv", "caption": f"{heading}.{caption}"})
    there = [runs for runs in page.pictured if not evidence.unfinished(runs)]
    models = {runs.label: evidence.trained(runs)[0].model for runs in there}
    best = there[-1].label if there else ""
    drawn = {
        name: (draw(evidence), caption)
        for name, (draw, caption, runs) in page.figures.items()
        if not evidence.unfinished(runs)
    }
    write_summary(
        outcome,
        place.data,
        place.store,
        study=page.name,
        name=check.name,
        question=page.question.strip(),
        command=command(check),
        settings=check.settings,
        figures=save_figures(folder, drawn),
        pictures=draw_models(folder, models, best, place.data) if models else [],
        tables=listed,
    )


def command(check: Check) -> str:
    """Return the command line that repeats the check."""
    full = " --full" if check.page.full else ""
    return f"python -m studies.{check.page.name}{full} --study-name {check.name}"


def _digest(table: pd.DataFrame) -> str:
    """Return a key of what a ledger says, so that a ledger that says something new is recorded."""
    return hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()[:16]


def _recorded(check: Check, ledger: str) -> bool:
    mine = f"tags.study = '{check.name}' and tags.role = 'summary' and status = 'FINISHED'"
    runs = harness.tracking.read_runs(check.place.store, check.experiment, mine)
    return ledger in [run["params"].get("ledger") for run in runs]
