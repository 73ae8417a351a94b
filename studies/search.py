"""Which configuration has the best ELBO when everything is searched at once?

Decoder variance, fixed (by the KL weight) or fitted, latent size, learning rate, KL warm-up and its
cycles and free bits together, by Optuna's TPE on validation neg_elbo, or on (rate, distortion) with
its Pareto front. The calibrated default is the first trial. It and the best other one are trained
again with fresh seeds, since the search's own number for its best is the luckiest of many.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from analysis import frames, plots, tables
from harness import registry
from harness.config import RunConfig, UserError, plain, whole
from studies.runner.cli import clear_errors, execute, read
from studies.runner.options import Common, arguments, setting_options, start_words
from studies.runner.proposers import (
    ACTIVE,
    BASELINE,
    SELECTION,
    TPE,
    Cell,
    Listed,
    Pruner,
    Range,
    Space,
    repeated,
)
from studies.runner.study import (
    TABLE,
    Plan,
    Source,
    calibrated,
    check_objective,
    command,
    parts,
    same_places,
    sets_variance,
    source,
    with_variance,
)
from studies.runner.terminal import counted

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    from matplotlib.figure import Figure
    from optuna.trial import FrozenTrial

    from harness.data.dataset import Dataset
    from studies.runner.summary import Ended, Findings

NAME, BASE = "search", RunConfig()

CONFIRMING = 3  # fresh seeds with which the best other trial and the default are trained again
DEFAULT = -1  # parameter `trial` of the fresh runs of the default configuration
TOP = 10  # configurations in the table

# Metrics of the trials.
TRIED = [SELECTION, "best/val/neg_elbo", "best/epoch", "val/mse", "val/rate", ACTIVE]

CAPTIONS = {
    "learning_curves": plots.CURVES_CAPTION,
    "history": "Validation neg_elbo of each trial, of pruned ones at their end, and the best.",
    "parameters": "Validation neg_elbo against each searched setting. The decoder variance is that "
    "of the KL weight, or fitted where sigma is not fixed.",
    "importances": "Share of the variation of ranks that each setting explains, alone and together "
    "with others (fANOVA), over finished trials only; without a decoder variance that only those "
    "with a fixed sigma have.",
    "front": "Rate and distortion on validation data, both in nats; no trial beats those of the "
    "front in both. Their sum is neg_elbo, equal along a thin line; the knee is where the lowest "
    "such line touches the front.",
}


def space(epochs: int) -> Space:
    """Return what varies beside the strength; a first warm-up ends before trials are judged."""
    return {
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
        multi_objective: minimise rate and distortion together instead of their sum, neg_elbo.
    """

    trials: int = 60
    seeds: int = 1
    pruner: Pruner | None = None
    multi_objective: bool = False


