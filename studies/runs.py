"""Runs that a ledger asks for: what a claim is measured on, and nothing that measures."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config import RunConfig


@dataclass(frozen=True)
class Runs:
    """Runs that a claim is measured on: one configuration, several seeds.

    Attributes:
        label: name of the configuration, for people.
        config: every setting but the seed.
        seeds: repetitions, seeds 0, 1, ...
        gpu: whether only the full form on a GPU trains them, since a CPU would take a day.
    """

    label: str
    config: RunConfig
    seeds: int
    gpu: bool = False

    @property
    def configs(self) -> list[RunConfig]:
        """One configuration per seed."""
        return [self.config.replace(seed=seed) for seed in range(self.seeds)]
