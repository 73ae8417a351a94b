"""Studies: a question, the settings that are swept to answer it, and the plan of its runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.config import RunConfig, UserError, checked_name
from studies.runner.options import ELSEWHERE, arguments, at_least, program
from studies.runner.proposers import Cell, Listed, Proposer, repeated

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    from matplotlib.figure import Figure

    from harness.data.dataset import Dataset
    from harness.tracking.record import Trained
    from studies.runner.options import Common, Options
    from studies.runner.summary import Ended, Findings


@dataclass(frozen=True)
class Source:
    """What a plan depends on of a dataset, known before the data are loaded.

    Attributes:
        calibrated: a KL weight near calibration_ratio = 1 with 10 latents and mode "pixels".
        epochs: passes over the training split where the user gives no number.
        digest: of the user's images, which a name does not identify; else "".
        images: their number in train, val and test.
        words: options that name it on a command line; of the user's images without the folder.
    """

    name: str
    pixels: int
    calibrated: float
    epochs: int
    digest: str = ""
    images: tuple[int, ...] = ()
    words: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two datasets the same, as a study's settings have it."""
        given = {"dataset_digest": self.digest, "dataset_images": list(self.images)}
        return {"dataset": self.name} | (given if self.digest else {})


KNOWN = {
    name: Source(name, pixels, calibrated, epochs, words=f"--dataset {name}")
    for name, pixels, calibrated, epochs in (
        ("digits", 64, 0.02, 50),
        ("mnist", 784, 0.05, 20),
        ("fashion_mnist", 784, 0.03, 20),
        ("kmnist", 784, 0.1, 20),
    )
}
"""Weights of digits and mnist are measured by `python -m studies.kl_weight`, the others guessed
from their variance."""


def read_own(name: str, image_size: Sequence[int] | None) -> Dataset | None:
    """Read the user's images, which a plan depends on; return None for any other dataset."""
    if not name.startswith("folder:"):
        if image_size is not None:
            raise UserError("--image-size: only images of --dataset folder:PATH are resized")
        return None
    import harness

    return harness.load_dataset(name, image_size=image_size)


def source(name: str, own: Dataset | None) -> Source:
    """Return what a plan depends on of a dataset, whose images are given if they are the user's.

    The calibrated weight of a user's images is guessed: half the variance of a pixel. With 10
    latents the best weight is 0.3 times the variance on digits and 0.7 times on MNIST.
    """
    if own is None:
        if name not in KNOWN:
            raise UserError(f"dataset={name!r}: choose one of {', '.join(KNOWN)}, or folder:PATH")
        return KNOWN[name]
    _, height, width = own.image_shape
    folder = own.name.removeprefix("folder-")
    words = f"--dataset folder:{shlex.quote(folder)} --image-size {height} {width}"
    epochs = KNOWN["digits" if len(own.train) < 10_000 else "mnist"].epochs
    images = (len(own.train), len(own.val), len(own.test))
    return Source(own.name, own.pixels, own.pixel_variance / 2, epochs, own.digest, images, words)


Apply = Callable[[RunConfig, Any, Source], RunConfig]
"""(config, value, source of the data) -> config with the value set."""

Groups = Callable[[RunConfig, Source], Mapping[str, Mapping[str, Any]]]
"""(base, source of the data) -> {group: changes to base}."""

TABLE = (
    *("val/neg_elbo", "best/val/neg_elbo", "best/epoch"),
    *("neg_elbo", "mse", "rate", "calibration_ratio", "active_units"),
)
"""Columns of a summary table: last and best validation neg_elbo, then test metrics."""


class Axis:
    """The quantity that a study sweeps.

    Args:
        name: column of the frames and axis of the figures.
        values: at least one, each a number or a word.
        apply: (config, value, source) -> config; by default `name` is a field that is set.
    """

    def __init__(self, name: str, values: tuple[Any, ...], apply: Apply | None = None) -> None:
        plain = all(isinstance(value, str | int | float) for value in values)
        if not values or not plain:
            raise UserError(
                f"axis {name!r} has the values {list(values)}: give at least one, each a number or "
                "a word"
            )
        self.name, self.values = name, tuple(values)
        self.apply = apply or (lambda config, value, data: config.replace(**{name: value}))


@dataclass(frozen=True)
class Study:
    """A question, and all that is needed to answer it by sweeping one axis.

    Attributes:
        name: of its experiments, and of its page if it is one: `python -m studies.NAME`.
        question: the page's docstring.
        base: settings shared by all runs.
        axis: the quantity that is swept.
        figures: file name -> (frame -> figure, caption).
        answer: frame of runs in, sentences out.
        group: column of the groups, "" without groups.
        groups: (base, source of the data) -> {group: changes to base}; the axis is swept in every
            group.
        seeds: repetitions where the user gives no number.
        objective: validation metric by which points and epochs are compared.
        extras: (`Trained`, data) -> further metrics of a finished run, e.g. a linear probe.
        table: columns of the summary table.
        reference: axis value that all others are compared with; None means the best one.
    """

    name: str
    question: str
    base: RunConfig
    axis: Axis
    figures: Mapping[str, tuple[Callable[[pd.DataFrame], Figure], str]]
    answer: Callable[[pd.DataFrame], str]
    group: str = ""
    groups: Groups = lambda base, data: {"": {}}
    seeds: int = 3
    objective: str = "val/neg_elbo"
    extras: Callable[[Trained, Dataset], dict[str, float]] | None = None
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
    """A study before it starts: its runs, and what is made of them. The runner knows no other kind.

    Attributes:
        page: name of the study's module or file, and first part of its experiment's name.
        name: of the Optuna study, and tag of its runs.
        configs: the runs, as far as they are known; at least one.
        find: what ended -> table, answer, figures and pictures.
        words: the command line that repeats it, but for its name.
        sentence: what will be trained.
        study: name of the study in `studies.all` by which a replay finds `extras`.
        confirm: Optuna study without trials left -> what is trained then.
        summary_key: changes when a new summary is to be recorded of the same runs.
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
    objective: str = "val/neg_elbo"
    extras: Callable[[Trained, Dataset], dict[str, float]] | None = None
    study: str | None = None
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


class Point(NamedTuple):
    """A value of the axis in one of the study's groups ("" without groups)."""

    group: str
    value: Any


