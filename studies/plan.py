"""From what the user asks for to a plan: which runs, under which names, everything checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.config import RunConfig, UserError, checked_name
from studies.sources import Source, source

if TYPE_CHECKING:
    from harness.data.dataset import Dataset
    from studies.question import Study
    from studies.runner.options import Options


class Point(NamedTuple):
    """What a trial is: a value of the axis, in one of the study's groups ("" without groups)."""

    group: str
    value: Any


def written(values: Sequence[Any]) -> dict[Any, str]:
    """Write values in as few digits, but at least three, as tell them apart."""
    for digits in range(3, 18):
        said = [f"{v:.{digits}g}" if isinstance(v, float) else str(v) for v in values]
        if len(set(said)) == len(said):
            break
    return dict(zip(values, said, strict=True))


@dataclass(frozen=True)
class Plan:
    """A study with everything decided: which runs, under which names.

    Attributes:
        study: the study.
        name: of the Optuna study, and tag of its runs.
        source: what is known of the dataset.
        configs: point -> one configuration per seed.
    """

    study: Study
    name: str
    source: Source
    configs: dict[Point, list[RunConfig]] = field(repr=False)

    @property
    def dataset(self) -> str:
        """Name of the dataset."""
        return self.source.name

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment: one per study and dataset."""
        return f"{self.study.name}-{self.dataset}"

    @property
    def runs(self) -> list[RunConfig]:
        """All configurations, point by point."""
        return [config for configs in self.configs.values() for config in configs]

    @property
    def seeds(self) -> int:
        """Runs of each point."""
        return len(next(iter(self.configs.values())))

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two starts the same study, as plain values."""
        varied = {"seed", *self._varied()}
        first = json.loads(self.runs[0].to_json())
        shared = {name: value for name, value in first.items() if name not in varied}
        values = list(dict.fromkeys(point.value for point in self.configs))
        return {**self.source.settings, "values": values, "seeds": self.seeds, **shared}

    @cached_property
    def written(self) -> dict[Any, str]:
        """Every value of the axis as people read it: `written`."""
        return written(list(dict.fromkeys(point.value for point in self.configs)))

    def _varied(self) -> Iterator[str]:
        """Yield the fields in which the points differ."""
        first, *others = (configs[0] for configs in self.configs.values())
        for name in RunConfig.__dataclass_fields__:
            if any(getattr(first, name) != getattr(other, name) for other in others):
                yield name

    def coordinates(self, point: Point) -> dict[str, Any]:
        """Return a point as Optuna's parameters and the frames' columns name it."""
        group = {self.study.group: point.group} if self.study.group else {}
        return {**group, self.study.axis.name: point.value}

    def tags(self, point: Point, trial: int) -> dict[str, str]:
        """Return what the MLflow runs of a point are found by."""
        label = self.label(point)
        return {
            "study": self.name,
            "role": "run",
            "trial": str(trial),
            "configuration": label,
            "seed_group": f"{self.name}/{label}",
        }

    def sentence(self, pixels: int) -> str:
        """Return what will be trained."""
        values = self.written.values()
        groups = [group for group in dict.fromkeys(point.group for point in self.configs) if group]
        each = f" x {len(groups)} groups ({', '.join(groups)})" if groups else ""
        return (
            f"{len(values)} values of {self.study.axis.name} ({', '.join(values)}){each} x "
            f"{self.seeds} seeds = {len(self.runs)} runs of {self.runs[0].epochs} epochs on "
            f"{self.dataset} ({pixels} pixels), study {self.name!r}"
        )

    def label(self, point: Point) -> str:
        """Name a point for people, e.g. "batch, kl_weight=0.1"."""
        value = self.written[point.value]
        named = value if self.study.axis.name == "condition" else f"{self.study.axis.name}={value}"
        return f"{point.group}, {named}" if point.group else named


def make_plan(study: Study, options: Options[Any], own: Dataset | None = None) -> Plan:
    """Decide every run of a study; all settings are checked here, before anything is written.

    Args:
        study: the study.
        options: what the user set.
        own: the user's own images, which take the place of `options.dataset`.

    Raises:
        UserError: a setting cannot be used.
    """
    seeds = study.seeds if options.seeds is None else options.seeds
    if seeds < 1:
        raise UserError(f"seeds={seeds}: give a whole number >= 1")
    values = study.axis.values if options.values is None else options.values
    if not values:
        raise UserError("--values: give at least one, or leave it out")
    if len(set(values)) < len(values):
        raise UserError(f"values={list(values)}: give every value once")
    data = source(options.dataset, own)
    given = options.study_name
    name = checked_name(f"{study.name}-{data.name}" if given is None else given)
    base = _base(study, options, data)
    configs: dict[Point, list[RunConfig]] = {}
    for group, changes in study.groups(base, data).items():
        for value in values:
            config = study.axis.apply(base.replace(**changes), value, data)
            _check_objective(study, config)
            point = Point(group, value)
            configs[point] = [config.replace(seed=seed) for seed in range(seeds)]
    return Plan(study, name, data, configs)


def _base(study: Study, options: Options[Any], data: Source) -> RunConfig:
    given = options.chosen()
    for swept in given.keys() & {study.axis.name, study.group}:
        advice = "leave it out" if swept == study.group else "choose its values with --values"
        raise UserError(f"{swept}={given[swept]}: {study.name} sweeps it; {advice}")
    return options.base(study.base, data.epochs)


def _check_objective(study: Study, config: RunConfig) -> None:
    if not study.objective.endswith("neg_elbo"):
        return
    if not config.has_likelihood:
        raise UserError(
            f"likelihood={config.likelihood!r} with binarization={config.binarization!r}: cross-"
            f"entropy of grey pixels is no likelihood, and {study.name} compares neg_elbo; give "
            "--binarization stochastic or threshold"
        )
    if config.latent == "deterministic":
        raise UserError(
            f"latent='deterministic': a plain autoencoder has no neg_elbo, which {study.name} "
            "compares; give the study the objective 'val/mse'"
        )
