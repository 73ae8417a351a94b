"""Which value of a setting is best, or which values of two?

`--axis learning_rate=1e-4,1e-3` sweeps a setting, `--axis width=16,32` an option of the network,
`--axis mmd=0,10` the weight of a loss term and `--axis mmd.bandwidth=0.5,1` its option. A second
`--axis` is combined with the first. Widths have an x: `--axis hidden=256x64,128`.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from tyro.conf import UseAppendAction, arg

from analysis import frames, plots
from analysis.tables import plain, plus_minus
from harness import registry
from harness.config import RunConfig, UserError
from studies.runner import answers
from studies.runner.cli import clear_errors, execute, read
from studies.runner.options import NAMED, SETTINGS, Common, Options, setting_options, terms, text
from studies.runner.study import TABLE, Axis, Source, Study, make_plan, read_value, with_named

log = logging.getLogger(__name__)

NAME = "sweep"


@dataclass(frozen=True)
class SweepOptions(Common):
    """Options of a sweep's command line.

    Attributes:
        axis: a setting and its values, NAME=VALUE,VALUE, at most twice; the option of a network or
            a term that is swept too comes second. The weight that --term gives a term is replaced.
        seeds: repetitions of every point (3).
    """

    axis: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="NAME=VALUE,VALUE")] = ()
    seeds: int | None = None


def sweep(axes: Mapping[str, Sequence[Any]]) -> Study:
    """Return the study of one or two axes: `run(sweep({"kl_weight": (0.1, 1)}), seeds=2)`.

    Args:
        axes: name -> values, as `Axis` has them; a term's name and a network may be FILE.py:NAME.
            The first of two is the study's group.
    """
    swept, words = list[Axis](), list[str]()
    for address, values in axes.items():
        if address in ("seed", *NAMED):
            give = "--seeds N" if address == "seed" else "the name of one term or option"
            raise UserError(f"axis {address!r}: give {give} instead")
        given = Axis(address, values).values
        words += ["--axis", f"{address}={','.join(text(v).replace(',', 'x') for v in given)}"]
        if address == "model":
            given = tuple(registry.load(value, "network") for value in given)
        if len(set(given)) < len(given):
            raise UserError(f"{words[-1]}: give every value once")
        swept.append(Axis(registry.load(address, "term"), given))
    names = [axis.name for axis in swept]
    if len(set(names)) < len(axes) or len(axes) not in (1, 2):
        which = f"axes {', '.join(names)}: give" if names else "give --axis NAME=VALUE,VALUE:"
        raise UserError(f"{which} one, or two of different names")
    group, axis = names[0] * (len(names) - 1), swept[-1]

    def apply(config: RunConfig, value: object, data: Source) -> RunConfig:
        try:
            return _set(config, axis.name, value, group)
        except UserError as error:
            if not group:
                raise
            point = f"{group}={text(config.named()[group])}, {axis.name}={text(value)}: "
            raise UserError(f"{point}{error}") from None

    def groups(base: RunConfig, data: Source) -> Mapping[str, Mapping[str, Any]]:
        return {text(v): vars(_set(base, group, v)) for v in swept[0].values}

    lines = f"Test metrics against {axis.name}; dashed, the exact linear model."
    figures = plots.usual(axis.name, lines, group)
    if group:
        heat_map = partial(plots.heat_map, rows=group, columns=axis.name)
        figures = {"heat_map": (heat_map, plots.HEAT_MAP_CAPTION), **figures}
    return Study(
        name=re.sub(r"[^A-Za-z0-9._-]", "_", "-".join([NAME, *names])),
        question=f"Which {' and '.join(names)} {'are' if group else 'is'} best?",
        base=RunConfig(),
        axis=Axis(axis.name, axis.values, apply),
        figures=figures,
        answer=partial(best_point, axes=names),
        group=group,
        groups=groups if group else Study.groups,
        group_values={text(value): value for value in swept[0].values} if group else {},
        objective="",
        table=(*TABLE, *(f"term/{name.partition('.')[0]}" for name in names)),
        start=("-m", f"studies.{NAME}", *words),
        first={a.name: a.values[0] for a in swept if a.name in ("lr_factor", "lr_milestones")},
    )


def _set(config: RunConfig, name: str, value: object, earlier: str = "") -> RunConfig:
    if name == "latent" and value == "deterministic" and earlier != "kl_weight":
        config = config.replace(kl_weight=0.0)  # the default of such a latent
    if name in ("hidden", "channels") and name not in registry.NETWORKS[config.model].settings:
        model = "mlp" if name == "hidden" else "conv"
        raise UserError(f"axis {name!r} with model={config.model!r}: only {model} has it")
    return with_named(config, name, value)


def best_point(frame: frames.Frame, axes: Sequence[str]) -> str:
    """Return which value of the second axis is best for each of the first, on validation data."""
    keys, metric = [*axes], frames.compared(frame)
    val, sentences = f"val/{metric}", list[str]()
    if len(keys) > 1:
        means = frames.along_axis(frame, keys, [val])
        lowest = means.loc[means.groupby(keys[0], sort=False)[val].idxmin()]
        each = [
            f"{keys[0]} = {plain(row[keys[0]], 6)}: {plain(row[keys[1]], 6)} "
            f"({plus_minus(row, val)})"
            for _, row in lowest.iterrows()
        ]
        sentences.append(f"The best {keys[1]} for each {keys[0]}: {'; '.join(each)}.")
    if metric == "loss" or {"likelihood", "binarization"}.intersection(keys):
        sentences.append(f"Where an axis changes objective or data, {metric} does not rank runs.")
    return " ".join(sentences)


def parse(args: Sequence[str] | None = None) -> tuple[Study, Options]:
    """Return the study that a command line describes, and its options; else UserError."""
    given = read(SweepOptions, NAME, __doc__ or "", args, setting_options(RunConfig(), {}))
    settings = dict(given.settings)
    network = RunConfig(model=registry.load(settings.get("model", "mlp"), "network")).model
    given_terms = {registry.load(term, "term"): term for term in settings.get("terms", ())}
    axes = dict[str, list[Any]]()
    for word in given.axis:
        name, _, values = word.partition("=")
        if not (name and values):
            raise UserError(f"--axis {word}: write NAME=VALUE,VALUE")
        address = given_terms.get(name, name)
        if address in axes:
            raise UserError(f"--axis {name} is given twice")
        if address in settings.get("terms", ()):
            settings["terms"] = {t: w for t, w in settings["terms"].items() if t != address}
        like = _like(registry.load(address, "term"), network)
        several = r".+x.+" if isinstance(like, tuple) else r"\d+(x\d+)+" if like is None else "$"
        words = [v.replace("x", ",") if re.fullmatch(several, v) else v for v in values.split(",")]
        axes[address] = [read_value(name, value, like) for value in words]
    options = {k: v for k, v in vars(given).items() if k != "axis"}
    study = sweep(axes)
    notes = [f"One value of {k}: nothing to compare." for k, v in axes.items() if len(v) == 1]
    for note in filter(None, [*notes, answers.few_seeds(given.seeds or 3)]):
        log.info(note)
    return study, Options(**{**options, "settings": settings})


def _like(name: str, network: str) -> Any:  # noqa: ANN401 - of any kind
    """Return a value like those of an axis, None for an option, unless its default is a tuple."""
    if name in SETTINGS and name not in NAMED:
        return getattr(RunConfig(), name)
    if name in terms():
        return 1.0
    term, dot, option = name.partition(".")
    function = registry.TERMS.get(term, "") if dot else registry.NETWORKS[network].function
    default = (registry.options_of(function) or {}).get(option or name)
    return default if isinstance(default, tuple) else None


def main(args: Sequence[str] | None = None) -> None:
    """Run a sweep from its command line; the exit codes are those of `clear_errors`."""
    with clear_errors(args) as terminal:
        study, options = parse(args)
        execute(partial(make_plan, study, options), options, terminal)


if __name__ == "__main__":
    main()
