"""What a study is: a question, what is swept to answer it, and how the answer is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.config import RunConfig, UserError, checked_name
from studies.sources import Source

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from harness.data.dataset import Dataset
    from harness.models.vae import VAE


class Trained(NamedTuple):
    """A finished run: its settings and its model."""

    config: RunConfig
    model: VAE


Apply = Callable[[RunConfig, Any, Source], RunConfig]
"""(config, value, source of the data) -> config with the value set."""

Groups = Callable[[RunConfig, Source], Mapping[str, Mapping[str, Any]]]
"""(base, source of the data) -> {group: changes to base}."""


TABLE = (
    *("val/neg_elbo", "best/val/neg_elbo", "best/epoch"),
    *("neg_elbo", "mse", "rate", "calibration_ratio", "active_units"),
)
"""Columns of a summary table: last and best validation neg_elbo, then test metrics."""


def set_field(name: str) -> Apply:
    """Return the way in which a field of `RunConfig` is swept: it is set to the value."""
    return lambda config, value, data: config.replace(**{name: value})


class Axis:
    """The quantity that a study sweeps.

    Args:
        name: column of the frames and axis of the figures.
        values: what is tried.
        apply: (config, value, source) -> config; by default `name` is a field that is set.

    Raises:
        UserError: there is no value, or one that Optuna does not give back as it was.
    """

    def __init__(self, name: str, values: tuple[Any, ...], apply: Apply | None = None) -> None:
        plain = all(isinstance(value, str | int | float) for value in values)
        if not values or not plain:
            raise UserError(
                f"axis {name!r} has the values {list(values)}: give at least one, each a number or "
                "a word"
            )
        self.name, self.values = name, tuple(values)
        self.apply = apply or set_field(name)


def no_groups(base: RunConfig, data: Source) -> Mapping[str, Mapping[str, Any]]:
    """Return the one group of a study that has none, for any dataset."""
    return {"": {}}


@dataclass(frozen=True)
class Study:
    """A question, and all that is needed to answer it.

    Attributes:
        name: of its experiments, and of its page if it is one: `python -m studies.NAME`.
        question: the page's docstring.
        base: settings shared by all runs.
        axis: the quantity that is swept.
        figures: file name -> (frame -> figure, caption).
        answer: frame of runs in, sentences out.
        group: column that tells the groups apart, "" without groups.
        groups: (base, source of the data) -> {group: changes to base}; the axis is swept in every
            group.
        seeds: repetitions where the user names no number.
        objective: metric whose mean over seeds is told to Optuna.
        extras: (`Trained`, data) -> further metrics of a finished run, e.g. a linear probe.
        table: columns of the summary table.
        reference: axis value that all others are compared with; None means the best one.

    Raises:
        UserError: its name cannot be one, or it asks nothing.
    """

    name: str
    question: str
    base: RunConfig
    axis: Axis
    figures: Mapping[str, tuple[Callable[[pd.DataFrame], Figure], str]]
    answer: Callable[[pd.DataFrame], str]
    group: str = ""
    groups: Groups = no_groups
    seeds: int = 3
    objective: str = "val/neg_elbo"
    extras: Callable[[Trained, Dataset], dict[str, float]] | None = None
    table: tuple[str, ...] = TABLE
    reference: Any = None

    def __post_init__(self) -> None:
        checked_name(self.name)
        if not (self.question or "").strip():
            raise UserError(f"study {self.name!r} asks nothing; give its question, or a docstring")
