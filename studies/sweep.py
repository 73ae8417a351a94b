"""Which value of a setting is best, or which combination of the values of two?

`--axis learning_rate=1e-4,1e-3` sweeps a setting, `--axis width=16,32` an option of the network,
`--axis mmd=0,10` the weight of a loss term and `--axis mmd.bandwidth=0.5,1` its option. With a
second `--axis` every combination is trained. `hidden=256x64,128` has two values: (256, 64), (128).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction, arg

from analysis import frames, plots, tables
from harness import registry
from harness.config import RunConfig, UserError
from studies.runner.answers import over
from studies.runner.cli import clear_errors, execute, read
from studies.runner.options import SETTINGS, Common, Options, option_value, setting_options, text
from studies.runner.study import TABLE, Axis, Source, Study, make_plan, with_named

if TYPE_CHECKING:
    import pandas as pd

NAME = "sweep"

LISTED = 5
"""Combinations that the answer names as not distinguishable from the best, at most."""

CHANGES = {
    "neg_elbo": {"likelihood", "binarization"},
    "loss": {
        *("kl_weight", "kl_normalization", "free_bits", "sigma", "likelihood", "binarization"),
        *("latent", "latent_size"),
    },
}
"""Axes along which the compared metric has another meaning."""


@dataclass(frozen=True)
class SweepOptions(Common):
    """Options of a sweep's command line.

    Attributes:
        axis: a setting and its values; once, or twice for every combination. An option of a network
            or a term that is swept too is the second. Several numbers have an x: hidden=256x64,128.
        seeds: repetitions of every value (3).
    """

    axis: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="NAME=VALUE,VALUE")] = ()
    seeds: int | None = None


def sweep(axes: Mapping[str, Sequence[Any]]) -> Study:
    """Return the study of one setting or of two: `run(sweep({"kl_weight": (0.1, 1)}), seeds=2)`.

    Args:
        axes: name -> values, as `Axis` takes them. A network and a term may be FILE.py:NAME. With
            two axes every value of the first is a group, which has all values of the second.
    """
    swept, words = list[Axis](), list[str]()
    for address, values in axes.items():
        if address == "seed":
            raise UserError("axis 'seed': seeds are repetitions; give --seeds N")
        words += ["--axis", f"{address}={','.join(map(_written, values))}"]
        name = registry.load(address, "term")
        if name == "model":
            values = [registry.load(value, "network") for value in values]
        swept.append(Axis(name, values))
        if len(set(swept[-1].values)) < len(values):
            raise UserError(f"axis {name!r}: give every value once")
    names = [axis.name for axis in swept]
    if len(set(names)) < len(axes) or len(axes) not in (1, 2):
        raise UserError(f"axes {', '.join(names) or 'none'}: give one, or two of different names")
    *group, axis = swept
    first = group[0].name if group else ""

    def apply(config: RunConfig, value: Any, data: Source) -> RunConfig:  # noqa: ANN401
        try:
            return _set(config, axis.name, value, names)
        except UserError as error:
            point = f"{first}={text(config.named()[first])}, {axis.name}={text(value)}: "
            raise UserError(f"{point if first else ''}{error}") from None

    def groups(base: RunConfig, data: Source) -> dict[str, dict[str, Any]]:
        return {text(v): vars(_set(base, first, v, names)) for v in group[0].values}

    more = {"group": first, "groups": groups} if group else {}
    return Study(
        name=re.sub(r"[^A-Za-z0-9._-]", "_", "-".join([NAME, *names])),
        question=f"Which {' and '.join(names)} {'are' if group else 'is'} best?",
        base=RunConfig(),
        axis=Axis(axis.name, axis.values, apply),
        figures=_figures(*names),
        answer=partial(best_point, axes=names),
        objective="",
        table=(*TABLE, *(f"term/{name.partition('.')[0]}" for name in names)),
        start=("-m", f"studies.{NAME}", *words),
        **more,
    )


def _set(config: RunConfig, name: str, value: Any, axes: Sequence[str]) -> RunConfig:  # noqa: ANN401
    if name == "latent" and value == "deterministic" and "kl_weight" not in axes:
        config = config.replace(kl_weight=0.0)  # the default of such a latent
    if name in ("hidden", "channels") and name not in registry.NETWORKS[config.model].settings:
        model = "mlp" if name == "hidden" else "conv"
        raise UserError(f"axis {name!r} with model={config.model!r}: only {model} has it")
    return with_named(config, name, value)


def _written(value: object) -> str:
    """Write a value as `_value` reads it."""
    if isinstance(value, list | tuple):
        return "x".join(map(str, value)) or "none"
    return str(value)


def _figures(first: str, second: str = "") -> dict[str, Any]:
    if second:
        axis: dict[str, str] = {"axis": second, "group": first}
        figures: dict[str, Any] = {
            "heat_map": (
                partial(plots.heat_map, rows=first, columns=second),
                "Mean on test data and half width of its 95 % t interval over seeds. Framed, the "
                "lowest mean on validation data; a dash, no run that finished.",
            )
        }
    else:
        axis, figures = {"axis": first}, {}
    figures["metrics_along_axis"] = (
        partial(plots.metrics_along_axis, **axis),
        f"Test metrics against {second or first}; dashed, the exact linear model.",
    )
    figures["rate_distortion"] = (
        partial(plots.rate_distortion, **axis),
        "The rate-distortion plane; along a thin line neg_elbo is constant.",
    )
    if not second:
        figures["kl_per_latent"] = (partial(plots.kl_per_latent, axis=first), plots.KL_CAPTION)
        quality = partial(plots.quality_along_axis, axis=first)
        figures["quality_along_axis"] = (quality, plots.QUALITY_CAPTION)
    return figures


# --- the answer ---------------------------------------------------------------------------------


def notes(counts: Mapping[str, int], seeds: int) -> list[str]:
    """Return sentences on what a sweep cannot answer, from the number of values of each axis."""
    single = [f"{name} has one value: nothing to compare." for name, n in counts.items() if n == 1]
    return single + ["One seed: no spread is known; give --seeds 3."] * (seeds == 1)


def best_point(frame: pd.DataFrame, axes: Sequence[str]) -> str:
    """Return which value, or combination of two, is best on validation data."""
    keys, metric = [*axes], frames.compared(frame)
    val, unit = f"val/{metric}", " nats / image" * (metric == "neg_elbo")
    frame = frames.complete(frame, keys)
    means = frames.along_axis(frame, keys, [metric, val])
    ranked = means.sort_values(val, kind="stable")
    best, seeds = ranked.iloc[0], int(ranked["seeds"].iloc[0])
    points = frame.groupby(keys)
    first = points.get_group(tuple(best[keys]))
    equal = [
        _point(row, keys)
        for _, row in ranked[1:].iterrows()
        if not frames.paired_difference(
            points.get_group(tuple(row[keys])), first, val
        ).distinguishable
    ]
    if len(equal) > LISTED:
        equal = [f"{len(equal)} of the others"]
    what = "combinations" if len(keys) > 1 else "values"
    close = f"; not distinguishable from it: {', '.join(equal) or 'none'}" * (seeds > 1)
    sentences = [
        f"{_point(best, keys)} has the lowest validation {metric} of {len(means)} {what}: "
        f"{_pair(best, val)}{unit} (test {_pair(best, metric)}; {over(seeds)}){close}."
    ]
    if len(keys) > 1:
        rows = means.loc[means.groupby(keys[0], sort=False)[val].idxmin()]
        each = [f"{_point(row, keys)} ({_pair(row, val)})" for _, row in rows.iterrows()]
        sentences.append(f"The best {keys[1]} for each {keys[0]}: {'; '.join(each)}.")
    sentences += notes({key: frame[key].nunique() for key in keys}, seeds)
    if changing := CHANGES[metric].intersection(keys):
        sentences.append(
            f"{metric} has another meaning at each {' and '.join(sorted(changing))}, so that the "
            "lowest is not the best model: compare the other metrics."
        )
    return " ".join(sentences)


def _point(row: pd.Series, keys: Sequence[str]) -> str:
    return ", ".join(f"{key} = {tables.plain(row[key], 6)}" for key in keys)


def _pair(row: pd.Series, metric: str) -> str:
    return tables.pair(row[metric], row[f"{metric}±"], tables.decimals(metric))


# --- the command line ---------------------------------------------------------------------------


def parse(args: Sequence[str] | None = None) -> tuple[Study, Options[Any]]:
    """Return the study that a command line describes, and its options; else UserError.

    A term's weight that is given is replaced by those of an axis of its name.
    """
    given = read(SweepOptions, NAME, __doc__ or "", args, setting_options(RunConfig(), {}))
    settings = dict(given.settings)
    network = RunConfig(model=registry.load(settings.get("model", "mlp"), "network")).model
    terms = {registry.load(term, "term"): term for term in settings.get("terms", ())}
    axes = dict[str, list[Any]]()
    for word in given.axis:
        name, equal, values = word.partition("=")
        if not (name and equal and values):
            raise UserError(f"--axis {word}: write NAME=VALUE,VALUE")
        address = terms.get(name, name)
        if address in axes:
            raise UserError(f"--axis {name} is given twice")
        if address in settings.get("terms", ()):
            settings["terms"] = {t: w for t, w in settings["terms"].items() if t != address}
        kind = _kind(registry.load(address, "term"), network)
        try:
            axes[address] = [_value(value, kind) for value in values.split(",")]
        except ValueError:
            numbers = "whole numbers" if kind is int else "numbers"
            raise UserError(f"--axis {word}: give {numbers}") from None
    options = {k: v for k, v in vars(given).items() if k != "axis"}
    return sweep(axes), Options(**{**options, "settings": settings})


def _kind(name: str, network: str) -> type | None:
    """Return the type of an axis's values; None for options that have no several numbers."""
    if name in SETTINGS:
        return type(getattr(RunConfig(), name))
    if name in (*registry.BUILT_IN_TERMS, *registry.TERMS):
        return float
    term, dot, option = name.partition(".")
    function = registry.TERMS.get(term, "") if dot else registry.NETWORKS[network].function
    default = (registry.options_of(function) or {}).get(option or name)
    return tuple if isinstance(default, tuple) else None


def _value(word: str, kind: type | None) -> Any:  # noqa: ANN401 - of any kind
    if kind is tuple or (kind is None and re.fullmatch(r"\d+(x\d+)+", word)):
        return tuple(map(option_value, [] if word == "none" else word.split("x")))
    return option_value(word) if kind is None else kind(word)


def main(args: Sequence[str] | None = None) -> None:
    """Run a sweep from its command line; the exit codes are those of `clear_errors`."""
    with clear_errors(args) as terminal:
        study, options = parse(args)
        execute(partial(make_plan, study, options), options, terminal)


if __name__ == "__main__":
    main()
