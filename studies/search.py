"""Which configuration has the best ELBO when everything is searched at once?

KL weight, KL normalisation, latent size, learning rate, KL warm-up and its cycles, free bits and
decoder variance together, by Optuna's TPE on validation neg_elbo, or on (rate, mse) with its Pareto
front. The best configuration is trained
again with fresh seeds, since the search's own number for it is the luckiest of many.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from analysis import frames, plots, tables
from harness.config import RunConfig, UserError
from studies import conditions
from studies.runner.answers import calibration, plus_minus
from studies.runner.cli import clear_errors, execute, read
from studies.runner.options import Common, at_least
from studies.runner.proposers import TPE, Cell, Listed, Pruner, Range, Space, repeated
from studies.runner.study import Plan, Source, check_likelihood, command, source

if TYPE_CHECKING:
    import optuna
    import pandas as pd

    from harness.data.dataset import Dataset
    from studies.runner.summary import Ended, Findings

NAME = "search"

BASE = RunConfig()

CONFIRMING = 3
"""Fresh seeds with which the best configuration is trained again."""

TOP = 10
"""Configurations in the table."""

METRICS = ["val/neg_elbo", "best/val/neg_elbo", "best/epoch", "val/mse", "val/rate"]

REPORTED = [
    *("val/neg_elbo", "best/val/neg_elbo", "best/epoch", "neg_elbo", "mse", "rate"),
    *("decoder_variance", "calibration_ratio", "active_units"),
]
"""Metrics of the configurations that are trained again; test data, unless the name says other."""

CONFIRMED_CAPTION = (
    "The best configuration and the default one with fresh seeds: mean and 95 % t interval; val/ "
    "on validation data, all else on test data. best/epoch is the epoch in which validation was "
    "best, best/val/ its value."
)


def space(epochs: int) -> Space:
    """Return what is tried.

    The weights hold the best one of every normalisation: near 0.02 for "pixels" of 8 x 8 digits,
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


def baseline(base: RunConfig, data: Source) -> RunConfig:
    """Return the default configuration with its calibrated KL weight.

    Where no weight sets the decoder's variance the loss is an exact ELBO at beta 1.
    """
    if conditions.sets_variance(base):
        return conditions.weighted(base, data.calibrated, data)
    return conditions.exact(base, data)


@dataclass(frozen=True)
class SearchOptions(Common):
    """What a user can set on the search's command line; a remedy that is set is not searched.

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


def make_plan(options: SearchOptions, own: Dataset | None = None) -> Plan:
    """Return the plan of a search, on the user's own images if given; all settings are checked."""
    at_least(1, trials=options.trials, seeds=options.seeds)
    if options.multi_objective and options.pruner not in (None, "none"):
        raise UserError(
            f"pruner={options.pruner!r}: two objectives have no order to prune by; leave it out "
            "or give --pruner none with --multi-objective"
        )
    pruner: Pruner = options.pruner or ("none" if options.multi_objective else "median")
    data = source(options.dataset, own)
    suffix = "-front" if options.multi_objective else ""
    name = options.named(f"{NAME}-{data.name}{suffix}")
    base = options.base(BASE, data.epochs)
    check_likelihood(base, f"the {NAME}")
    fixed = {*options.chosen(), *(["sigma"] if base.likelihood == "bernoulli" else [])}
    searched = {name: values for name, values in space(base.epochs).items() if name not in fixed}
    objectives = ("val/rate", "val/mse") if options.multi_objective else ("val/neg_elbo",)
    settings = {k: v for k, v in json.loads(base.to_json()).items() if k not in searched}
    del settings["seed"]
    settings |= {"space": {name: list(values) for name, values in searched.items()}}
    settings |= {"objectives": list(objectives), "seeds": options.seeds, "pruner": pruner}
    proposer = TPE(
        base, searched, options.seeds, options.trials, pruner, objectives,
        {**data.settings, **settings},
    )  # fmt: skip
    effective = replace(options, epochs=base.epochs, pruner=pruner)
    seeds = f"{options.seeds} seed{'s'[: options.seeds > 1]}"
    return Plan(
        page=NAME,
        question=__doc__ or "",
        name=name,
        source=data,
        configs=[base] * (options.trials * options.seeds + 2 * CONFIRMING),
        proposer=proposer,
        find=partial(find, proposer),
        words=command(NAME, data, effective),
        sentence=f"{options.trials} configurations of {', '.join(searched)}, {seeds} each, "
        f"{base.epochs} epochs, minimising {' and '.join(objectives)}, pruner {pruner}, then "
        f"{CONFIRMING} fresh seeds of the best",
        confirm=partial(confirm, proposer, baseline(base, data)),
    )


