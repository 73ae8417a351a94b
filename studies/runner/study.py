"""Studies: a question, the settings that are swept to answer it, and the plan of its runs."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from harness import registry
from harness.config import Options as Named
from harness.config import RunConfig, UserError, checked_name
from studies.runner.options import (
    ELSEWHERE,
    PARTS,
    SETTINGS,
    arguments,
    at_least,
    option_value,
    program,
    text,
)
from studies.runner.proposers import SELECTION, Cell, Listed, Proposer, repeated

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
    user's images; `settings` identify it, the user's images by a digest too.
    """

    name: str
    pixels: int
    calibrated: float
    epochs: int
    words: str
    settings: Mapping[str, Any]


# Weights of digits and mnist are measured by `python -m studies.kl_weight`, the others guessed from
# their variance.
KNOWN = {
    name: Source(name, pixels, calibrated, epochs, f"--dataset {name}", {"dataset": name})
    for name, pixels, calibrated, epochs in (
        ("digits", 64, 0.02, 50),
        ("mnist", 784, 0.05, 20),
        ("fashion_mnist", 784, 0.03, 20),
        ("kmnist", 784, 0.1, 20),
    )
}


def read_images(name: str, image_size: Sequence[int] | None) -> Dataset | None:
    """Load the user's images, on which a plan depends; return None for any other dataset."""
    if not name.startswith("folder:"):
        if image_size is not None:
            raise UserError("--image-size: only images of --dataset folder:PATH are resized")
        return None
    import harness

    return harness.load_dataset(name, image_size=image_size)


def source(name: str, images: Dataset | None) -> Source:
    """Return the source of a dataset; `images` are the user's, if it is made of them.

    The calibrated weight of a user's images is guessed: half the variance of a pixel. With 10
    latents the best weight is 0.3 times the variance on digits and 0.7 times on MNIST.
    """
    if images is None:
        if name not in KNOWN:
            raise UserError(f"dataset={name!r}: choose one of {', '.join(KNOWN)}, or folder:PATH")
        return KNOWN[name]
    _, height, width = images.image_shape
    folder = shlex.quote(images.name.removeprefix("folder-"))
    words = f"--dataset folder:{folder} --image-size {height} {width}"
    epochs = KNOWN["digits" if len(images.train) < 10_000 else "mnist"].epochs
    counts = [len(images.train), len(images.val), len(images.test)]
    settings = {"dataset": images.name, "dataset_digest": images.digest, "dataset_images": counts}
    return Source(images.name, images.pixels, images.pixel_variance / 2, epochs, words, settings)


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
        self._is_option = apply is None and name not in SETTINGS
        kind = type(self.values[0]) if apply else get_type_hints(RunConfig).get(name, str)
        self.kind = str if isinstance(self.values[0], tuple | Named) else kind

    def read(self, value: Any) -> Any:  # noqa: ANN401 - of any kind
        """Return a value given by the user; "512,256" becomes a tuple on an axis of tuples."""
        first = self.values[0]
        if self._is_option and isinstance(value, str):
            found = option_value(value)
            single = isinstance(first, tuple) and not isinstance(found, tuple)
            return (found,) if single else found
        if not isinstance(value, str) or not isinstance(first, tuple | Named):
            return _hashable(value)
        parts = [] if value == "none" else value.split(",")
        try:
            if isinstance(first, tuple):
                return tuple(map(int, parts))
            return _hashable({k: float(w) for k, w in (part.split("=") for part in parts)})
        except ValueError:
            form = "512,256" if isinstance(first, tuple) else "name=0.5"
            raise UserError(f"--values {value}: write values as {form}, or none") from None


def with_named(config: RunConfig, name: str, value: Any) -> RunConfig:  # noqa: ANN401 - any kind
    """Set a field, an option of the network, the weight of a term or a term's option, by name."""
    if name in PARTS:
        value = registry.load(value, PARTS[name])
    if name in SETTINGS:
        return config.replace(**{name: value})
    allowed = registry.options_of(registry.NETWORKS[config.model].function)
    is_option = "." not in name and (allowed is None or name in allowed)
    term, dot, option = name.partition(".")
    if name in (*registry.BUILT_IN_TERMS, *registry.TERMS):
        if allowed is not None and is_option:
            given = f"axis {name!r} is a term and an option of network {config.model!r}"
            raise UserError(f"{given}; rename one")
        return config.replace(terms={**config.terms, name: value})
    if dot and term in config.terms:
        of_term = {**config.term_options.get(term, {}), option: value}
        return config.replace(term_options={**config.term_options, term: of_term})
    if is_option:
        return config.replace(model_options={**config.model_options, name: value})
    raise UserError(
        f"axis {name!r} is no setting of RunConfig that can be swept, no option of network "
        f"{config.model!r} or of the run's terms, and no term; give a function `apply` that sets "
        f"it, or choose among {', '.join(SETTINGS)}"
    )


