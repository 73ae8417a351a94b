"""From what the user asks for to a plan: which runs, under which names, everything checked."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from harness.config import KLNormalization, RunConfig, UserError

if TYPE_CHECKING:
    from studies.study import Study

Value = TypeVar("Value")

EPOCHS = {"digits": 50, "mnist": 20, "fashion_mnist": 20, "kmnist": 20}
"""Passes over the training split where the user names no number."""


@dataclass(frozen=True)
class Options(Generic[Value]):
    """What a user can set on every study's command line.

    Attributes:
        dataset: data to train on; digits needs no download.
        data_dir: folder of the other data sets, downloaded into it if missing.
        values: values of the study's axis instead of its own.
        seeds: repetitions of every value.
        epochs: passes over the training split (digits 50, others 20).
        batch_size: images per step.
        latent_size: number of latents.
        kl_normalization: what the KL sum is divided by.
        device: auto takes a GPU where there is one.
        study_name: name in Optuna and MLflow (STUDY-DATASET).
        storage: Optuna storage URL (optuna.db in the repository).
        tracking_uri: MLflow tracking URI (MLFLOW_TRACKING_URI, or mlflow.db in the repository).
        fresh: start a new study beside one of the same name.
        dry_run: show the plan and train nothing.
    """

    dataset: Literal["digits", "mnist", "fashion_mnist", "kmnist"] = "digits"
    data_dir: Path = Path("data")
    values: tuple[Value, ...] = ()
    seeds: int = 3
    epochs: int | None = None
    batch_size: int = 32
    latent_size: int = 10
    kl_normalization: KLNormalization = "pixels"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    study_name: str | None = None
    storage: str | None = None
    tracking_uri: str | None = None
    fresh: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Plan:
    """A study with everything decided: which runs, under which names.

    Attributes:
        study: the study.
        name: of the Optuna study, and tag of its runs.
        dataset: name of the dataset.
        configs: axis value -> one configuration per seed.
    """

    study: Study
    name: str
    dataset: str
    configs: dict[Any, list[RunConfig]] = field(repr=False)

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment: one per study and dataset."""
        return f"{self.study.name}-{self.dataset}"

    @property
    def runs(self) -> list[RunConfig]:
        """All configurations, value by value."""
        return [config for configs in self.configs.values() for config in configs]

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two starts the same study, as plain values."""
        first = json.loads(self.runs[0].to_json())
        shared = {k: v for k, v in first.items() if k not in ("seed", self.study.axis.field)}
        seeds = len(next(iter(self.configs.values())))
        return {"dataset": self.dataset, "values": list(self.configs), "seeds": seeds, **shared}

    def tags(self, config: RunConfig, trial: int) -> dict[str, str]:
        """Return what the MLflow run of a configuration is found by."""
        axis = self.study.axis.field
        value = getattr(config, axis)
        label = f"{axis}={value:.3g}" if isinstance(value, float) else f"{axis}={value}"
        return {
            "study": self.name,
            "role": "run",
            "trial": str(trial),
            "configuration": label,
            "seed_group": f"{self.name}/{label}",
        }


def make_plan(study: Study, options: Options[Any]) -> Plan:
    """Decide every run of a study; all settings are checked here, before anything is written.

    Raises:
        UserError: a setting cannot be used.
    """
    if options.seeds < 1:
        raise UserError(f"seeds={options.seeds}: give a whole number >= 1")
    values = options.values or study.axis.values
    if len(set(values)) < len(values):
        raise UserError(f"values={list(values)}: give every value once")
    name = options.study_name or f"{study.name}-{options.dataset}"
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name):
        raise UserError(f"study_name={name!r}: use up to 100 letters, digits, '.', '_' and '-'")
    base = study.base.replace(
        epochs=EPOCHS[options.dataset] if options.epochs is None else options.epochs,
        batch_size=options.batch_size,
        latent_size=options.latent_size,
        kl_normalization=options.kl_normalization,
    )
    configs = {
        value: [base.replace(**{study.axis.field: value, "seed": s}) for s in range(options.seeds)]
        for value in values
    }
    return Plan(study, name, options.dataset, configs)