def make_plan(options: SearchOptions, own: Dataset | None = None) -> Plan:
    """Return the plan of a search, on the user's own data if given; all settings are checked."""
    for name in ("trials", "seeds"):
        whole(name, getattr(options, name), at_least=1)
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
    named, middle = "kl_weight", calibrated(base, data).kl_weight
    if sets_variance(base):
        named, middle = "decoder_variance", data.calibrated / 2
    # From an error below a grey level to the data's whole variance, beyond which all collapses.
    low, high = (float(f"{middle * factor:.3g}") for factor in (1e-3, 4 * data.pixels))
    every = {named: Range(low, high, log=True), **space(base.epochs)}
    if "kl_weight" in fixed or base.sigma != "fixed":
        del every[named]
    searched = {name: values for name, values in every.items() if name not in fixed}
    if not searched:
        raise UserError("every setting that the search varies is given; leave at least one out")
    objectives = ("val/rate", "val/distortion") if options.multi_objective else (SELECTION,)
    left_out = {*searched, "seed", *({"kl_weight"} - fixed)}
    settings = {k: v for k, v in json.loads(base.to_json()).items() if k not in left_out}
    settings |= {"space": {name: list(values) for name, values in searched.items()}}
    settings |= {"objectives": list(objectives), "seeds": options.seeds, "pruner": pruner}
    settings = {**data.settings, **settings, **parts([base])}
    proposer = TPE(
        *(base, searched, options.seeds, options.trials, pruner, objectives, settings),
        default={name: middle if name == named else getattr(base, name) for name in searched},
        configure=RunConfig.replace if "kl_weight" in fixed else partial(configure, data),
    )
    return Plan(
        page=NAME,
        question=__doc__ or "",
        name=options.named(f"{NAME}-{data.name}{'-front' * options.multi_objective}"),
        source=data,
        configs=[base] * (options.trials * options.seeds + 2 * CONFIRMING),
        proposer=proposer,
        find=partial(find, proposer, options),
        start=start_words(NAME),
        words=command(start_words(NAME), data, replace(options, pruner=pruner), base),
        sentence=f"{counted(options.trials, 'configuration')} of {', '.join(searched)}, seeds: "
        f"{options.seeds}, {counted(base.epochs, 'epoch')}, minimising {' and '.join(objectives)}, "
        f"pruner {pruner}, then {CONFIRMING} fresh seeds of the best and of the default",
        confirm=partial(confirm, proposer),
    )


def configure(
    data: Source,
    base: RunConfig,
    decoder_variance: float | None = None,
    **values: Any,  # noqa: ANN401 - settings
) -> RunConfig:
    """Set values of a trial; without a strength the KL weight is that of an exact ELBO (beta 1)."""
    config = base.replace(**values)
    if decoder_variance is not None:
        return with_variance(config, decoder_variance, data)
    return config if "kl_weight" in values else calibrated(config, data)


def confirm(proposer: TPE, study: optuna.Study) -> Listed:
    """Return runs of the default configuration and its rival with seeds not yet used."""
    part, compared = "confirmation", dict[int, RunConfig]()
    if trial := rival(study):
        compared[trial.number] = proposer.configs(trial)[0]
    compared[DEFAULT] = proposer.configure(proposer.base, **proposer.default)
    seeds = range(proposer.seeds, proposer.seeds + CONFIRMING)
    cells = list[Cell]()
    for number, config in compared.items():
        label, params = _label(number), {"trial": number, "part": part}
        cells += repeated(label, {"part": part, "label": label}, config, seeds, params)
    return Listed(cells, {})


def _label(number: int) -> str:
    return "default" if number == DEFAULT else f"trial {number}"


def rival(study: optuna.Study) -> FrozenTrial | None:
    """Return the trial that is compared with the default: the best other one, if any finished.

    The lowest validation neg_elbo of the trials with active latents; where all have collapsed, of
    all. With two objectives it is the knee of the front: neg_elbo = rate + distortion.
    """
    if not _complete(study):
        raise UserError(f"search {study.study_name!r} has no finished trial: all diverged")
    others = [trial for trial in _complete(study) if BASELINE not in trial.user_attrs]
    active = [trial for trial in others if trial.user_attrs[ACTIVE] > 0]
    return min(active or others, key=lambda trial: trial.user_attrs[SELECTION], default=None)


