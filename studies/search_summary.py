"""The end of a search: its answer, tables, figures and pictures, in a folder and one run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

import harness
from analysis import frames, search_frames, tables
from harness.config import UserError
from harness.data.dataset import Dataset
from harness.places import without_password
from harness.tracking import Store
from studies.answers import calibration, plus_minus
from studies.findings import Findings
from studies.gallery import draw_models
from studies.search_options import CONFIRMING
from studies.summary import (
    Outcome,
    describe,
    log_summary,
    make_folder,
    save_figures,
    write_summary,
)

if TYPE_CHECKING:
    from studies.hunt import Hunt

TOP = 10
"""Configurations in the table."""

REPORTED = [
    *("val/neg_elbo", "best/val/neg_elbo", "best/epoch", "neg_elbo", "mse", "rate"),
    *("decoder_variance", "calibration_ratio", "active_units"),
]
"""Metrics of the configurations that are trained again; test data, unless the name says other."""


def summarize(hunt: Hunt, data: Dataset, store: Store, experiment_id: str) -> Outcome:
    """Answer a finished search's question and record the answer.

    Raises:
        UserError: the tracking store lacks runs of the search, or the best configuration
            diverges with every fresh seed.
    """
    plan, found = hunt.plan, find(hunt, store)
    folder = make_folder(store.home / "reports" / plan.name)
    outcome = Outcome(top(hunt, found), answer(hunt, found), folder, experiment_id)
    _write(outcome, hunt, found, data, store)
    if not _recorded(hunt, store):
        best = found.best.loc[found.best["val/neg_elbo"].idxmin()]
        shown = {name: float(found.best[name].mean()) for name in REPORTED if name in found.best}
        settings = {**plan.settings, **_progress(hunt), "best_trial": found.best_trial}
        description = describe(plan.search.question, outcome)
        log_summary(outcome, plan.name, settings, description, best, shown, data, store)
    return outcome


def find(hunt: Hunt, store: Store) -> Findings:
    """Collect what a search found.

    Raises:
        UserError: as `summarize`.
    """
    plan = hunt.plan
    runs = search_frames.load_search(plan.experiment, plan.name, store.uri)
    ended = hunt.trials("COMPLETE", "PRUNED")
    numbers = [trial.number for trial in ended]
    if not runs.empty:
        # A trial of a dead process was repeated under another number.
        runs = runs[(runs["part"] != "search") | runs["trial"].isin(numbers)]
    searched = runs[runs["part"] == "search"] if not runs.empty else runs
    if len(searched) < len(ended) * plan.seeds:
        raise UserError(
            f"search {plan.name!r} has {len(ended)} trials x {plan.seeds} seeds in Optuna but "
            f"{len(searched)} runs in {without_password(store.uri)}; name the store it was "
            "tracked in with --tracking-uri, or start anew with --fresh"
        )
    number = hunt.best().number
    confirmed = runs[(runs["part"] == "confirmation") & ~runs["pruned"]]
    best = confirmed[confirmed["trial"] == number]
    if best.empty:
        raise UserError(
            f"trial {number} of {plan.name!r}, the best, diverged with all of {CONFIRMING} fresh "
            "seeds; search again with --fresh and more --seeds"
        )
    front = [trial.number for trial in hunt.front()]
    trials = search_frames.by_trial(searched, list(plan.space))
    return Findings(
        trials.assign(front=trials["trial"].isin(front)),
        search_frames.importances(hunt.importances()),
        runs,
        best,
        confirmed[confirmed["trial"] == -1],
        len(hunt.diverged()),
        number,
    )


def top(hunt: Hunt, found: Findings) -> pd.DataFrame:
    """Return the best finished trials of the search, by validation neg_elbo."""
    metrics = ["val/neg_elbo", "best/val/neg_elbo", "best/epoch"]
    metrics += ["val/mse", "val/rate", "val/active_units"]
    settings = ["trial", *hunt.plan.space, "decoder_variance"]
    runs = found.runs[(found.runs["part"] == "search") & ~found.runs["pruned"]]
    means = frames.along_axis(runs, "trial", [m for m in metrics if m in runs])
    table = found.trials[settings].merge(means, on="trial")
    return table.sort_values("val/neg_elbo").head(TOP).reset_index(drop=True)


def confirmed_table(found: Findings) -> pd.DataFrame:
    """Return means and intervals of the best and the default configuration over fresh seeds."""
    named = pd.concat(
        [
            found.best.assign(configuration=f"best, trial {found.best_trial}"),
            found.default.assign(configuration="default, calibrated weight"),
        ]
    )
    return frames.along_axis(named, "configuration", [m for m in REPORTED if m in named])


def answer(hunt: Hunt, found: Findings) -> str:
    """Say what is best, how good it is beyond the luck of the search, and what mattered."""
    best, trials = found.best.iloc[0], found.trials
    own = trials.set_index("trial").loc[found.best_trial]
    rows = confirmed_table(found).iloc
    row, seeds = rows[0], len(found.best)
    settings = ", ".join(f"{name} = {_value(best[name])}" for name in hunt.plan.space)
    finished = int((~trials["pruned"]).sum())
    count = f"{len(trials) + found.diverged} configurations ({finished} finished"
    count += f", {len(trials) - finished} pruned, {found.diverged} diverged)"
    fresh = f"{seeds} fresh seeds" if seeds > 1 else "1 fresh seed"
    paragraphs = [
        f"Of {count} trial {found.best_trial} is best: {settings}. "
        f"{calibration(row)}{row['active_units']:.1f} of {best['latent_size']} "
        "latents are active.",
        f"Trained again with {fresh} it has test neg_elbo {plus_minus(row, 'neg_elbo')} nats / "
        f"image (validation {plus_minus(row, 'val/neg_elbo')}; mean and 95 % interval). The "
        f"search's own validation number for it, {own['val/neg_elbo']:.2f}, is the best of many "
        "and took part in the choice. " + _against_default(found),
        _what_mattered(found),
    ]
    if len(hunt.plan.objectives) > 1:
        paragraphs.append(_front(found))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _against_default(found: Findings) -> str:
    if found.default.empty:
        return "The default configuration diverged with every fresh seed."
    weight = found.default["kl_weight"].iloc[0]
    gap = frames.paired_difference(found.best, found.default, "neg_elbo")
    mse = frames.paired_difference(found.best, found.default, "mse")
    row = confirmed_table(found).iloc[1]
    return (
        f"The default configuration at its calibrated weight {weight:.3g} has "
        f"{plus_minus(row, 'neg_elbo')} with the same seeds; paired, the search changes test "
        f"neg_elbo by {gap} nats / image and mse by {mse} pixel²."
    )


def _what_mattered(found: Findings) -> str:
    said = []
    for objective, part in found.importances.groupby("objective", sort=False):
        ordered = part.sort_values("share", ascending=False)
        shares = zip(ordered["setting"], ordered["share"], strict=True)
        listed = ", ".join(f"{setting} {share:.2f}" for setting, share in shares)
        said.append(f"What mattered for {objective}, by share of the variation of ranks: {listed}.")
    if not said:
        return ""
    finished = int((~found.trials["pruned"]).sum())
    said.append(
        f"(From {finished} finished trials, which TPE does not spread evenly, so rough. A weight "
        "means nothing without its normalisation: their shares belong together.)"
    )
    return " ".join(said)


def _front(found: Findings) -> str:
    front = found.trials[found.trials["front"]]
    return (
        f"{len(front)} trials are on the Pareto front, from rate {front['val/rate'].min():.3g} "
        f"nats / image at mse {front['val/mse'].max():.4f} to {front['val/rate'].max():.3g} at "
        f"{front['val/mse'].min():.4f}; the best by neg_elbo is the one of them confirmed here."
    )


def _write(outcome: Outcome, hunt: Hunt, found: Findings, data: Dataset, store: Store) -> None:
    plan, folder = hunt.plan, outcome.folder
    found.runs.to_csv(folder / "runs.csv", index=False)
    tables.cells(outcome.table).to_csv(folder / "table.csv", index=False)
    tables.cells(confirmed_table(found)).to_csv(folder / "confirmed.csv", index=False)
    figures = {**plan.search.figures, **(plan.search.front if len(plan.objectives) > 1 else {})}
    if found.importances.empty:
        del figures["importances"]
    seed = plan.fresh_seeds.start
    models = {
        name: harness.load_run(part.sort_values("seed")["run_id"].iloc[0], store.uri).model
        for name, part in (("best", found.best), ("default", found.default))
        if not part.empty
    }
    write_summary(
        outcome,
        data,
        store,
        study=plan.search.name,
        name=plan.name,
        question=plan.search.question.strip(),
        command=plan.command(),
        settings={**plan.settings, **_progress(hunt)},
        figures=save_figures(folder, {k: (f(found), text) for k, (f, text) in figures.items()}),
        pictures=draw_models(folder, models, "best", data, seed),
        tables=[
            {"file": "table.csv", "caption": f"The {TOP} best trials of the search."},
            {"file": "confirmed.csv", "caption": CONFIRMED_CAPTION},
        ],
    )


CONFIRMED_CAPTION = (
    "The best configuration and the default one with fresh seeds: mean and 95 % t interval; val/ "
    "on validation data, all else on test data. best/epoch is the epoch in which validation was "
    "best, best/val/ its value."
)


def _progress(hunt: Hunt) -> dict[str, int]:
    """Return how far the search is; a summary is recorded anew when it went on."""
    return {"trials": len(hunt.trials("COMPLETE", "PRUNED")) + len(hunt.diverged())}


def _recorded(hunt: Hunt, store: Store) -> bool:
    plan = hunt.plan
    mine = f"tags.study = '{plan.name}' and tags.role = 'summary' and status = 'FINISHED'"
    runs = harness.tracking.read_runs(store, plan.experiment, mine)
    return str(_progress(hunt)["trials"]) in [run["params"].get("trials") for run in runs]