def confirm(proposer: TPE, default: RunConfig, study: optuna.Study) -> Listed:
    """Return the best configuration and the default one with seeds that the search has not seen."""
    best = proposer.best(study)
    seeds = range(proposer.seeds, proposer.seeds + CONFIRMING)
    wanted = {
        f"best, trial {best.number}": (best.number, proposer.configs(best)[0]),
        "default": (-1, default),
    }
    cells = list[Cell]()
    for label, (number, config) in wanted.items():
        identity = {"part": "confirmation", "label": label}
        params = {"trial": number, "part": "confirmation"}
        cells += repeated(label, identity, config, seeds, params)
    return Listed(cells, {})


# --- the answer ---------------------------------------------------------------------------------


def find(proposer: TPE, ended: Ended) -> Findings:
    """Return what a search found."""
    import pandas as pd

    from studies.runner.summary import Findings

    best = proposer.best(ended.study)
    front = [trial.number for trial in ended.study.best_trials]
    runs = frames.tidy_search(ended.runs)
    searched = runs[runs["part"] == "search"]
    trials = frames.by_trial(searched, list(proposer.space))
    trials = trials.assign(front=trials["trial"].isin(front))
    confirmed = runs[(runs["part"] == "confirmation") & ~runs["pruned"]]
    again = confirmed[confirmed["trial"] == best.number]
    default = confirmed[confirmed["trial"] == -1]
    if again.empty:
        raise UserError(
            f"trial {best.number} of {ended.plan.name!r}, the best, diverged with all of "
            f"{CONFIRMING} fresh seeds; search again with more --seeds and another --study-name"
        )
    named = {f"best, trial {best.number}": again, "default, calibrated weight": default}
    every = pd.concat([part.assign(configuration=name) for name, part in named.items()])
    table = frames.along_axis(every, "configuration", [m for m in REPORTED if m in every])
    importances = frames.importances(proposer.importances(ended.study))
    diverged = sum("diverged" in trial.user_attrs for trial in ended.trials)
    models = {
        name: part.sort_values("seed")["run_id"].iloc[0]
        for name, part in (("best", again), ("default", default))
        if not part.empty
    }
    figures: dict[str, tuple[Any, str]] = {
        "history": (
            lambda: plots.search_history(trials),
            "Validation neg_elbo of each trial in the order asked, and the best so far. A pruned "
            "trial stands at its value when it was stopped.",
        ),
        "parameters": (
            lambda: plots.search_parameters(trials),
            "Validation neg_elbo against each searched setting, and against the decoder variance "
            "that weight, normalisation and latent size mean together.",
        ),
    }
    if not importances.empty:
        figures["importances"] = (
            lambda: plots.search_importances(importances),
            "Share of the variation of ranks that each setting explains, alone and together with "
            "others (fANOVA), over finished trials only.",
        )
    if len(proposer.objectives) > 1:
        figures["front"] = (
            lambda: plots.search_front(trials),
            "Rate and mse of all trials on validation data; no trial beats those of the front in "
            "both. Numbers are trials; points close to a numbered one have none.",
        )
    top = _top(searched, trials, list(proposer.space))
    chosen = again.loc[again["val/neg_elbo"].idxmin()]
    return Findings(
        table=top,
        answer=lambda: "\n\n".join(
            filter(
                None,
                [
                    _best(proposer, trials, again, default, table, best.number, diverged),
                    _what_mattered(importances, trials),
                    _front(trials) if len(proposer.objectives) > 1 else "",
                ],
            )
        ),
        frame=runs,
        tables={
            "table": (top, f"The {TOP} best trials of the search."),
            "confirmed": (table, CONFIRMED_CAPTION),
        },
        figures=figures,
        models=models,
        closer="best",
        best=chosen,
        shown={name: float(again[name].mean()) for name in REPORTED if name in again},
        settings={
            **proposer.settings,
            "trials": len(trials) + diverged,
            "best_trial": best.number,
        },
        seed=proposer.seeds,
    )


