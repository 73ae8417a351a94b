"""What a search is, and from what the user asks for to its plan, everything checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from harness.config import RunConfig, UserError, checked_name
from studies.runner.options import Common, flags
from studies.sources import Source, source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from harness.data.dataset import Dataset
    from studies.findings import Findings

Pruner = Literal["median", "hyperband", "none"]

ROUNDS = 4
"""Least number of batches: a search that asks for all its trials at once learns nothing."""

CONFIRMING = 3
"""Fresh seeds with which the best configuration is trained again."""

REPORTS = 5
"""Times, about, that a trial is compared with the others; a report costs Optuna 13 ms."""


class Range(NamedTuple):
    """Numbers from low to high, whole if both are; `log`: even in the logarithm."""

    low: float
    high: float
    log: bool = False


Space = Mapping[str, Range | tuple[str, ...]]
"""Field of `RunConfig` -> what is tried: a range of numbers, or names."""


@dataclass(frozen=True)
class SearchOptions(Common):
    """What a user can set on the search's command line; a remedy that is set is not searched.

    Attributes:
        trials: configurations in all; a finished search goes on if there are more.
        seeds: runs of every configuration; its objective is their mean. One by default: runs
            are better spent on further configurations, since the best is trained again anyway.
        pruner: how unpromising configurations are stopped early (median; none with
            --multi-objective).
        multi_objective: minimise rate and mse together instead of neg_elbo.
    """

    trials: int = 60
    seeds: int = 1
    pruner: Pruner | None = None
    multi_objective: bool = False


@dataclass(frozen=True)
class Search:
    """A question that a search over several settings answers.

    Attributes:
        name: as in `python -m studies.NAME`.
        question: the page's docstring.
        base: settings shared by all runs.
        space: epochs -> what is tried.
        baseline: (base, source of the data) -> configuration that the best one is compared with.
        figures: file name -> (findings -> figure, caption).
        front: figures of the form with two objectives, beside the others.
    """

    name: str
    question: str
    base: RunConfig
    space: Callable[[int], Space]
    baseline: Callable[[RunConfig, Source], RunConfig]
    figures: Mapping[str, tuple[Callable[[Findings], Figure], str]]
    front: Mapping[str, tuple[Callable[[Findings], Figure], str]]


@dataclass(frozen=True)
class SearchPlan:
    """A search with everything decided but the configurations.

    Attributes:
        search: the search.
        name: of the Optuna study, and tag of its runs.
        source: what is known of the dataset.
        base: configuration that the searched fields are set in.
        chosen: its fields that the user set.
        trials: configurations in all.
        seeds: runs of each.
        pruner: how unpromising ones are stopped.
        objectives: metrics that are minimised, means over seeds.
    """

    search: Search
    name: str
    source: Source
    base: RunConfig = field(repr=False)
    chosen: tuple[str, ...]
    trials: int
    seeds: int
    pruner: Pruner
    objectives: tuple[str, ...]

    @property
    def dataset(self) -> str:
        """Name of the dataset."""
        return self.source.name

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment: one per dataset."""
        return f"{self.search.name}-{self.dataset}"

    @property
    def space(self) -> Space:
        """What is tried: all that the user did not set, and that the decoder has."""
        space = self.search.space(self.base.epochs)
        set_by_user = {*self.chosen, *(["sigma"] if self.base.likelihood == "bernoulli" else [])}
        return {name: values for name, values in space.items() if name not in set_by_user}

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two starts the same search, as plain values; more trials continue it."""
        fixed = json.loads(self.base.to_json())
        fixed = {k: v for k, v in fixed.items() if k not in {"seed", *self.space}}
        space = {name: list(values) for name, values in self.space.items()}
        objectives, names = list(self.objectives), ("seeds", "pruner")
        own = {**self.source.settings, **{name: getattr(self, name) for name in names}}
        return {**own, "objectives": objectives, "space": space, **fixed}

    @property
    def judged(self) -> range:
        """Epochs after which a trial may be pruned: none while any KL warm-up lasts."""
        first = max(1, self.base.epochs // 3)
        return range(first, self.base.epochs, max(1, (self.base.epochs - first) // REPORTS))

    @property
    def fresh_seeds(self) -> range:
        """Seeds that the search has not seen."""
        return range(self.seeds, self.seeds + CONFIRMING)

    def at_once(self, width: int) -> int:
        """Return how many trials make a batch on a device that takes stacks of a width."""
        return max(1, min(width // self.seeds, self.trials // ROUNDS))

    def configs(self, params: Mapping[str, Any]) -> list[RunConfig]:
        """Return a trial's runs, one a seed."""
        return [self.base.replace(**params, seed=seed) for seed in range(self.seeds)]

    def planned(
        self, label: str, number: int, config: RunConfig, part: str = "search"
    ) -> tuple[RunConfig, dict[str, Any], dict[str, str]]:
        """Return what `stack.train_stack` needs of a run: configuration, parameters, tags.

        Args:
            label: name of the configuration; runs that an interruption spoils are found by it.
            number: of the trial in Optuna.
            config: the run's.
            part: "search", or "confirmation": trained again, or compared with.
        """
        tags = {
            "study": self.name,
            "role": "run",
            "trial": label,
            "configuration": label,
            "seed_group": f"{self.name}/{label}",
        }
        return config, {"trial": number, "part": part}, tags

    def command(self) -> str:
        """Return the command line that repeats the search."""
        words = [f"python -m studies.{self.search.name} {self.source.words}"]
        words += [f"--trials {self.trials} --seeds {self.seeds} --epochs {self.base.epochs}"]
        words += [f"--batch-size {self.base.batch_size} --pruner {self.pruner}"]
        words += ["--multi-objective"] if len(self.objectives) > 1 else []
        words += flags(self.base, self.search.base, self.chosen)
        return " ".join([*words, f"--study-name {self.name}"])

    def sentence(self, pixels: int) -> str:
        """Say what will be trained."""
        return (
            f"{self.trials} configurations of {', '.join(self.space)}, {self.seeds} "
            f"seed{'s'[: self.seeds > 1]} each, {self.base.epochs} epochs on {self.dataset} "
            f"({pixels} pixels), minimising {' and '.join(self.objectives)}, pruner "
            f"{self.pruner}, then {CONFIRMING} fresh seeds of the best; study {self.name!r}"
        )


