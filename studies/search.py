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
from harness.config import RunConfig, UserError
from studies.runner.answers import calibration, plus_minus
from studies.runner.cli import clear_errors, execute, read
from studies.runner.options import Common, at_least, setting_options
from studies.runner.proposers import SELECTION, TPE, Cell, Listed, Pruner, Range, Space, repeated
from studies.runner.study import Plan, calibrated, check_objective, command, source

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    from optuna.trial import FrozenTrial

    from harness.data.dataset import Dataset
    from studies.runner.summary import Ended, Findings

NAME, BASE = "search", RunConfig()

CONFIRMING = 3
"""Fresh seeds with which the best configuration is trained again."""

DEFAULT = -1
"""Parameter `trial` of the runs of the default configuration."""

TOP = 10
"""Configurations in the table."""

METRICS = ["val/neg_elbo", "best/val/neg_elbo", "best/epoch", "val/mse", "val/rate"]

REPORTED = [
    *("val/neg_elbo", "best/val/neg_elbo", "best/epoch", "neg_elbo", "mse", "rate"),
    *("decoder_variance", "calibration_ratio", "active_units"),
]
"""Metrics of the configurations that are trained again."""

CONFIRMED_CAPTION = (
    "The best configuration and the default one with fresh seeds: mean and 95 % t interval; val/ "
    "on validation data, all else on test data. best/epoch is the epoch in which validation was "
    "best, best/val/ its value."
)

CAPTIONS = {
    "history": "Validation neg_elbo of each trial in the order asked, and the best so far. A "
    "pruned trial stands at its value when it was stopped.",
    "parameters": "Validation neg_elbo against each searched setting, and against the decoder "
    "variance that weight, normalisation and latent size mean together.",
    "importances": "Share of the variation of ranks that each setting explains, alone and together "
    "with others (fANOVA), over finished trials only.",
    "front": "Rate and mse of all trials on validation data; no trial beats those of the front in "
    "both. Numbers are trials; points close to a numbered one have none.",
}


def space(epochs: int) -> Space:
    """Return the values that are tried.

    The weights include the best one of every normalisation: near 0.02 for "pixels" of 8 x 8 digits,
    1e-5 for "sum", 1e-6 for "sum" of 28 x 28 images; and 1, where the decoder variance is optimal
    or learned. A first warm-up ends before trials are judged.
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
        seeds: runs of every configuration; its objective is their mean. One by default: runs
            are better spent on further configurations, since the best is trained again anyway.
        pruner: how unpromising configurations are stopped early (median; none with
            --multi-objective).
        multi_objective: minimise rate and mse together instead of neg_elbo.
    """

    trials: int = 60
    seeds: int = 1
    pruner: Pruner | None = None
    multi_objective: bool = False


def make_plan(options: SearchOptions, images: Dataset | None = None) -> Plan:
    """Return the plan of a search, on the user's images if given; all settings are checked."""
    at_least(1, trials=options.trials, seeds=options.seeds)
    if options.multi_objective and options.pruner not in (None, "none"):
        raise UserError(
            f"pruner={options.pruner!r}: two objectives have no order to prune by; leave it out "
            "or give --pruner none with --multi-objective"
        )
    pruner: Pruner = options.pruner or ("none" if options.multi_objective else "median")
    data = source(options.dataset, images)
    base = options.base(BASE, data.epochs)
    check_objective(f"the {NAME}", base)
    fixed = {*options.settings, *(["sigma"] if base.likelihood == "bernoulli" else [])}
    searched = {name: values for name, values in space(base.epochs).items() if name not in fixed}
    if not searched:
        raise UserError("every setting that the search varies is given; leave at least one out")
    objectives = ("val/rate", "val/mse") if options.multi_objective else (SELECTION,)
    settings = {k: v for k, v in json.loads(base.to_json()).items() if k not in searched}
    del settings["seed"]
    settings |= {"space": {name: list(values) for name, values in searched.items()}}
    settings |= {"objectives": list(objectives), "seeds": options.seeds, "pruner": pruner}
    proposer = TPE(
        base, searched, options.seeds, options.trials, pruner, objectives,
        {**data.settings, **settings},
    )  # fmt: skip
    seeds = f"{options.seeds} seed{'s'[: options.seeds > 1]}"
    return Plan(
        page=NAME,
        question=__doc__ or "",
        name=options.named(f"{NAME}-{data.name}{'-front' * options.multi_objective}"),
        source=data,
        configs=[base] * (options.trials * options.seeds + 2 * CONFIRMING),
        proposer=proposer,
        find=partial(find, proposer),
        words=command(NAME, data, replace(options, pruner=pruner), base),
        sentence=f"{options.trials} configurations of {', '.join(searched)}, {seeds} each, "
        f"{base.epochs} epochs, minimising {' and '.join(objectives)}, pruner {pruner}, then "
        f"{CONFIRMING} fresh seeds of the best",
        confirm=partial(confirm, proposer, calibrated(base, data)),
    )