def _top(runs: pd.DataFrame, trials: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    finished = runs[~runs["pruned"]]
    metrics = [name for name in (*METRICS, "val/active_units") if name in finished]
    means = frames.along_axis(finished, "trial", metrics)
    table = trials[["trial", *settings, "decoder_variance"]].merge(means, on="trial")
    return table.sort_values("val/neg_elbo").head(TOP).reset_index(drop=True)


def _best(
    proposer: TPE,
    trials: pd.DataFrame,
    again: pd.DataFrame,
    default: pd.DataFrame,
    table: pd.DataFrame,
    number: int,
    diverged: int,
) -> str:
    """Return which trial is best, and how good it is beyond the luck of the search."""
    best, row, seeds = again.iloc[0], table.iloc[0], len(again)
    searched = trials.set_index("trial").loc[number]
    settings = ", ".join(f"{name} = {tables.plain(best[name])}" for name in proposer.space)
    finished = int((~trials["pruned"]).sum())
    count = f"{len(trials) + diverged} configurations ({finished} finished"
    count += f", {len(trials) - finished} pruned, {diverged} diverged)"
    fresh = f"{seeds} fresh seeds" if seeds > 1 else "1 fresh seed"
    return (
        f"Of {count} trial {number} is best: {settings}. "
        f"{calibration(row)}{row['active_units']:.1f} of {best['latent_size']} "
        "latents are active.\n\n"
        f"Trained again with {fresh} it has test neg_elbo {plus_minus(row, 'neg_elbo')} nats / "
        f"image (validation {plus_minus(row, 'val/neg_elbo')}; mean and 95 % interval). The "
        f"search's own validation number for it, {searched['val/neg_elbo']:.2f}, is the best of "
        "many and took part in the choice. " + _against_default(again, default, table)
    )


def _against_default(again: pd.DataFrame, default: pd.DataFrame, table: pd.DataFrame) -> str:
    if default.empty:
        return "The default configuration diverged with every fresh seed."
    weight = default["kl_weight"].iloc[0]
    gap = frames.paired_difference(again, default, "neg_elbo")
    mse = frames.paired_difference(again, default, "mse")
    return (
        f"The default configuration at its calibrated weight {weight:.3g} has "
        f"{plus_minus(table.iloc[1], 'neg_elbo')} with the same seeds; paired, the search changes "
        f"test neg_elbo by {gap} nats / image and mse by {mse} pixel²."
    )


def _what_mattered(importances: pd.DataFrame, trials: pd.DataFrame) -> str:
    sentences = []
    for objective, part in importances.groupby("objective", sort=False):
        ordered = part.sort_values("share", ascending=False)
        shares = zip(ordered["setting"], ordered["share"], strict=True)
        listed = ", ".join(f"{setting} {share:.2f}" for setting, share in shares)
        sentences.append(
            f"What mattered for {objective}, by share of the variation of ranks: {listed}."
        )
    if not sentences:
        return ""
    finished = int((~trials["pruned"]).sum())
    sentences.append(
        f"(From {finished} finished trials, which TPE does not spread evenly, so rough. A weight "
        "means nothing without its normalisation: their shares belong together.)"
    )
    return " ".join(sentences)


def _front(trials: pd.DataFrame) -> str:
    front = trials[trials["front"]]
    return (
        f"{len(front)} trials are on the Pareto front, from rate {front['val/rate'].min():.3g} "
        f"nats / image at mse {front['val/mse'].max():.4f} to {front['val/rate'].max():.3g} at "
        f"{front['val/mse'].min():.4f}; the best by neg_elbo is the one of them confirmed here."
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run the search from the command line; bad input ends it with one line and exit code 2."""
    with clear_errors(args) as terminal:
        options = read(SearchOptions, NAME, __doc__ or "", args)
        execute(partial(make_plan, options), options, terminal)


if __name__ == "__main__":
    main()
