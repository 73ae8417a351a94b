"""Proposers: which trials a study makes next, and the runs that a trial consists of.

`Listed` makes the trials of a list of cells, one run each: a grid, a ledger, a confirmation, a
summary. `TPE` searches a space; its trials have several seeds.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import uuid4

import lazy_loader

from harness.config import RunConfig
from harness.tracking import End, Planned

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from harness.training.engine import EpochRecord
else:
    optuna = lazy_loader.load("optuna")

# The metric that selects the best trial, with two objectives too: the lowest of all lies on the
# front, since neg_elbo = rate + distortion.
SELECTION = "val/neg_elbo"
ACTIVE = "val/active_units"

# The strength of the KL term in a space: of trials whose `sigma` is "fixed", else it has no effect.
STRENGTHS = ("decoder_variance", "kl_weight")

ROUNDS = 4  # least number of rounds of a search: trials made together do not learn of each other
REPORTS = 5  # about how often a trial is compared with others; a report takes 13 ms

# User attributes of a trial: identity in a list, keys of its runs, that it failed for good, and
# that it has the default settings.
CELL, KEYS, DIVERGED, BASELINE = "cell", "keys", "diverged", "default"

Metrics = Mapping[str, float]
Report = Callable[[float, int], bool]  # value and epoch -> whether the trial is to be pruned


class Value(NamedTuple):
    """Objectives and further attributes of a trial, both JSON values."""

    values: list[float]
    attrs: dict[str, Any]


def keys(*trials: FrozenTrial) -> list[str]:
    """Return the keys of the runs of trials."""
    return [key for trial in trials for key in trial.user_attrs.get(KEYS, [])]


def part_of(trial: FrozenTrial) -> str | None:
    """Return "confirmation" or "summary" for a trial of a companion study, else None."""
    return trial.user_attrs.get(CELL, {}).get("part")


def has_result(trial: FrozenTrial) -> bool:
    """Return whether a trial is finished for good: complete, pruned or diverged."""
    failed = trial.state.name == "FAIL" and DIVERGED in trial.user_attrs
    return failed or trial.state.name in ("COMPLETE", "PRUNED")


def _open(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if has_result(trial) or trial.state.name == "RUNNING"]


def _planned(
    trial: FrozenTrial, key: str, config: RunConfig, label: str, place: int, params: dict[str, Any]
) -> Planned:
    tags = {"trial": str(trial.number), "place": str(place), "configuration": label}
    return Planned(config, key, f"{label} seed={config.seed}", params, tags)


class Cell(NamedTuple):
    """One run of a list; `identity` are JSON values, `params` parameters beside the settings."""

    identity: dict[str, Any]
    config: RunConfig
    label: str
    params: dict[str, Any]


def repeated(
    label: str,
    identity: Mapping[str, Any],
    config: RunConfig,
    seeds: Sequence[int],
    params: dict[str, Any],
) -> list[Cell]:
    """Return the runs of a configuration, one per seed."""
    return [
        Cell({**identity, "seed": seed}, config.replace(seed=seed), label, params) for seed in seeds
    ]


def _identity(values: Mapping[str, Any]) -> str:
    """Return a key of JSON values, in which 1 is 1.0."""
    return json.dumps(json.loads(json.dumps(values), parse_int=float), sort_keys=True)


@dataclass(frozen=True)
class Listed:
    """Trials of one run each, in the order of a list."""

    cells: Sequence[Cell]
    settings: dict[str, Any]
    objectives: tuple[str, ...] = (SELECTION,)
    seeds: int = 1

    @cached_property
    def _places(self) -> dict[str, int]:
        return {_identity(cell.identity): place for place, cell in enumerate(self.cells)}

    def at_once(self, width: int) -> int:
        """Return how many trials are proposed together for a device's stack of a width."""
        return width

    def place(self, trial: FrozenTrial) -> int | None:
        """Return a trial's index in the list, None for a trial of another list."""
        return self._places.get(_identity(trial.user_attrs.get(CELL, {})))

    def missing(self, trials: Sequence[FrozenTrial]) -> list[Cell]:
        """Return the cells that have no result and are not running."""
        there = {self.place(trial) for trial in _open(trials)}
        return [cell for place, cell in enumerate(self.cells) if place not in there]

    def left(self, trials: Sequence[FrozenTrial]) -> int:
        """Return how many trials are still to be made."""
        return len(self.missing(trials))

    def propose(self, study: optuna.Study, trials: Sequence[FrozenTrial], count: int) -> set[str]:
        """Make trials of the first cells that are missing; return the keys of their runs."""
        made = set[str]()
        for cell in self.missing(trials)[:count]:
            made.add(key := uuid4().hex)
            state = optuna.trial.TrialState.RUNNING
            attrs = {CELL: cell.identity, KEYS: [key]}
            study.add_trial(optuna.trial.create_trial(state=state, user_attrs=attrs))
        return made

    def planned(self, trial: FrozenTrial) -> list[Planned]:
        """Return a trial's run."""
        place = self._places[_identity(trial.user_attrs[CELL])]
        cell, (key,) = self.cells[place], keys(trial)
        return [_planned(trial, key, cell.config, cell.label, place, cell.params)]

    def judge(self, record: EpochRecord, rows: Sequence[int], report: Report) -> dict[int, End]:
        """Return {}: nothing is pruned."""
        return {}

    def value(self, finals: Sequence[Metrics | None]) -> Value | None:
        """Return the objective, None for a run that diverged."""
        (final,) = finals
        return None if final is None else Value([final[name] for name in self.objectives], {})


