"""Studies: a question, the settings that are swept to answer it, and the plan of its runs."""

from __future__ import annotations

import difflib
import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness import registry
from harness.config import Options as Named
from harness.config import RunConfig, UserError, checked_name, whole
from harness.errors import checked_text, listed
from harness.tracking.addresses import without_secrets
from studies.runner.options import (
    ELSEWHERE,
    READ_WITH,
    SETTINGS,
    Places,
    arguments,
    chosen,
    option_value,
    read_named,
    start_words,
    terms,
    text,
    words,
)
from studies.runner.proposers import SELECTION, Cell, Listed, Proposer, repeated
from studies.runner.terminal import counted

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    from matplotlib.figure import Figure

    from harness.data.dataset import Dataset
    from studies.runner.options import Common, Options
    from studies.runner.summary import Ended, Findings

BLOG_WEIGHT = 1.0  # the blog's KL weight: decoder variance 0.5 pixel² (normalisation "pixels")


class Source(NamedTuple):
    """The properties of a dataset on which a plan depends, known before the data are loaded.

    `calibrated` is a KL weight near calibration_ratio = 1 with 10 latents and mode "pixels",
    `epochs` the default; `words` are its options on a command line, without the folder of the
    user's files, "" of tensors; `settings` identify it, the user's data by a digest too. `images`
    are those of the training split.
    """

    name: str
    pixels: int
    calibrated: float
    epochs: int
    words: str
    settings: Mapping[str, Any]
    images: int
    channels: int = 1


# Weights of digits and mnist are measured by `python -m studies.kl_weight`, the others guessed from
# their variance.
KNOWN = {
    name: Source(name, pixels, calibrated, epochs, f"--dataset {name}", {"dataset": name}, images)
    for name, pixels, calibrated, epochs, images in (
        ("digits", 64, 0.02, 50, 1_280),
        ("mnist", 784, 0.05, 20, 55_000),
        ("fashion_mnist", 784, 0.03, 20, 55_000),
        ("kmnist", 784, 0.1, 20, 55_000),
    )
}


def read_own(options: Common) -> Dataset | None:
    """Load the user's data, on which a plan depends; return None for a dataset of `KNOWN`."""
    if options.dataset in KNOWN and not {*READ_WITH} & chosen(options).keys():
        return None
    import harness

    given = {name: getattr(options, name) for name in READ_WITH}
    return harness.load_dataset(options.dataset, options.data_dir, **given)


def source(name: str, own: Dataset | None) -> Source:
    """Return the source of a dataset by its name, or of the user's `own` data.

    The calibrated weight of a user's data is guessed: half the variance of a pixel. With 10 latents
    the best weight is 0.3 times the variance on digits and 0.7 times on MNIST.
    """
    if own is None:
        return KNOWN[name]
    kind, colon, path = name.partition(":")
    known = [f"{kind}:{Path(path).expanduser().resolve().name}"]
    for option, value in own.options.items():
        known += [
            f"--{option.replace('_', '-')}",
            *words(tuple(value) if isinstance(value, list) else value),
        ]
    line = f"--dataset {shlex.join(known)}" if colon else ""
    epochs = KNOWN["digits" if len(own.train) < 10_000 else "mnist"].epochs
    counts = [len(own.train), len(own.val), len(own.test)]
    settings = {"dataset": own.name, "dataset_digest": own.digest, "dataset_images": counts}
    weight, channels = own.pixel_variance / 2, own.image_shape[0] if own.is_image else 1
    return Source(own.name, own.pixels, weight, epochs, line, settings, counts[0], channels)


def sets_variance(config: RunConfig) -> bool:
    """Return whether the KL weight sets the decoder's variance."""
    is_set = config.sigma == "fixed" and config.likelihood == "gaussian"
    return is_set and not {"capacity", "rate_floor"} & set(config.terms)


def with_variance(config: RunConfig, variance: float, data: Source) -> RunConfig:
    """Set the KL weight that means a decoder variance in the configuration's normalisation."""
    from harness.objective import with_decoder_variance  # loads torch

    return with_decoder_variance(config, variance, data.pixels)