def confirm(proposer: TPE, default: RunConfig, study: optuna.Study) -> Listed:
    """Return runs of the best configuration and the default one with seeds not yet used."""
    number, config = best_of(study).number, proposer.configs(best_of(study))[0]
    seeds = range(proposer.seeds, proposer.seeds + CONFIRMING)
    cells = list[Cell]()
    for label, trial, settings in (
        (f"best, trial {number}", number, config),
        ("default", DEFAULT, default),
    ):
        identity = {"part": "confirmation", "label": label}
        params = {"trial": trial, "part": "confirmation"}
        cells += repeated(label, identity, settings, seeds, params)
    return Listed(cells, {})


def best_of(study: optuna.Study) -> FrozenTrial:
    """Return the trial with the lowest validation neg_elbo, of the front if there is one."""
    if not _complete(study):
        raise UserError(
            f"search {study.study_name!r} has no finished trial: all diverged or were pruned"
        )
    return min(study.best_trials, key=lambda trial: trial.user_attrs[SELECTION])


def importances(study: optuna.Study, objective: int) -> dict[str, float]:
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


# --- the answer ---------------------------------------------------------------------------------


def find(proposer: TPE, ended: Ended) -> Findings:
    """Return the findings of a search."""
    import pandas as pd

    from studies.runner.summary import Findings

    study, objectives, number = ended.study, proposer.objectives, best_of(ended.study).number
    runs = frames.tidy_search(ended.runs)
    searched = runs[runs["part"] == "search"]
    trials = frames.by_trial(searched, list(proposer.space))
    trials = trials.assign(front=trials["trial"].isin([t.number for t in study.best_trials]))
    confirmed = runs[(runs["part"] == "confirmation") & ~runs["pruned"]]
    again, default = (confirmed[confirmed["trial"] == trial] for trial in (number, DEFAULT))
    if again.empty:
        raise UserError(
            f"trial {number} of {ended.plan.name!r}, the best, diverged with all of "
            f"{CONFIRMING} fresh seeds; search again with more --seeds and another --study-name"
        )
    named = {f"best, trial {number}": again, "default, calibrated weight": default}
    every = pd.concat([part.assign(configuration=name) for name, part in named.items()])
    table = frames.along_axis(every, "configuration", [m for m in REPORTED if m in every])
    ranked = enumerate(objectives if len(_complete(study)) > 1 else ())
    shares = frames.importances({name: importances(study, i) for i, name in ranked})
    figures = {
        "history": partial(plots.search_history, trials),
        "parameters": partial(plots.search_parameters, trials),
        **({} if shares.empty else {"importances": partial(plots.search_importances, shares)}),
        **({"front": partial(plots.search_front, trials)} if len(objectives) > 1 else {}),
    }
    diverged = sum("diverged" in trial.user_attrs for trial in ended.trials)
    top = _top(searched, trials, list(proposer.space))
    return Findings(
        table=top,
        answer=lambda: "\n\n".join(
            [
                _best(trials, again, list(proposer.space), diverged),
                _confirmed(trials, again, default, table),
                *([] if shares.empty else [_shares(shares, trials)]),
                *([_front(trials)] if len(objectives) > 1 else []),
            ]
        ),
        frame=runs,
        tables={
            "table": (top, f"The {TOP} best trials of the search."),
            "confirmed": (table, CONFIRMED_CAPTION),
        },
        figures={name: (draw, CAPTIONS[name]) for name, draw in figures.items()},
        models={
            name: part.sort_values("seed")["run_id"].iloc[0]
            for name, part in (("best", again), ("default", default))
            if not part.empty
        },
        best=again.loc[again["val/neg_elbo"].idxmin()],
        shown={name: float(again[name].mean()) for name in REPORTED if name in again},
        settings={**proposer.settings, "trials": len(trials) + diverged, "best_trial": number},
    )


