"""Verdict, warnings and next step of a study: sentences made of its runs and their ranking.

Warnings concern the recommended setting: what its numbers cannot carry, and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from analysis import frames, tables
from analysis.comparisons import PROCEDURE, Ranking
from harness.errors import listed

if TYPE_CHECKING:
    import pandas as pd

NEAR = 3.0  # factor of the calibration ratio within which a weight is called calibrated
ACTIVE = 0.25  # share of latents below which few are active
SHARE = 0.01  # of the fall since the first epoch: more of it at the end is still improving
NAMED = 6  # values that a sentence lists
BY = f"{PROCEDURE} over all pairs at 5 %"
REFITTED, GAP = "neg_elbo_refitted", "amortization_gap"


def still_improving(histories: pd.DataFrame, metric: str = "val/neg_elbo", epochs: int = 0) -> str:
    """Return a warning if a metric still falls in the last 10 % of epochs, at least one; else "".

    The fall of the lowest value so far, averaged over runs, counts where it is more than 1 % of
    that since the first epoch and more than two of its standard errors over seeds. `histories` has
    the columns run_id, epoch and value; at least `epochs` are advised.
    """
    lowest = histories.pivot(index="epoch", columns="run_id", values="value").cummin().ffill()
    count, name = len(lowest), metric.removeprefix("val/")
    if not count:
        return ""
    advice = f"; try --epochs {max(2 * count, epochs)}"
    if count == 1:
        return f"Trained for one epoch: whether {name} still falls is not known{advice}."
    last = max(1, round(count / 10))
    falls = lowest.iloc[-1 - last] - lowest.iloc[-1]
    error = falls.sem() if len(falls) > 1 else 0.0
    if falls.mean() <= max(SHARE * (lowest.iloc[0] - lowest.iloc[-1]).mean(), 2 * error):
        return ""
    when = f"last {last} of {count} epochs" if last > 1 else "last epoch"
    return f"{name} fell by {falls.mean():.3g}{_unit(name)} in the {when}{advice}."


def worse_than_linear(runs: pd.DataFrame) -> str:
    """Return a warning if runs are worse than the exact linear model of their setting; else "".

    That of a fitted variance has another one, without bound where it has many latents.
    """
    runs = runs[_of(runs, "sigma") == "fixed"]
    above = (_of(runs, "neg_elbo") - _of(runs, "linear/neg_elbo")).dropna()
    if not above.mean() > (above.sem() if len(above) > 1 else 0.0):
        return ""
    return (
        f"The best setting's test neg_elbo is {above.mean():.3g} nats / image worse than that "
        "of the exact linear model; train for more epochs, or with another learning rate."
    )


def few_active(runs: pd.DataFrame) -> str:
    """Return a warning if no latent is active, or less than a quarter of them; else ""."""
    active, size = _of(runs, "active_units").mean(), _of(runs, "latent_size").max()
    if active < 0.5:
        return (
            f"No latent of {size:.0f} is active, so that every image is decoded alike; lower the "
            "KL weight, or train for more epochs."
        )
    few = f"Only {active:.1f} of {size:.0f} latents are active; the others carry no information."
    return few if active < ACTIVE * size else ""


def not_calibrated(runs: pd.DataFrame) -> str:
    """Return a warning if the calibration ratio is not within a factor of 3 of 1; else ""."""
    ratio, weight = _of(runs, "calibration_ratio").mean(), _of(runs, "kl_weight").mean()
    if math.isnan(ratio) or 1 / NEAR <= ratio <= NEAR:
        return ""
    advice = f"; a KL weight near {weight / ratio:.2g} agrees with it" if ratio > 0 else ""
    return (
        f"The best setting's calibration ratio is {ratio:.3g}, far from 1: the decoder variance of "
        f"its KL weight is not the mean squared error that it leaves{advice}."
    )


def few_effective(runs: pd.DataFrame) -> str:
    """Return a warning if few importance samples carry `neg_log_likelihood`; else ""."""
    from harness.metrics.likelihood import FEW_SAMPLES  # PyTorch, which --help does not need

    effective = _of(runs, "effective_samples").mean()
    text = (
        f"neg_log_likelihood rests on {effective:.1f} effective importance samples at the best "
        "setting and may be nats too high; compare by neg_elbo."
    )
    return text if effective < FEW_SAMPLES else ""


def few_seeds(seeds: int) -> str:
    """Return a warning on one or two seeds; else ""."""
    if seeds == 1:
        return "One seed: no spread is known, and no value is called better; give --seeds 3."
    few = "Two seeds: intervals have 1 degree of freedom (t = 12.7); give --seeds 3."
    return few if seeds == 2 else ""


def at_an_end(name: str, values: Sequence[Any]) -> str:
    """Return a warning if the first of some numbers is the smallest or the largest; else ""."""
    best, is_count = values[0], isinstance(values[0], int)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if len(values) < 2 or not numbers or best not in (min(values), max(values)):
        return ""
    if best == 0 or (is_count and best == 1 == min(values)):  # there is nothing beyond
        return ""
    which, beyond = ("largest", "larger") if best == max(values) else ("smallest", "smaller")
    shown = tables.plain(best)
    return f"{name} = {shown} is the {which} value that was tried; {beyond} ones may be better."


def _of(runs: pd.DataFrame, column: str) -> pd.Series:
    return runs.get(column, runs["seed"] * float("nan"))


def _unit(metric: str) -> str:
    return " nats / image" if metric.endswith("neg_elbo") else ""


def warnings(
    runs: pd.DataFrame, metric: str, histories: pd.DataFrame, epochs: int, *, likelihood: bool
) -> list[str]:
    """Return all warnings on the runs of a setting but that on its place among the values.

    `likelihood` is whether the study shows `neg_log_likelihood`; the others are as of
    `still_improving`.
    """
    found = [still_improving(histories, metric, epochs), worse_than_linear(runs), few_active(runs)]
    found += [not_calibrated(runs), few_seeds(len(runs)), few_effective(runs) * likelihood]
    return [text for text in found if text]


def names(ranking: Ranking) -> dict[Any, str]:
    """Return each value as text, "hidden = 16, sigma = fixed", in as few digits as differ."""
    values = [ranking.best, *ranking.not_distinguishable, *ranking.worse]
    for digits in (3, 6, 17):
        texts = dict[Any, str]()
        for value in values:
            parts = zip(ranking.keys, value if len(ranking.keys) > 1 else (value,), strict=True)
            texts[value] = ", ".join(f"{key} = {tables.plain(v, digits)}" for key, v in parts)
        if len({*texts.values()}) == len(values):
            break
    return texts


def verdict(ranking: Ranking, following: str) -> list[str]:
    """Return three lines: the best setting, how sure that is, and a sentence on what to do next."""
    name, of, count = ranking.metric.removeprefix("val/"), names(ranking), ranking.values
    mean, low, high = (f"{value:.{tables.decimals(name)}f}" for value in ranking.winner)
    what = "values" if len(ranking.keys) == 1 else "combinations"
    lowest = f"is the lowest of {count} {what}" if count > 1 else "is"
    both = " of encoder and decoder together" * (name == "neg_elbo")
    interval = f" (95 % interval {low} to {high}, the choice included)" * (ranking.seeds > 1)
    best = f"{of[ranking.best]}. Its mean validation {name}{both} {lowest}: {mean}{_unit(name)}"
    sure, equal = _power(ranking, _unit(name)), ranking.not_distinguishable
    if count > 1 < ranking.seeds:
        key = f"{ranking.keys[0]} = " * (len(ranking.keys) == 1)
        shown = listed(of[value].removeprefix(key) for value in equal) or "none"
        if len(equal) > NAMED:
            shown = f"{len(equal)} of {count - 1} others"
        worse = {0: "none is worse", 1: "1 is worse"}.get(n := len(ranking.worse), f"{n} are worse")
        sure = f"not distinguishable from it: {shown}; {worse} ({BY}). {sure}"
    return [f"Best: {best}{interval}.", f"How sure: {sure}", f"Next: {following}"]


def _power(ranking: Ranking, unit: str) -> str:
    """Return sentences on the differences that the seeds of a ranking could show."""
    if ranking.values == 1:
        return "there is one value, compared with nothing."
    more, then = ranking.more
    if ranking.seeds == 1:
        return f"not at all; one seed shows no difference, {more} seeds show large ones."
    text = (
        f"With {ranking.seeds} seeds differences below {tables.plain(ranking.visible)}{unit} could"
    )
    text += f" not be seen; {more} seeds would show {tables.plain(then)}."
    if ranking.not_distinguishable and (ranking.seeds_for or 101) > ranking.seeds:
        seeds = ranking.seeds_for or "more than 100"
        text += f" The next value would take {seeds} seeds, if it differs as it does here."
    return text


def next_step(
    vary: Callable[..., str], ranking: Ranking, along: Sequence[Any], epochs: int = 0
) -> tuple[str, str]:
    """Return what to do next, a sentence, and its command line, "" if there is none.

    More epochs while the best improves, else more seeds while others may be as good, else a value
    beyond an end of the axis. `vary` returns the study's command line with other options, "" if
    they are refused; `along` are values of the axis, the best first; `epochs` is 0 if the best does
    not improve any more.
    """
    longer: dict[str, Any] = {"epochs": epochs}
    steps = [(f"{epochs} epochs", longer)] if epochs else []
    if ranking.seeds < 3 or ranking.not_distinguishable:
        steps.append((f"{ranking.more[0]} seeds", {"seeds": ranking.more[0]}))
    if at_an_end("", along):
        best, near = along[0], min(along[1:], key=lambda value: abs(value - along[0]))
        value = best**2 / near if min(best, near) > 0 else 2 * best - near
        value = round(value) if isinstance(best, int) else float(f"{value:.3g}")
        steps.append((f"a value beyond {tables.plain(best)}", {"values": [value]}))
    for what, changes in steps:
        if command := vary(**changes):
            return f"{what}: {command}", command
    return "no more seeds, values or epochs are suggested.", ""


def decoders(frame: pd.DataFrame, ranking: Ranking, images: int) -> str:
    """Return which setting has the best decoder, by `neg_elbo_refitted`; "" if no run has it."""
    means = _of(frame, REFITTED).groupby([frame[key] for key in ranking.keys]).mean().dropna()
    if means.empty:
        return ""
    best = means.idxmin()
    others = "" if best == ranking.best else f" ({means[ranking.best]:.2f} at the setting above)"
    return (
        "Of the decoder alone, with the posterior refitted to each of the first "
        f"{images} test images, neg_elbo is lowest at {names(ranking)[best]}: "
        f"{means[best]:.2f} nats / image{others}; no test of significance."
    )


def to_quote(runs: pd.DataFrame, ranking: Ranking) -> str:
    """Return which test number may be quoted; "" where runs lack it."""
    name = ranking.metric.removeprefix("val/")
    if name not in runs or name == ranking.metric:
        return ""
    row = frames.along_axis(runs, [*ranking.keys], [name]).iloc[0]
    error = _of(runs, f"{name}_se").mean()
    images = f"; of one run, the test images add a standard error of {error:.2g}"
    images = "" if math.isnan(error) else images
    return (
        f"To quote: test {name} {tables.plus_minus(row, name)}{_unit(name)} of "
        f"{names(ranking)[ranking.best]} ({tables.over(len(runs))}{images}). "
        "Validation data chose it; the test numbers of other settings are no basis for a choice."
    )