class Range(NamedTuple):
    """Numbers from low to high, whole if both are; `log`: uniform in the logarithm."""

    low: float
    high: float
    log: bool = False


Space = Mapping[str, Range | tuple[str, ...]]  # setting, or strength -> a range, or names
Pruner = Literal["median", "none"]


@dataclass
class TPE:
    """A search by the tree-structured Parzen estimator (Bergstra et al. 2011).

    A trial is one configuration with all its seeds, 0, 1, ...; its objectives are means over them.

    Attributes:
        default: values of the first trial, one for each setting of the space.
        configure: (base, values by name) -> the settings of a trial.
    """

    base: RunConfig
    space: Space
    seeds: int
    trials: int
    pruner: Pruner
    objectives: tuple[str, ...]
    settings: dict[str, Any]
    default: Mapping[str, Any] = field(default_factory=dict)
    configure: Callable[..., RunConfig] = field(default=RunConfig.replace, compare=False)
    _expected: int = field(default=-1, repr=False)

    def at_once(self, width: int) -> int:
        """Return how many trials are proposed together for a device's stack of a width."""
        return max(1, min(width // self.seeds, self.trials // ROUNDS))

    @property
    def judged(self) -> range:
        """Epochs after which a trial may be pruned."""
        first = max(1, self.base.epochs // 3)
        return range(first, self.base.epochs, max(1, (self.base.epochs - first) // REPORTS))

    def left(self, trials: Sequence[FrozenTrial]) -> int:
        """Return how many trials are still to be made."""
        return max(0, self.trials - len(_open(trials)))

    def propose(self, study: optuna.Study, trials: Sequence[FrozenTrial], count: int) -> set[str]:
        """Sample trials, after the default one; return the keys of their runs.

        The sampler is a new one where other processes have made trials since. Its seed is the
        number of trials: a search that is continued does not draw its first points again, and no
        two processes draw the same.
        """
        if self._expected != len(trials):
            study.sampler = optuna.samplers.TPESampler(seed=len(trials))
        self._expected = len(trials) + count
        space = {name: _distribution(values) for name, values in self.space.items()}
        always = {name: kind for name, kind in space.items() if name not in STRENGTHS}
        there = [t for t in trials if t.state.name != "FAIL" or DIVERGED in t.user_attrs]
        if self.default and not any(BASELINE in trial.user_attrs for trial in there):
            study.enqueue_trial(dict(self.default), {BASELINE: True})
        made = set[str]()
        for _ in range(count):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that heartbeats are not Optuna's
                trial = study.ask(always)
            if trial.params.get("sigma", "fixed") == "fixed":
                for name in space.keys() - always.keys():
                    low, high, log = self.space[name]
                    trial.suggest_float(name, low, high, log=log)  # type: ignore[arg-type]
            new = [uuid4().hex for _ in range(self.seeds)]
            trial.set_user_attr(KEYS, new)
            made.update(new)
        return made

    def configs(self, trial: FrozenTrial) -> list[RunConfig]:
        """Return the settings of a trial's runs, one per seed."""
        config = self.configure(self.base, **trial.params)
        return [config.replace(seed=seed) for seed in range(self.seeds)]

    def place(self, trial: FrozenTrial) -> int | None:
        """Return a trial's number, None for one that was not searched."""
        return trial.number if CELL not in trial.user_attrs else None

    def planned(self, trial: FrozenTrial) -> list[Planned]:
        """Return a trial's runs."""
        label, first = f"trial {trial.number}", trial.number * self.seeds
        params = {"trial": trial.number, "part": "search"}
        return [
            _planned(trial, key, config, label, first + config.seed, params)
            for key, config in zip(keys(trial), self.configs(trial), strict=True)
        ]

    def judge(self, record: EpochRecord, rows: Sequence[int], report: Report) -> dict[int, End]:
        """Return the ends of a trial's rows, all or none: divergence goes before pruning."""
        diverged = {row: why for row in rows if (why := _divergence(record, row))}
        if diverged:
            during = f"diverged in epoch {record.epoch}"
            other = End("KILLED", f"another seed of its configuration {during}")
            failed = {row: End("FAILED", f"{during}: {why}") for row, why in diverged.items()}
            return {row: failed.get(row, other) for row in rows}
        warm = all(record.kl_warmup[row] == 1 for row in rows)  # else its KL weight is still low
        stopped = len(rows) < self.seeds  # a seed by `patience`, which has its result
        if self.pruner == "none" or record.epoch not in self.judged or not warm or stopped:
            return {}
        mean = sum(float(record.val["neg_elbo"][row]) for row in rows) / len(rows)
        if not report(mean, record.epoch):
            return {}
        why = f"validation neg_elbo {mean:.2f} is worse than the median of finished trials"
        end = End("KILLED", f"pruned at epoch {record.epoch}: {why}", pruned=True)
        return dict.fromkeys(rows, end)

    def value(self, finals: Sequence[Metrics | None]) -> Value | None:
        """Return the objectives' means over seeds, None if a seed diverged."""
        done = [final for final in finals if final is not None]
        if len(done) < len(finals):
            return None
        names = {*self.objectives, SELECTION, ACTIVE}
        means = {name: sum(final[name] for final in done) / len(done) for name in names}
        attrs = {name: means[name] for name in (SELECTION, ACTIVE)}
        return Value([means[name] for name in self.objectives], attrs)


def _divergence(record: EpochRecord, row: int) -> str | None:
    from harness.tracking.record import divergence  # loads torch

    value = float(record.val["neg_elbo"][row])  # must be finite to be compared
    lost = None if math.isfinite(value) else f"validation neg_elbo is {value}"
    return divergence(record, row) or lost


def _distribution(values: Range | tuple[str, ...]) -> optuna.distributions.BaseDistribution:
    if not isinstance(values, Range):
        return optuna.distributions.CategoricalDistribution(values)
    low, high, log = values
    if isinstance(low, int) and isinstance(high, int):
        return optuna.distributions.IntDistribution(low, high, log=log)
    return optuna.distributions.FloatDistribution(low, high, log=log)


Proposer = Listed | TPE