def _top(runs: pd.DataFrame, trials: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    finished = runs[~runs["pruned"]]
    metrics = [name for name in (*METRICS, "val/active_units") if name in finished]
    means = frames.along_axis(finished, "trial", metrics)
    table = trials[["trial", *settings, "decoder_variance"]].merge(means, on="trial")
    return table.sort_values("val/neg_elbo").head(TOP).reset_index(drop=True)


def _best(trials: pd.DataFrame, again: pd.DataFrame, space: list[str], diverged: int) -> str:
    """Return which trial is best, its settings and its decoder variance."""
    best, finished = again.iloc[0], int((~trials["pruned"]).sum())
    means = again[["calibration_ratio", "decoder_variance", "active_units"]].mean()
    settings = ", ".join(f"{name} = {tables.plain(best[name])}" for name in space)
    return (
        f"Of {len(trials) + diverged} configurations ({finished} finished, {len(trials) - finished}"
        f" pruned, {diverged} diverged) trial {best['trial']} is best: {settings}. "
        f"{calibration(means)}{means['active_units']:.1f} of {best['latent_size']} latents are "
        "active."
    )


def _confirmed(
    trials: pd.DataFrame, again: pd.DataFrame, default: pd.DataFrame, table: pd.DataFrame
) -> str:
    """Return how good the best trial is with fresh seeds, beside the default."""
    row, searched = table.iloc[0], trials.set_index("trial").loc[again["trial"].iloc[0]]
    first = (
        f"Trained again with {len(again)} fresh seed{'s'[: len(again) > 1]} it has test neg_elbo "
        f"{plus_minus(row, 'neg_elbo')} nats / image (validation {plus_minus(row, 'val/neg_elbo')};"
        " mean and 95 % interval). The search's own validation number for it, "
        f"{searched['val/neg_elbo']:.2f}, is the best of many and took part in the choice."
    )
    if default.empty:
        return f"{first} The default configuration diverged with every fresh seed."
    gap, mse = (frames.paired_difference(again, default, m) for m in ("neg_elbo", "mse"))
    return (
        f"{first} The default configuration at its calibrated weight "
        f"{default['kl_weight'].iloc[0]:.3g} has {plus_minus(table.iloc[1], 'neg_elbo')} with the "
        f"same seeds; paired, the search changes test neg_elbo by {gap} nats / image and mse by "
        f"{mse} pixel²."
    )


def _shares(shares: pd.DataFrame, trials: pd.DataFrame) -> str:
    sentences = []
    for objective, part in shares.groupby("objective", sort=False):
        ordered = part.sort_values("share", ascending=False)
        listed = ", ".join(f"{row.setting} {row.share:.2f}" for row in ordered.itertuples())
        sentences.append(
            f"What mattered for {objective}, by share of the variation of ranks: {listed}."
        )
    return " ".join(sentences) + (
        f" (From {int((~trials['pruned']).sum())} finished trials, which TPE does not spread "
        "evenly, so rough. A weight means nothing without its normalisation: their shares belong "
        "together.)"
    )


def _front(trials: pd.DataFrame) -> str:
    front = trials[trials["front"]]
    return (
        f"{len(front)} trials are on the Pareto front, from rate {front['val/rate'].min():.3g} "
        f"nats / image at mse {front['val/mse'].max():.4f} to {front['val/rate'].max():.3g} at "
        f"{front['val/mse'].min():.4f}; the best by neg_elbo is the one of them confirmed here."
    )


def parse(args: Sequence[str] | None = None) -> SearchOptions:
    """Return the options of the search from its command line; else UserError."""
    searched = dict.fromkeys(space(BASE.epochs), "searched, unless it is given")
    settings = setting_options(BASE, searched)
    return read(SearchOptions, NAME, __doc__ or "", args, settings)


def main(args: Sequence[str] | None = None) -> None:
    """Run the search from the command line; bad input ends it with one line and exit code 2."""
    with clear_errors(args) as terminal:
        options = parse(args)
        execute(partial(make_plan, options), options, terminal)


if __name__ == "__main__":
    main()