def calibrated(config: RunConfig, data: Source) -> RunConfig:
    """Set the calibrated KL weight; where it sets no variance, that of an exact ELBO (beta 1).

    A Laplace decoder gets the standard deviation of the calibrated Gaussian one.
    """
    from harness.objective import beta, decoder_std  # loads torch

    if sets_variance(config):
        return with_variance(config, data.calibrated / 2, data)
    if (unit := decoder_std(config.replace(kl_weight=1.0), data.pixels)) > 0:  # no NaN
        return config.replace(kl_weight=math.sqrt(data.calibrated / 2) / unit)
    return config.replace(kl_weight=1 / beta(config.replace(kl_weight=1.0), data.pixels))


# Columns of a summary table: last and best validation neg_elbo, then test metrics.
TABLE = (
    *("val/neg_elbo", "best/val/neg_elbo", "best/epoch"),
    *("neg_elbo", "mse", "rate", "calibration_ratio", "active_units"),
)


class Axis:
    """The quantity that a study sweeps.

    Args:
        name: column of the frames and axis of the figures.
        values: at least one; numbers, names, tuples of whole numbers, or options by name.
        apply: (config, value, source of the data) -> config; by default the field `name` is set,
            else the option of the registered network, the weight of the term or `TERM.OPTION`.
    """

    def __init__(
        self,
        name: str,
        values: Sequence[Any],
        apply: Callable[[RunConfig, Any, Source], RunConfig] | None = None,
    ) -> None:
        self.name, self.values = name, tuple(map(_hashable, values))
        if not values:
            raise UserError(f"axis {name!r} has no values: give at least one")
        self.apply = apply or (lambda config, value, data: with_named(config, name, value))
        first = self.values[0]
        of_any_kind = apply is None and name not in SETTINGS and not isinstance(first, tuple)
        self._like = None if of_any_kind else first

    def read(self, value: Any) -> Any:  # noqa: ANN401 - of any kind
        """Return a value given by the user; text is read as `read_value` does."""
        return read_value(self.name, value, self._like) if isinstance(value, str) else value


def read_value(name: str, word: str, like: Any) -> Any:  # noqa: ANN401 - of any kind
    """Return a value of an axis from text: of the kind of another value, for None of any kind.

    "512,256" is a tuple on an axis of tuples, and "none" an empty one.
    """
    if isinstance(like, str):
        return word
    if isinstance(like, tuple | Named):
        parts = [] if word == "none" else word.removesuffix(",").split(",")
        named = isinstance(like, Named)
        return _hashable(read_named(name, parts) if named else [option_value(p) for p in parts])
    value = option_value(word)
    if like is not None and not isinstance(value, int | float):
        raise UserError(f"{name}={word}: give a number")
    return float(value) if isinstance(like, float) else value


def with_named(config: RunConfig, name: str, value: Any) -> RunConfig:  # noqa: ANN401 - any kind
    """Set a field, an option of the network, the weight of a term or a term's option, by name."""
    if name in registry.SETTINGS:
        value = registry.load(value, registry.SETTINGS[name])
    if name in SETTINGS:
        return config.replace(**{name: value})
    allowed = registry.options_of(registry.NETWORKS[config.model].function)
    is_option = "." not in name and (allowed is None or name in allowed)
    term, dot, option = name.partition(".")
    if name in terms():
        if allowed is not None and is_option:
            given = f"axis {name!r} is a term and an option of network {config.model!r}"
            raise UserError(f"{given}; rename one")
        return config.replace(terms={**config.terms, name: value})
    if dot and term in config.terms:
        of_term = {**config.term_options.get(term, {}), option: value}
        return config.replace(term_options={**config.term_options, term: of_term})
    if is_option:
        return config.replace(model_options={**config.model_options, name: value})
    known = [*SETTINGS, *(allowed or ()), *terms()]
    close = difflib.get_close_matches(name, known, 1)
    raise UserError(
        f"axis {name!r} is no setting of RunConfig that can be swept, no option of network "
        f"{config.model!r} or of the run's terms, and no term; "
        + (f"did you mean {close[0]!r}?" if close else f"choose among {', '.join(SETTINGS)}")
    )