def written(values: Sequence[Any]) -> dict[Any, str]:
    """Write values in as few digits, but at least three, as distinguish them."""
    for digits in range(3, 18):
        texts = [f"{v:.{digits}g}" if isinstance(v, float) else str(v) for v in values]
        if len(set(texts)) == len(texts):
            break
    return dict(zip(values, texts, strict=True))


def make_plan(study: Study, options: Options[Any], own: Dataset | None = None) -> Plan:
    """Return the plan of a study; all settings are checked here, before anything is written.

    The user's own images, if given, take the place of `options.dataset`.
    """
    seeds = study.seeds if options.seeds is None else options.seeds
    at_least(1, seeds=seeds)
    values = study.axis.values if options.values is None else options.values
    if not values:
        raise UserError("--values: give at least one, or leave it out")
    if len(set(values)) < len(values):
        raise UserError(f"values={list(values)}: give every value once")
    for swept in options.chosen().keys() & {study.axis.name, study.group}:
        advice = "leave it out" if swept == study.group else "choose its values with --values"
        raise UserError(f"{swept}={options.chosen()[swept]}: {study.name} sweeps it; {advice}")
    data = source(options.dataset, own)
    name = options.named(f"{study.name}-{data.name}")
    base = options.base(study.base, data.epochs)
    every = {
        Point(group, value): study.axis.apply(base.replace(**changes), value, data)
        for group, changes in study.groups(base, data).items()
        for value in values
    }
    for config in every.values():
        _check_objective(study, config)
    texts = written(values)
    cells = list[Cell]()
    for point, config in every.items():
        value, axis = texts[point.value], study.axis.name
        named = value if axis == "condition" else f"{axis}={value}"
        label = f"{point.group}, {named}" if point.group else named
        params = {study.group: point.group} if study.group else {}
        params[axis] = point.value
        cells += repeated(label, point._asdict(), config, range(seeds), params)
    varied = {"seed", study.axis.name, study.group}
    shared = {k: v for k, v in json.loads(base.to_json()).items() if k not in varied}
    effective = replace(options, epochs=base.epochs, seeds=seeds)
    return Plan(
        page=study.name,
        question=study.question,
        name=name,
        source=data,
        configs=[cell.config for cell in cells],
        proposer=Listed(cells, {**data.settings, **shared}, (study.objective,)),
        find=partial(_find, study),
        words=command(study.name, data, effective),
        sentence=_sentence(study, every, seeds, texts),
        objective=study.objective,
        extras=study.extras,
        study=study.name,
    )


def command(page: str, data: Source, options: Common) -> str:
    """Return the command line that repeats a study, but for its name, stores and device."""
    left_out = ("dataset", "image_size", *ELSEWHERE)
    words = [program(page), data.words, shlex.join(arguments(options, left_out))]
    return " ".join(word for word in words if word)


def _sentence(study: Study, every: Mapping[Point, RunConfig], seeds: int, texts: Mapping) -> str:
    groups = [group for group in dict.fromkeys(point.group for point in every) if group]
    each = f" x {len(groups)} groups ({', '.join(groups)})" if groups else ""
    epochs = next(iter(every.values())).epochs
    return (
        f"{len(texts)} values of {study.axis.name} ({', '.join(texts.values())}){each} x {seeds} "
        f"seeds = {len(every) * seeds} runs of {epochs} epochs"
    )


def _find(study: Study, ended: Ended) -> Findings:
    from studies.runner.summary import compare_points  # PyTorch, MLflow and pandas

    return compare_points(study, ended)


def check_likelihood(config: RunConfig, page: str) -> None:
    """Refuse a configuration that has no neg_elbo to compare."""
    if not config.has_likelihood:
        raise UserError(
            f"likelihood={config.likelihood!r} with binarization={config.binarization!r}: cross-"
            f"entropy of grey pixels is no likelihood, and {page} compares neg_elbo; give "
            "--binarization stochastic or threshold"
        )


def _check_objective(study: Study, config: RunConfig) -> None:
    if not study.objective.endswith("neg_elbo"):
        return
    check_likelihood(config, study.name)
    if config.latent == "deterministic":
        raise UserError(
            f"latent='deterministic': a plain autoencoder has no neg_elbo, which {study.name} "
            "compares; give the study the objective 'val/mse'"
        )
