"""Verdict, warnings and next step of a study: sentences made of its runs and their ranking.

Warnings concern the recommended setting: what its numbers cannot carry, and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from analysis import frames, tables
from analysis.comparisons import PROCEDURE, Ranking

if TYPE_CHECKING:
    import pandas as pd

NEAR = 3.0  # factor of the calibration ratio within which a weight is called calibrated
ACTIVE = 0.25  # share of latents below which few are active
SHARE = 0.01  # of the fall since the first epoch: more of it at the end is still improving
NAMED = {1: 8, 2: 4}  # values, of one column or two, that a sentence lists
MOST_SEEDS = 20  # that are suggested
REFITTED, GAP = "neg_elbo_refitted", "amortization_gap"


def still_improving(histories: pd.DataFrame, metric: str = "val/neg_elbo", epochs: int = 0) -> str:
    """Return a warning if a metric still falls in the last 10 % of epochs, at least one; else "".

    The fall of the lowest value so far, averaged over runs, counts where it is more than 1 % of
    that since the first epoch and more than two of its standard errors over seeds.

    Args:
        histories: columns run_id, epoch and value, of the runs of one setting.
        metric: its name.
        epochs: least number of epochs to advise.
    """
    lowest = histories.pivot(index="epoch", columns="run_id", values="value").cummin().ffill()
    count = len(lowest)
    if not count:
        return ""
    name, unit = _plain_name(metric), _unit(metric)
    advice = f"; try --epochs {max(2 * count, epochs)}"
    if count == 1:
        return f"Trained for one epoch: whether {name} still falls is not known{advice}."
    last = max(1, round(count / 10))
    falls = lowest.iloc[-1 - last] - lowest.iloc[-1]
    error = falls.sem() if len(falls) > 1 else 0.0
    if falls.mean() <= max(SHARE * (lowest.iloc[0] - lowest.iloc[-1]).mean(), 2 * error):
        return ""
    when = f"last {last} of {count} epochs" if last > 1 else "last epoch"
    return f"{name} fell by {falls.mean():.3g}{unit} in the {when}{advice}."


def worse_than_linear(runs: pd.DataFrame) -> str:
    """Return a warning if runs are worse than the exact linear model of their setting; else "".

    That of a fitted variance has another one, without bound where it has many latents.
    """
    runs = runs[_of(runs, "sigma") == "fixed"]
    above = (_of(runs, "neg_elbo") - _of(runs, "linear/neg_elbo")).dropna()
    if len(above) and above.mean() > _error(above):
        return (
            f"The best setting's test neg_elbo is {above.mean():.3g} nats / image worse than that "
            "of the exact linear model; train for more epochs, or with another learning rate."
        )
    gap = _of(runs, "gap_to_linear").dropna()
    if not len(above) and len(gap) and gap.mean() < -_error(gap):
        return (
            f"The best setting's loss is {-gap.mean():.3g} % above that of the exact linear model; "
            "train for more epochs, or with another learning rate."
        )
    return ""


def few_active(runs: pd.DataFrame) -> str:
    """Return a warning if no latent is active, or less than a quarter of them; else ""."""
    active, size = _of(runs, "active_units").mean(), _of(runs, "latent_size").max()
    if active < 0.5:
        return (
            f"No latent of {size:.0f} is active, so that every image is decoded alike; lower the "
            "KL weight, or train for more epochs."
        )
    if active < ACTIVE * size:
        return (
            f"Only {active:.1f} of {size:.0f} latents are active; the others carry no information."
        )
    return ""


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
    if not effective < FEW_SAMPLES:
        return ""
    return (
        f"neg_log_likelihood rests on {effective:.1f} effective importance samples at the best "
        "setting and may be nats too high; compare by neg_elbo."
    )


def few_seeds(seeds: int) -> str:
    """Return a warning on one or two seeds; else ""."""
    if seeds == 1:
        return "One seed: no spread is known, and no value is called better; give --seeds 3."
    if seeds == 2:
        return "Two seeds: intervals have 1 degree of freedom (t = 12.7); give --seeds 5."
    return ""


def at_an_end(name: str, values: Sequence[Any]) -> str:
    """Return a warning if the first of some numbers is the smallest or the largest; else "".

    Beyond 0, and below the count of 1, there is nothing to try.
    """
    if len(values) < 2 or not _are_numbers(values):
        return ""
    best, is_count = values[0], isinstance(values[0], int)
    if best == 0 or (is_count and best == 1 == min(values)):
        return ""
    if best not in (min(values), max(values)):
        return ""
    which, beyond = ("largest", "larger") if best == max(values) else ("smallest", "smaller")
    shown = tables.plain(best)
    return f"{name} = {shown} is the {which} value that was tried; {beyond} ones may be better."


def _of(runs: pd.DataFrame, column: str) -> pd.Series:
    """Return a column, all NaN where runs lack it."""
    return runs[column] if column in runs else runs["seed"] * float("nan")


def _error(values: pd.Series) -> float:
    return float(values.sem()) if len(values) > 1 else 0.0


def _plain_name(metric: str) -> str:
    return metric.removeprefix("val/")


def _unit(metric: str) -> str:
    return " nats / image" if metric.endswith("neg_elbo") else ""


def warnings(
    runs: pd.DataFrame, metric: str, histories: pd.DataFrame, epochs: int, *, likelihood: bool
) -> list[str]:
    """Return all warnings on the runs of a setting but that on its place among the values.

    Args:
        runs: one row a seed.
        metric: validation metric by which the setting was chosen.
        histories: that metric of these runs, as of `still_improving`.
        epochs: least number of epochs to advise.
        likelihood: whether the study shows `neg_log_likelihood`.
    """
    found = [still_improving(histories, metric, epochs), worse_than_linear(runs), few_active(runs)]
    found += [not_calibrated(runs), few_seeds(len(runs)), few_effective(runs) * likelihood]
    return [text for text in found if text]


def point(keys: Sequence[str], value: Any, digits: int = 3) -> str:  # noqa: ANN401 - of any kind
    """Return a value of an axis, or of several, as text: "hidden = 16, kl_weight = 0.1"."""
    parts = zip(keys, value if len(keys) > 1 else (value,), strict=True)
    return ", ".join(f"{key} = {tables.plain(part, digits)}" for key, part in parts)


def verdict(ranking: Ranking, following: str) -> list[str]:
    """Return three lines: the best setting, how sure that is, and what to do next.

    Args:
        ranking: of `analysis.comparisons.rank`.
        following: what to do next, a sentence.
    """
    name, unit = _plain_name(ranking.metric), _unit(ranking.metric)
    mean, low, high = (f"{value:.{tables.decimals(name)}f}" for value in ranking.winner)
    best = point(ranking.keys, ranking.best, _digits(ranking))
    what = "values" if len(ranking.keys) == 1 else "combinations"
    lowest = f"is the lowest of {ranking.values} {what}" if ranking.values > 1 else "is"
    both = " of encoder and decoder together" * (name == "neg_elbo")
    interval = f" (95 % interval {low} to {high}, the choice included)" * (ranking.seeds > 1)
    first = f"Best: {best}. Its mean validation {name}{both} {lowest}: {mean}{unit}{interval}."
    return [first, f"How sure: {_how_sure(ranking, unit)}", f"Next: {following}"]


def _how_sure(ranking: Ranking, unit: str) -> str:
    seeds, worse, equal = ranking.seeds, len(ranking.worse), ranking.not_distinguishable
    if ranking.values == 1:
        return "it is the only setting, compared with nothing."
    if seeds == 1:
        return "not at all; with one seed no value can be called better than another."
    text = f"{seeds} seeds. Not distinguishable from it: {listed(ranking)}; worse: {worse} "
    text += f"({PROCEDURE} over all pairs at 5 %)."
    if equal and not math.isnan(ranking.visible):
        more, seen = ranking.more
        text += f" Differences below {ranking.visible:.2g}{unit} could not be seen"
        text += f", with {more} seeds those below {seen:.2g}."
    return text


def listed(ranking: Ranking) -> str:
    """Return the values that are not distinguishable from the best, or how many they are."""
    equal = ranking.not_distinguishable
    if len(equal) > NAMED[len(ranking.keys)]:
        return f"{len(equal)} of {ranking.values - 1} others"
    digits = _digits(ranking)
    texts = [point(ranking.keys, value, digits) for value in equal]
    if len(ranking.keys) == 1:
        texts = [tables.plain(value, digits) for value in equal]
    return ("; " if any("," in text for text in texts) else ", ").join(texts) or "none"


def next_step(
    vary: Callable[..., str], ranking: Ranking, along: Sequence[Any], epochs: int = 0, **same: Any
) -> tuple[str, str]:
    """Return what to do next, a sentence, and its command line, "" if there is none.

    Args:
        vary: options -> the study's command line with them, "" if they are refused.
        ranking: of its values.
        along: values of the axis that go with the best of all else, the best first.
        epochs: number of epochs to advise, 0 if the best does not improve any more.
        same: options without which the command would leave out values.
    """
    seeds, best = ranking.seeds, tables.plain(along[0])
    steps = [(f"{epochs} epochs", {"epochs": epochs, **same})] if epochs else []
    if seeds < 3:
        steps.append((f"{2 * seeds + 1} seeds", {"seeds": 2 * seeds + 1, **same}))
    if beyond := _beyond(along):
        steps.append((f"values beyond {best}", {"values": beyond}))
    if ranking.not_distinguishable:
        more, why, enough = ranking.more[0], "", ranking.seeds_for or 0
        if seeds < enough <= MOST_SEEDS:
            more, why = enough, ", enough for the best two if they differ as they do here"
        steps.append((f"{more} seeds{why}", {"seeds": more, **same}))
    elif between := _between(along):
        steps.append((f"values beside {best}", {"values": between}))
    for why, changes in steps:
        if command := vary(**changes):
            return f"{why}: {command}", command
    return "no more seeds, values or epochs are suggested.", ""


def decoders(frame: pd.DataFrame, ranking: Ranking, images: int) -> str:
    """Return which setting has the best decoder, by `neg_elbo_refitted`; "" if no run has it."""
    means = _of(frame, REFITTED).groupby([frame[key] for key in ranking.keys]).mean().dropna()
    if means.empty:
        return ""
    digits, best = _digits(ranking), means.idxmin()
    others = "" if best == ranking.best else f" ({means[ranking.best]:.2f} at the setting above)"
    return (
        "Of the decoder alone, with the posterior refitted to each of the first "
        f"{images} test images, neg_elbo is lowest at {point(ranking.keys, best, digits)}: "
        f"{means[best]:.2f} nats / image{others}; no test of significance."
    )


def to_quote(runs: pd.DataFrame, ranking: Ranking) -> str:
    """Return which test number may be quoted; "" where runs lack it."""
    name = _plain_name(ranking.metric)
    if name not in runs or not ranking.metric.startswith("val/"):
        return ""
    row = frames.along_axis(runs, [*ranking.keys], [name]).iloc[0]
    error = _of(runs, f"{name}_se").mean()
    images = f"; of one run, the test images add a standard error of {error:.2g}"
    images *= not math.isnan(error)
    best = point(ranking.keys, ranking.best, _digits(ranking))
    return (
        f"To quote: test {name} {tables.plus_minus(row, name)}{_unit(name)} of {best} "
        f"({tables.over(len(runs))}{images}). Validation data chose it; the "
        "test numbers of other settings are no basis for a choice."
    )


def _digits(ranking: Ranking) -> int:
    """Return in how many digits all values differ, at least 3."""
    values = [ranking.best, *ranking.not_distinguishable, *ranking.worse]
    for digits in (3, 6):
        if len({point(ranking.keys, value, digits) for value in values}) == len(values):
            return digits
    return 17


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _rounded(numbers: Sequence[float], values: Sequence[Any]) -> list[float]:
    """Return numbers like the values of an axis, in 3 digits, without these."""
    whole = all(isinstance(value, int) for value in values)
    near = [round(number) if whole else float(f"{number:.3g}") for number in numbers]
    return [number for number in dict.fromkeys(near) if number not in values]


def _beyond(values: Sequence[Any]) -> list[float]:
    """Return two numbers that continue an axis beyond its first value, if that is at an end."""
    if not at_an_end("", values):
        return []
    best = values[0]
    near = min(values[1:], key=lambda value: abs(value - best))
    if best > 0 and near > 0:
        return _rounded([best**2 / near, best**3 / near**2], values)
    return _rounded([2 * best - near, 3 * best - 2 * near], values)


def _between(values: Sequence[Any]) -> list[float]:
    """Return the numbers half way from the first value of an axis to those beside it."""
    if not _are_numbers(values):
        return []
    best = values[0]
    below, above = [v for v in values if v < best], [v for v in values if v > best]
    beside = [*([max(below)] if below else []), *([min(above)] if above else [])]
    middle = [math.sqrt(v * best) if min(v, best) > 0 else (v + best) / 2 for v in beside]
    return _rounded(middle, values)