def _importances(study: optuna.Study, objective: int) -> dict[str, float]:
    """Return the share of an objective's variation that each parameter explains.

    Variation of ranks over finished trials (fANOVA, Hutter et al. 2014), so that a few hopeless
    trials do not explain everything. A strength that only some trials have is left out.
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


def find(proposer: TPE, options: SearchOptions, ended: Ended) -> Findings:
    """Return the findings of a search.

    The best other trial and the default, a comparison planned before the fresh seeds, are compared
    by a paired t interval of validation neg_elbo; the lower mean is recommended.
    """
    import pandas as pd

    from studies.runner import answers
    from studies.runner.summary import TABLE_CAPTION, Findings, histories_of

    study, other = ended.study, rival(ended.study)
    first = [trial.number for trial in _complete(study) if BASELINE in trial.user_attrs]
    runs = frames.tidy_search(ended.runs)
    searched = runs[runs["part"] == "search"]
    trials = frames.by_trial(searched, [*proposer.space])
    trials = trials.assign(front=trials["trial"].isin([t.number for t in study.best_trials]))
    tried = dict.fromkeys([*TRIED, *proposer.objectives, *map("val/{}".format, registry.METRICS)])
    means = frames.along_axis(
        searched[~searched["pruned"]], "trial", [name for name in tried if name in runs]
    )
    measured = [name for name in (*TABLE, *registry.METRICS) if name in runs]
    columns = dict.fromkeys(["trial", *proposer.space, "decoder_variance"])
    done = trials[[*columns]].merge(means, on="trial").sort_values(SELECTION, ignore_index=True)
    top = done[(done.index < TOP) | done["trial"].isin(first)].reset_index(drop=True)

    compared = [DEFAULT] if other is None else [other.number, DEFAULT]
    again = runs[runs["part"].eq("confirmation") & ~runs["pruned"] & runs["trial"].isin(compared)]
    again = again.assign(configuration=again["trial"].map(_label)).sort_values(["seed"])
    if again.empty:
        raise UserError(
            f"{' and '.join(map(_label, compared))} diverged with every fresh seed; search again "
            "with more --seeds and another --study-name"
        )
    # One of which a seed diverged is not recommended.
    ranked = frames.complete(again, ["configuration"])
    label = ranked.groupby("configuration")[SELECTION].mean().idxmin()
    chosen = ranked[ranked["configuration"] == label]
    found = again.sort_values(SELECTION).groupby("configuration", sort=False)
    medians = {name: part.iloc[(len(part) - 1) // 2] for name, part in found}
    best = medians[label]
    tested, default = (again[again["trial"] == number] for number in (compared[0], DEFAULT))
    gap = frames.paired_difference(tested, default, SELECTION)

    histories = histories_of(ended, again, SELECTION)
    of_best = histories[histories["run_id"].isin(chosen["run_id"])]
    warnings = answers.warnings(
        chosen, SELECTION, of_best, ended.plan.source.epochs, likelihood=False
    )
    seeds = found.size().reindex(map(_label, compared), fill_value=0)
    warnings += [f"{name} diverged with fresh seeds." for name in seeds.index[seeds < CONFIRMING]]
    improving = bool(answers.still_improving(of_best, SELECTION))
    epochs = improving * max(2 * proposer.base.epochs, ended.plan.source.epochs)
    step, next_command = _next(proposer, options, ended.plan, epochs)

    table = frames.along_axis(again, "configuration", measured)
    diverged = sum("diverged" in trial.user_attrs for trial in ended.trials)
    lowest = int(done.loc[(done[ACTIVE] > 0).idxmax(), "trial"])  # of all, where all collapsed
    row = table.set_index("configuration").loc[label]
    sentences = [
        f"Of {counted(len(trials) + diverged, 'configuration')} ({trials['pruned'].sum()} pruned, "
        f"{diverged} diverged) trial {lowest} was the best{', the default' * (lowest in first)}.",
        f"To quote: test neg_elbo of {label} is {tables.plus_minus(row, 'neg_elbo')} nats / image.",
        f"The saved model is that of {label} with the median seed, {best['seed']}.",
    ]
    exhibits = {"table": (top, f"The {TOP} best trials of the search, and the default.")}
    exhibits["confirmed"] = (table, f"With fresh seeds. {TABLE_CAPTION}")
    figures: dict[str, Callable[[], Figure]] = {
        "history": partial(plots.search_history, trials),
        "parameters": partial(plots.search_parameters, trials),
        "learning_curves": partial(plots.learning_curves, histories, again, "configuration"),
    }
    if len(_complete(study)) > 1:
        shares = {name: _importances(study, i) for i, name in enumerate(proposer.objectives)}
        figures["importances"] = partial(plots.search_importances, pd.DataFrame(shares))
    if len(proposer.objectives) > 1:
        front = done[done["trial"].isin(trials.loc[trials["front"], "trial"])]
        caption = f"the front of rate and distortion; its knee is trial {lowest}."
        are = "is" if len(front) == 1 else "are"
        sentences.append(f"{counted(len(front), 'trial')} {are} on {caption}")
        figures["front"] = partial(plots.search_front, trials, lowest)
        exhibits["front"] = (front.sort_values("val/rate"), f"Trials of {caption}")
    rows = top.index[top["trial"].isin(first if label == _label(DEFAULT) else compared)]
    others = [run for name, run in medians.items() if name != label and not gap.distinguishable]
    shown = ", ".join(f"{k} = {tables.plain(v)}" for k, v in _settings(proposer, best).items())
    sure = how_sure(_label(compared[0]), gap)
    return Findings(
        table=top,
        answer=partial(" ".join, sentences),
        frame=runs,
        tables=exhibits,
        figures={name: (draw, CAPTIONS[name]) for name, draw in figures.items()},
        models={f"{name}, seed {run['seed']}": run["run_id"] for name, run in medians.items()},
        best=best,
        shown=chosen[measured].mean().to_dict(),
        settings={**proposer.settings, "trials": len(trials) + diverged, "best_trial": lowest},
        verdict=(f"Best: {label} ({shown}).", f"How sure: {sure}.", f"Next: {step}"),
        warnings=warnings,
        next_command=next_command,
        best_value=_settings(proposer, best),
        not_distinguishable=[_settings(proposer, run) for run in others],
        procedure="paired t interval over fresh seeds at 5 %",
        best_row=int(rows[0]) if len(rows) else None,
    )


def _settings(proposer: TPE, run: pd.Series) -> dict[str, Any]:
    """Return the searched settings of a run and its KL weight, without a fitted variance."""
    names = dict.fromkeys([*proposer.space, "kl_weight"])
    fitted = run["sigma"] != "fixed"
    return {k: plain(run[k]) for k in names if not (fitted and k == "decoder_variance")}


def how_sure(other: str, gap: frames.Difference) -> str:
    """Return how the best other trial compares with the default, by its paired difference."""
    if other == _label(DEFAULT) or gap.seeds < 2:
        return "no other configuration than the default could be compared with it"
    verdict = "better than" if gap.mean < 0 else "worse than"
    verdict = verdict if gap.distinguishable else "not distinguishable from"
    return (
        f"{other} is {verdict} the default: {gap.mean:.2f} ± {gap.half_width:.2f} nats / image of "
        f"validation neg_elbo against it, paired over {gap.seeds} fresh seeds"
    )


def _next(proposer: TPE, options: SearchOptions, plan: Plan, epochs: int) -> tuple[str, str]:
    """Return what to do next, and its command: so many epochs, or for 0 more trials."""
    more = replace(options, pruner=proposer.pruner, trials=options.trials * (1 if epochs else 2))
    more = replace(more, settings={**more.settings, "epochs": epochs or proposer.base.epochs})
    words = command(start_words(NAME), plan.source, more, proposer.base)
    line = f"{words} {shlex.join(arguments(same_places(options, plan.name, fresh=epochs > 0)))}"
    return f"{f'{epochs} epochs' if epochs else f'{more.trials} trials'}: {line}", line


def parse(args: Sequence[str] | None = None) -> SearchOptions:
    """Return the options of the search from its command line; else UserError."""
    searched = dict.fromkeys(["kl_weight", *space(BASE.epochs)], "searched, unless it is given")
    return read(SearchOptions, NAME, __doc__ or "", args, setting_options(BASE, searched))


def main(args: Sequence[str] | None = None) -> None:
    """Run the search from the command line; bad input ends it with one line and exit code 2."""
    with clear_errors(args) as terminal:
        options = parse(args)
        execute(partial(make_plan, options), options, terminal)


if __name__ == "__main__":
    main()