def _hashable(value: Any) -> Any:  # noqa: ANN401 - of any kind
    if isinstance(value, Mapping):
        return Named(sorted(value.items()))
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
        seeds: repetitions where the user gives no number.
        objective: validation metric by which points and epochs are compared.
        table: columns of the summary table.
        reference: axis value that all points are compared with; None means the best point.
    """

    name: str
    question: str
    base: RunConfig
    axis: Axis
    figures: Mapping[str, tuple[Callable[[pd.DataFrame], Figure], str]]
    answer: Callable[[pd.DataFrame], str]
    group: str = ""
    groups: Callable[[RunConfig, Source], Mapping[str, Mapping[str, Any]]] = lambda *_: {"": {}}
    seeds: int = 3
    objective: str = SELECTION
    table: tuple[str, ...] = TABLE
    reference: Any = None

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
        page: name of the study's module or file, and first part of its experiment's name.
        name: of the Optuna study, and tag of its runs.
        configs: the runs; of a search, its base as often as it trains.
        words: the command line that repeats it, but for its name.
        confirm: Optuna study without trials left -> the runs that confirm its best one.
        summary_key: changes when a new summary of the same runs is to be recorded.
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

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment: one per study and dataset."""
        return f"{self.page}-{self.source.name}"

    @property
    def command(self) -> str:
        """The command line that repeats the study."""
        return f"{self.words} --study-name {self.name}"


def make_plan(study: Study, options: Options[Any], images: Dataset | None = None) -> Plan:
    """Return the plan of a study; all settings are checked here, before anything is written.

    The user's images, if given, take the place of `options.dataset`.
    """
    seeds = study.seeds if options.seeds is None else options.seeds
    at_least(1, seeds=seeds)
    axis, given = study.axis, options.values
    values = axis.values if given is None else tuple(map(axis.read, given))
    if not values or len(set(values)) < len(values):
        raise UserError(f"--values {list(values)}: give at least one, and every value once")
    data = source(options.dataset, images)
    name = options.named(f"{study.name}-{data.name}")
    base = options.base(study.base, data.epochs)
    points = {
        (group, value): axis.apply(base.replace(**changes), value, data)
        for group, changes in study.groups(base, data).items()
        for value in values
    }
    texts = _distinct(values)
    cells = list[Cell]()
    for (group, value), config in points.items():
        check_objective(study.name, config, study.objective)
        for setting in options.settings:
            chosen = getattr(base, setting)
            if _given_part(getattr(config, setting), chosen) != chosen:
                raise UserError(f"{setting}={chosen}: {study.name} sweeps it; leave it out")
        written = texts[value] if axis.name == "condition" else f"{axis.name}={texts[value]}"
        label = f"{group}, {written}" if group else written
        params = {study.group: group} if study.group else {}
        params[axis.name] = text(value)
        cells += repeated(label, {"group": group, "value": value}, config, range(seeds), params)
    varied = {"seed", axis.name, study.group}
    shared = {k: v for k, v in json.loads(base.to_json()).items() if k not in varied}
    groups = f" x {len(points) // len(values)} groups" if study.group else ""
    epochs = " or ".join(dict.fromkeys(str(cell.config.epochs) for cell in cells))
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
        words=command(study.name, data, replace(options, seeds=seeds), base, axis.name),
        sentence=f"{len(values)} values of {axis.name} ({', '.join(texts.values())}){groups} x "
        f"{seeds} seeds = {len(cells)} runs of {epochs} epochs",
        objective=study.objective,
    )


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


def _distinct(values: Sequence[Any]) -> dict[Any, str]:
    """Write values in as few digits as distinguish them, but at least three."""
    for digits in range(3, 18):
        texts = [f"{v:.{digits}g}" if isinstance(v, float) else text(v) for v in values]
        if len(set(texts)) == len(texts):
            break
    return dict(zip(values, texts, strict=True))


def command(page: str, data: Source, options: Common, base: RunConfig, axis: str = "") -> str:
    """Return the command line that repeats a study, but for its name, stores and device."""
    effective = replace(options, settings={"epochs": base.epochs, **options.settings})
    left_out = ("dataset", "image_size", axis, *ELSEWHERE)
    words = [program(page), data.words, shlex.join(arguments(effective, left_out))]
    return " ".join(word for word in words if word)


def _find(study: Study, ended: Ended) -> Findings:
    from studies.runner.summary import compare_points  # PyTorch, MLflow and pandas

    return compare_points(study, ended)


def check_objective(page: str, config: RunConfig, objective: str = SELECTION) -> None:
    """Refuse a configuration without the metric by which a study compares its runs."""
    if not objective.endswith("neg_elbo"):
        return
    if not config.has_likelihood:
        raise UserError(
            f"likelihood={config.likelihood!r}: of grey pixels it is no likelihood, and {page} "
            "compares neg_elbo; give --binarization stochastic or threshold"
        )
    if config.latent == "deterministic":
        raise UserError(f"latent='deterministic': it has no neg_elbo, which {page} compares")