def _hashable(value: Any) -> Any:  # noqa: ANN401 - of any kind
    if isinstance(value, Mapping):
        return Named(sorted(value.items()))
    value = value.tolist() if hasattr(value, "tolist") else value  # of NumPy or PyTorch
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Study:
    """A question and the parts of its answer, found by sweeping one axis.

    Attributes:
        name: of its experiments, and of its page if it is one: `python -m studies.NAME`.
        question: the page's docstring.
        base: settings shared by all runs.
        axis: the quantity that is swept.
        figures: file name -> (frame -> figure, caption).
        answer: function of the frame of runs that returns sentences.
        group: column of the groups, "" without groups.
        groups: (base, source of the data) -> {group: changes to base}, each with the whole axis.
        group_values: group -> the value that it is, where groups are values of a setting.
        seeds: repetitions where the user gives no number.
        epochs: source of the data -> epochs where the user gives no number.
        objective: validation metric by which points and epochs are compared; "" means val/neg_elbo
            where every run has it, else val/loss, which then replaces it in the table.
        table: columns of the summary table.
        reference: axis value that all points are compared with; None means the best point.
        compared: frame of runs -> those that are ranked.
        ranking: metric of the best run, where it is not the objective; runs without it rank last.
        prepare: frame of runs -> the frame with further columns, for table, figures and answer.
        merges: whether points of one configuration are one, named by the first; the names of the
            others are its parameter "equal".
        start: words after `python` that start it, unless they are those of its page or file.
        first: values of swept settings without which the base is refused.
    """

    name: str
    question: str
    base: RunConfig
    axis: Axis
    figures: Mapping[str, tuple[Callable[[pd.DataFrame], Figure], str]]
    answer: Callable[[pd.DataFrame], str]
    group: str = ""
    groups: Callable[[RunConfig, Source], Mapping[str, Mapping[str, Any]]] = lambda *_: {"": {}}
    group_values: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 3
    epochs: Callable[[Source], int] = lambda data: data.epochs
    objective: str = SELECTION
    table: tuple[str, ...] = TABLE
    reference: Any = None
    compared: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame
    ranking: str = ""
    prepare: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame
    merges: bool = False
    start: tuple[str, ...] = ()
    first: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked_name(self.name)
        if not (self.question or "").strip():
            raise UserError(f"study {self.name!r} has no question: set `question`")

    @property
    def columns(self) -> list[str]:
        """Columns of a frame of runs that hold a point: the group, if any, and the axis."""
        return [*([self.group] if self.group else []), self.axis.name]


