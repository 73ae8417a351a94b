"""A study with everything decided: its points, their names, tags and settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.config import RunConfig
from studies.sources import Source

if TYPE_CHECKING:
    from studies.study import Study


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

    def label(self, point: Point) -> str:
        """Name a point for people, e.g. "batch, kl_weight=0.1"."""
        value = self.written[point.value]
        named = value if self.study.axis.name == "condition" else f"{self.study.axis.name}={value}"
        return f"{point.group}, {named}" if point.group else named