def make_search_plan(
    search: Search, options: SearchOptions, own: Dataset | None = None
) -> SearchPlan:
    """Decide all of a search that can be decided before it; checked before anything is written.

    Args:
        search: the search.
        options: what the user set.
        own: the user's own images, which take the place of `options.dataset`.

    Raises:
        UserError: a setting cannot be used.
    """
    for name in ("trials", "seeds"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)}: give a whole number >= 1")
    if options.multi_objective and options.pruner not in (None, "none"):
        raise UserError(
            f"pruner={options.pruner!r}: two objectives have no order to prune by; leave it out "
            "or give --pruner none with --multi-objective"
        )
    pruner: Pruner = options.pruner or ("none" if options.multi_objective else "median")
    suffix = "-front" if options.multi_objective else ""
    data = source(options.dataset, own)
    given = options.study_name
    name = checked_name(f"{search.name}-{data.name}{suffix}" if given is None else given)
    base = _base(search, options, data)
    objectives = ("val/rate", "val/mse") if options.multi_objective else ("val/neg_elbo",)
    return SearchPlan(
        search,
        name,
        data,
        base,
        tuple(options.chosen()),
        options.trials,
        options.seeds,
        pruner,
        objectives,
    )


def _base(search: Search, options: SearchOptions, data: Source) -> RunConfig:
    base = options.base(search.base, data.epochs)
    if not base.has_likelihood:
        raise UserError(
            f"likelihood={base.likelihood!r} with binarization={base.binarization!r}: cross-"
            f"entropy of grey pixels is no likelihood, and the {search.name} chooses by neg_elbo; "
            "give --binarization stochastic or threshold"
        )
    return base