@dataclass(frozen=True)
class Plan:
    """A study before it starts; the only form of a study that the runner takes.

    Attributes:
        page: first part of its experiment's name.
        name: of the Optuna study, and tag of its runs.
        configs: the runs; of a search, its base as often as it trains.
        words: the command line that repeats it, but for its name; of tensors, the arguments of
            `run`.
        confirm: Optuna study without trials left -> the runs that confirm its best one.
        summary_key: changes when a new summary of the same runs is to be recorded.
        start: words after `python` that start it, before its options.
        refit: test images to which the posteriors of its runs are refitted for the summary.
        vary: (its name, options=...) -> the command line with other options, "" if it is refused.
    """

    page: str
    question: str
    name: str
    source: Source
    configs: Sequence[RunConfig] = field(repr=False)
    proposer: Proposer = field(repr=False)
    find: Callable[[Ended], Findings] = field(repr=False)
    words: str
    sentence: str
    objective: str = SELECTION
    confirm: Callable[[optuna.Study], Proposer] | None = None
    summary_key: str = ""
    start: Sequence[str] = ()
    refit: int = 0
    vary: Callable[..., str] = field(default=lambda name, **changes: "", repr=False)

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment: one per study and dataset."""
        return f"{self.page}-{self.source.name}"

    @property
    def command(self) -> str:
        """The command line that repeats the study; of tensors, the call in Python."""
        if self.source.words:
            return f"{self.words} --study-name {self.name}"
        digest = self.source.settings["dataset_digest"][:12]
        about = f"STUDY: {self.page!r}, DATA: dataset {self.source.name!r}, digest {digest}"
        return f"run(STUDY, {self.words}, study_name={self.name!r})  # {about}"


def make_plan(study: Study, options: Options, own: Dataset | None = None) -> Plan:
    """Return the plan of a study; all settings are checked here, before anything is written.

    The user's own data, if given, take the place of `options.dataset`.
    """
    seeds = study.seeds if options.seeds is None else options.seeds
    whole("seeds", seeds, at_least=1)
    whole("refit", options.refit, at_least=0)
    asked = study
    axis, given = study.axis, options.values
    if study.start and given is not None:
        raise UserError(f"values={list(given)}: give those of a sweep with its axes")
    values = axis.values if given is None else tuple(_hashable(axis.read(value)) for value in given)
    if not values or len(set(values)) < len(values):
        raise UserError(f"--values {list(values)}: give at least one, and every value once")
    data = source(options.dataset, own)
    name = options.named(f"{study.name}-{data.name}")
    base = options.base(study.base, study.epochs(data), study.first)
    points = {
        (group, value): axis.apply(base.replace(**changes), value, data)
        for group, changes in study.groups(base, data).items()
        for value in values
    }
    equal = dict[RunConfig, list[Any]]()
    if study.merges:
        for (_, value), config in points.items():
            equal.setdefault(config, []).append(value)
        points = {("", same[0]): config for config, same in equal.items()}
        values = tuple(value for _, value in points)
    if not study.objective:
        exact = all(c.has_likelihood and c.latent == "stochastic" for c in points.values())
        metric = "neg_elbo" if exact else "loss"
        table = tuple(column.replace("neg_elbo", metric) for column in study.table)
        study = replace(study, objective=f"val/{metric}", table=table)
    texts = shown_values(values)
    cells = list[Cell]()
    for (group, value), config in points.items():
        check_objective(study.name, config, study.objective, own)
        for setting in options.settings:
            chosen = getattr(base, setting)
            if _given_part(getattr(config, setting), chosen) != chosen:
                raise UserError(f"{setting}={chosen}: {study.name} sweeps it; leave it out")
        written = texts[value] if axis.name == "condition" else f"{axis.name}={texts[value]}"
        named = f"{study.group}={group}" if study.start else group  # an axis as well
        label = f"{named}, {written}" if group else written
        params = {study.group: group} if study.group else {}
        params[axis.name] = text(value)
        if others := equal.get(config, [])[1:]:
            params["equal"] = ", ".join(map(text, others))
        cells += repeated(label, {"group": group, "value": value}, config, range(seeds), params)
    varied = {"seed", axis.name, study.group}
    shared = {k: v for k, v in json.loads(base.to_json()).items() if k not in varied}
    of_group = f" of {study.group}" if study.start else ""
    groups = counted(len(points) // len(values), "value" if study.start else "group")
    groups = f" x {groups}{of_group}" if study.group else ""
    start = study.start or start_words(study.name)
    effective = replace(options, seeds=seeds, values=None if given is None else values)
    numbers = [*dict.fromkeys(cell.config.epochs for cell in cells)]
    epochs = " or ".join([*map(str, numbers[:-1]), counted(numbers[-1], "epoch")])
    return Plan(
        page=study.name,
        question=study.question,
        name=name,
        source=data,
        configs=[cell.config for cell in cells],
        proposer=Listed(
            cells, {**data.settings, **shared, **parts(points.values())}, (study.objective,)
        ),
        find=partial(_find, study),
        words=command(start, data, effective, base, study.columns),
        sentence=f"{counted(len(values), 'value')} of {axis.name} ({listed(texts.values())})"
        f"{groups} x {counted(seeds, 'seed')} = {counted(len(cells), 'run')} of {epochs}",
        objective=study.objective,
        summary_key=f"refit={options.refit}" if options.refit else "",
        refit=options.refit,
        start=start,
        vary=partial(_vary, asked, options, own),
    )


def _vary(study: Study, options: Options, own: Dataset | None, name: str, **changes: Any) -> str:
    """Return the command line of a study with other options, in the same stores; "" if refused.

    Other epochs make it another study.
    """
    if study.start and "values" in changes:  # of a sweep, whose axes are in its command
        values = tuple(map(_hashable, changes.pop("values")))
        address, _, _ = study.start[-1].partition("=")
        written = ",".join(text(value).replace(",", "x") for value in values)
        axis = Axis(study.axis.name, values, study.axis.apply)
        study = replace(study, axis=axis, start=(*study.start[:-1], f"{address}={written}"))
    if "epochs" in changes:
        changes["settings"] = {**options.settings, "epochs": changes.pop("epochs")}
    try:
        words = make_plan(study, replace(options, **changes), own).words
    except UserError:
        return ""
    places = same_places(options, name, fresh="settings" in changes)
    if own is None or source(options.dataset, own).words:
        return shlex.join([*shlex.split(words), *arguments(places)])
    named = [f"{k}={v!r}" for k, v in chosen(places, ("data_dir",)).items()]
    return f"run(STUDY, {', '.join([words, *named])})"


def same_places(options: Places, name: str, *, fresh: bool = False) -> Places:
    """Return where a study of a name is run in the same stores; addresses with secrets are left."""
    where = {k: getattr(options, k) for k in ("data_dir", "device", "storage", "tracking_uri")}
    where = {k: v for k, v in where.items() if v and without_secrets(str(v)) == str(v)}
    return Places(study_name=name, fresh=fresh, **where)


def _given_part(value: Any, given: Any) -> Any:  # noqa: ANN401 - of any kind
    """Return the part of a setting that the user gave; an axis may add options beside them."""
    if not isinstance(value, Mapping) or not isinstance(given, Mapping):
        return value
    if not given:
        return given
    return {name: _given_part(value.get(name), one) for name, one in given.items()}


def parts(configs: Iterable[RunConfig]) -> dict[str, dict[str, str]]:
    """Return the digests of the files of all user's parts, as a setting of a study."""
    used = [registry.sources(config) for config in configs]
    texts = {" ".join(part): text for found in used for part, text in found.items()}
    return {"parts": {part: registry.digest(t) for part, t in texts.items()}} if texts else {}


