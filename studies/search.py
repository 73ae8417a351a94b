"""Which configuration has the best ELBO when everything is searched at once?

KL weight, KL normalisation, latent size, learning rate, KL warm-up and its cycles, free bits and
decoder variance together, by Optuna's TPE on validation neg_elbo, or on (rate, mse) with its Pareto
front. The best configuration is trained again with fresh seeds, since the search's own number for
it is the luckiest of many.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from analysis import frames, plots, tables
from harness import registry
from harness.config import RunConfig, UserError
from studies.runner.cli import clear_errors, execute, read
from studies.runner.options import Common, at_least, setting_options, start_words
from studies.runner.proposers import SELECTION, TPE, Cell, Listed, Pruner, Range, Space, repeated
from studies.runner.study import Plan, calibrated, check_objective, command, parts, source

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from harness.data.dataset import Dataset
    from studies.runner.summary import Ended, Findings

NAME, BASE = "search", RunConfig()

CONFIRMING = 3  # fresh seeds with which the best configuration is trained again
DEFAULT = -1  # parameter `trial` of the runs of the default configuration
TOP = 10  # configurations in the table

# Metrics of the trials, and further ones of the configurations that are trained again.
TRIED = ["val/neg_elbo", "best/val/neg_elbo", "best/epoch", "val/mse", "val/rate"]
CONFIRMED = ["neg_elbo", "mse", "rate", "decoder_variance", "calibration_ratio", "active_units"]

CAPTIONS = {
    "history": "Validation neg_elbo of each trial, of pruned ones at their end, and the best.",
    "parameters": "Validation neg_elbo against each searched setting, and the decoder variance.",
    "importances": "Share of the variation of ranks that each setting explains, alone and together "
    "with others (fANOVA), over finished trials only.",
    "front": "Rate and mse on validation data; no trial beats those of the front in both.",
}


def space(epochs: int) -> Space:
    """Return the values that are tried; a first warm-up ends before trials are judged.

    The weights include the best one of every normalisation: near 0.02 for "pixels" of 8 x 8 digits,
    1e-5 for "sum", 1e-6 for "sum" of 28 x 28 images; and 1, where the decoder variance is optimal
    or learned.
    """
    return {
        "kl_weight": Range(1e-7, 1.0, log=True),
        "kl_normalization": ("pixels", "batch", "latent", "sum"),
        "latent_size": Range(2, 64, log=True),
        "learning_rate": Range(1e-4, 1e-2, log=True),
        "kl_warmup_epochs": Range(0, max(1, epochs // 3)),
        "kl_cycles": Range(1, min(3, epochs)),
        "free_bits": Range(0.0, 0.5),
        "sigma": ("fixed", "optimal", "learned"),
    }


@dataclass(frozen=True)
class SearchOptions(Common):
    """Options of the search's command line; a setting that is given is not searched.

    Attributes:
        trials: configurations in all; a finished search goes on if there are more.
        seeds: runs of every configuration; its objective is their mean.
        pruner: how bad configurations are stopped early (median; none with --multi-objective).
        multi_objective: minimise rate and mse together instead of neg_elbo.
    """

    trials: int = 60
    seeds: int = 1
    pruner: Pruner | None = None
    multi_objective: bool = False


def make_plan(options: SearchOptions, own: Dataset | None = None) -> Plan:
    """Return the plan of a search, on the user's own data if given; all settings are checked."""
    at_least(1, trials=options.trials, seeds=options.seeds)
    if options.multi_objective and options.pruner not in (None, "none"):
        raise UserError(
            f"pruner={options.pruner!r}: two objectives have no order to prune by; give "
            "--pruner none with --multi-objective"
        )
    pruner: Pruner = options.pruner or ("none" if options.multi_objective else "median")
    data = source(options.dataset, own)
    base = options.base(BASE, data.epochs)
    check_objective(f"the {NAME}", base, SELECTION, own)
    fixed = {*options.settings, *([] if base.has_scale else ["sigma"])}
    searched = {name: values for name, values in space(base.epochs).items() if name not in fixed}
    if not searched:
        raise UserError("every setting that the search varies is given; leave at least one out")
    objectives = ("val/rate", "val/mse") if options.multi_objective else (SELECTION,)
    left_out = {*searched, "seed"}
    settings = {k: v for k, v in json.loads(base.to_json()).items() if k not in left_out}
    settings |= {"space": {name: list(values) for name, values in searched.items()}}
    settings |= {"objectives": list(objectives), "seeds": options.seeds, "pruner": pruner}
    settings = {**data.settings, **settings, **parts([base])}
    proposer = TPE(base, searched, options.seeds, options.trials, pruner, objectives, settings)
    return Plan(
        page=NAME,
        question=__doc__ or "",
        name=options.named(f"{NAME}-{data.name}{'-front' * options.multi_objective}"),
        source=data,
        configs=[base] * (options.trials * options.seeds + 2 * CONFIRMING),
        proposer=proposer,
        find=partial(find, proposer),
        start=start_words(NAME),
        words=command(start_words(NAME), data, replace(options, pruner=pruner), base),
        sentence=f"{options.trials} configurations of {', '.join(searched)}, seeds: "
        f"{options.seeds}, {base.epochs} epochs, minimising {' and '.join(objectives)}, pruner "
        f"{pruner}, then {CONFIRMING} fresh seeds of the best",
        confirm=partial(confirm, proposer, calibrated(base, data)),
    )


def confirm(proposer: TPE, default: RunConfig, study: optuna.Study) -> Listed:
    """Return runs of the best configuration and the default one with seeds not yet used."""
    best, part = best_of(study), "confirmation"
    compared = {f"best, trial {best.number}": (best.number, proposer.configs(best)[0])}
    compared["default"] = (DEFAULT, default)
    seeds = range(proposer.seeds, proposer.seeds + CONFIRMING)
    cells = list[Cell]()
    for label, (trial, config) in compared.items():
        identity, params = {"part": part, "label": label}, {"trial": trial, "part": part}
        cells += repeated(label, identity, config, seeds, params)
    return Listed(cells, {})


def best_of(study: optuna.Study) -> FrozenTrial:
    """Return the trial with the lowest validation neg_elbo, of the front if there is one."""
    if not _complete(study):
        raise UserError(f"search {study.study_name!r} has no finished trial: all diverged")
    return min(study.best_trials, key=lambda trial: trial.user_attrs[SELECTION])


def _importances(study: optuna.Study, objective: int) -> dict[str, float]:
    """Return the share of an objective's variation that each parameter explains.

    Variation of ranks over finished trials (fANOVA, Hutter et al. 2014), so that a few hopeless
    trials do not explain everything.
    """
    import optuna

    order = sorted(_complete(study), key=lambda trial: trial.values[objective])
    rank = {trial.number: float(place) for place, trial in enumerate(order)}
    return optuna.importance.get_param_importances(
        study,
        evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
        target=lambda trial: rank[trial.number],
    )


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]


def find(proposer: TPE, ended: Ended) -> Findings:
    """Return the findings of a search."""
    import pandas as pd

    from studies.runner.summary import TABLE_CAPTION, Findings

    study, objectives, number = ended.study, proposer.objectives, best_of(ended.study).number
    runs = frames.tidy_search(ended.runs)
    searched = runs[runs["part"] == "search"]
    trials = frames.by_trial(searched, list(proposer.space))
    trials = trials.assign(front=trials["trial"].isin([t.number for t in study.best_trials]))
    tried = TRIED + [f"val/{name}" for name in registry.METRICS if f"val/{name}" in runs]
    users = [name for name in registry.METRICS if name in runs]
    means = frames.along_axis(searched[~searched["pruned"]], "trial", tried)
    top = trials[["trial", *proposer.space, "decoder_variance"]].merge(means, on="trial")
    top = top.sort_values("val/neg_elbo").head(TOP).reset_index(drop=True)
    labels = {number: f"best, trial {number}", DEFAULT: "default, calibrated weight"}
    confirmed = runs[(runs["part"] == "confirmation") & ~runs["pruned"]]
    confirmed = confirmed.assign(configuration=confirmed["trial"].map(labels))
    confirmed = confirmed.sort_values("seed", kind="stable")
    again, default = (confirmed[confirmed["trial"] == trial] for trial in labels)
    if again.empty:
        raise UserError(
            f"trial {number}, the best, diverged with every fresh seed; search again with more "
            "--seeds and another --study-name"
        )
    table = frames.along_axis(confirmed, "configuration", tried + CONFIRMED + users)
    ranked = enumerate(objectives if len(_complete(study)) > 1 else ())
    shares = pd.DataFrame({name: _importances(study, i) for i, name in ranked})
    diverged = sum("diverged" in trial.user_attrs for trial in ended.trials)
    settings = ", ".join(f"{n} = {tables.plain(again.iloc[0][n])}" for n in proposer.space)
    each = [
        f"{tables.plus_minus(row, 'neg_elbo')} ({row['configuration']})"
        for _, row in table.iterrows()
    ]
    sentences = [
        f"Of {len(trials) + diverged} configurations ({trials['pruned'].sum()} pruned, {diverged} "
        f"diverged) trial {number} is best: {settings}.",
        f"Trained again with fresh seeds, test neg_elbo is {' and '.join(each)} nats / image; the "
        f"paired difference is {frames.paired_difference(again, default, 'neg_elbo')}.",
    ]
    figures = {
        "history": partial(plots.search_history, trials),
        "parameters": partial(plots.search_parameters, trials),
    }
    if not shares.empty:
        figures["importances"] = partial(plots.search_importances, shares)
    if len(objectives) > 1:
        figures["front"] = partial(plots.search_front, trials)
        sentences.append(f"{trials['front'].sum()} trials are on the front of rate and mse.")
    return Findings(
        table=top,
        answer=partial(" ".join, sentences),
        frame=runs,
        tables={
            "table": (top, f"The {TOP} best trials of the search."),
            "confirmed": (table, f"With fresh seeds. {TABLE_CAPTION}"),
        },
        figures={name: (draw, CAPTIONS[name]) for name, draw in figures.items()},
        models=confirmed.groupby("configuration", sort=False)["run_id"].first().to_dict(),
        best=again.loc[again["val/neg_elbo"].idxmin()],
        shown=again[tried + CONFIRMED + users].mean().to_dict(),
        settings={**proposer.settings, "trials": len(trials) + diverged, "best_trial": number},
    )


def parse(args: Sequence[str] | None = None) -> SearchOptions:
    """Return the options of the search from its command line; else UserError."""
    searched = dict.fromkeys(space(BASE.epochs), "searched, unless it is given")
    return read(SearchOptions, NAME, __doc__ or "", args, setting_options(BASE, searched))


def main(args: Sequence[str] | None = None) -> None:
    """Run the search from the command line; bad input ends it with one line and exit code 2."""
    with clear_errors(args) as terminal:
        options = parse(args)
        execute(partial(make_plan, options), options, terminal)


if __name__ == "__main__":
    main()