def shown_values(values: Sequence[Any]) -> dict[Any, str]:
    """Write values in as few digits as distinguish them, but at least three."""
    for digits in range(3, 18):
        texts = [f"{v:.{digits}g}" if isinstance(v, float) else text(v) for v in values]
        if len(set(texts)) == len(texts):
            break
    return dict(zip(values, texts, strict=True))


def command(
    start: Sequence[str], data: Source, options: Common, base: RunConfig, swept: Sequence[str] = ()
) -> str:
    """Return the command line that repeats a study, but for its name, stores and device.

    Of tensors, return the arguments of `run`.
    """
    effective = replace(options, settings={"epochs": base.epochs, **options.settings})
    left_out = ("dataset", *READ_WITH, *swept, *ELSEWHERE)
    if not data.words:
        named = chosen(effective, left_out).items()
        return ", ".join(["data=DATA", *(f"{name}={value!r}" for name, value in named)])
    words = [shlex.join(["python", *start]), data.words, shlex.join(arguments(effective, left_out))]
    return " ".join(checked_text(word) for word in words if word)


def _find(study: Study, ended: Ended) -> Findings:
    from studies.runner.summary import compare_points  # PyTorch, MLflow and pandas

    return compare_points(study, ended)


def check_objective(page: str, config: RunConfig, objective: str, own: Dataset | None) -> None:
    """Refuse a configuration that is not for the user's data, or without a metric to compare."""
    if own is not None:
        from harness.training.engine import check_data  # PyTorch, which loaded them

        check_data([config], own)
    if not objective.endswith("neg_elbo"):
        return
    if not config.has_likelihood:
        raise UserError(
            f"likelihood={config.likelihood!r}: of grey pixels it is no likelihood, and {page} "
            "compares neg_elbo; give --binarization stochastic or threshold"
        )
    if config.latent == "deterministic":
        raise UserError(f"latent='deterministic': it has no neg_elbo, which {page} compares")
