"""Options of the command lines."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Container
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from harness.config import (
    Binarization,
    KLNormalization,
    Likelihood,
    Precision,
    RunConfig,
    Sigma,
    UserError,
    checked_name,
)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Places:
    """Options of every command line that trains: where, under which name, and how it is shown.

    Attributes:
        data_dir: folder of the MNIST family, downloaded into it if missing.
        device: auto takes a GPU where there is one.
        workers: processes on this machine that share the study and its cores. Any number of
            machines share one, too, that start the same command with a --storage of PostgreSQL.
        study_name: name in Optuna and MLflow (STUDY-DATASET).
        storage: Optuna storage URL (optuna.db in the repository).
        tracking_uri: MLflow tracking URI (MLFLOW_TRACKING_URI, or mlflow.db in the repository).
        checkpoint_every: epochs after which unfinished runs are kept, so that the same command goes
            on from there and not from their first epoch; 0 keeps none.
        leave: end once other processes train all that is left, of which the last one answers; for
            the jobs of a cluster.
        fresh: start a new study beside one of the same name.
        dry_run: show the plan and train nothing.
        json: print the outcome as one JSON object, and all else on standard error.
    """

    data_dir: Path = Path("data")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = 1
    study_name: str | None = None
    storage: str | None = None
    tracking_uri: str | None = None
    checkpoint_every: int = 0
    leave: bool = False
    fresh: bool = False
    dry_run: bool = False
    json: bool = False

    def check(self) -> None:
        """Raise UserError for a number that is too low."""
        at_least(0, checkpoint_every=self.checkpoint_every)
        at_least(1, workers=self.workers)

    def named(self, default: str) -> str:
        """Return the study's name, checked."""
        return checked_name(default if self.study_name is None else self.study_name)


ELSEWHERE = tuple(field.name for field in fields(Places))
"""Options that do not change what is found."""


@dataclass(frozen=True)
class Common(Places):
    """Options of every command line that trains what the user chooses.

    Attributes:
        dataset: digits, which needs no download, mnist, fashion_mnist, kmnist, or folder:PATH, own
            images in PATH/CLASS/ or in PATH.
        image_size: height and width that own images are resized to, or one number for both.
        epochs: passes over the training split (digits and fewer than 10,000 own images 50, others
            20).
        batch_size: images per step.
        model: mlp, linear (a linear VAE), conv (convolutions in place of the MLP), or the name of
            a registered network (mlp).
        channels: channels of conv's convolutions, each of which halves the image (32 64).
        kl_warmup_epochs: epochs over which the KL weight rises linearly from 0 (0).
        kl_cycles: equal parts of the training that each begin with that warm-up (1).
        free_bits: nats of each latent's KL that cost nothing (0).
        sigma: what sets the Gaussian decoder's variance: fixed by the KL weight, optimal for each
            batch, or learned (fixed).
        likelihood: bernoulli trains on cross-entropy instead of squared error (gaussian).
        binarization: how bernoulli's pixels are made 0 or 1 (none).
        precision: tf32 trains faster on a GPU, less exactly (float32).
    """

    dataset: str = "digits"
    image_size: tuple[int, ...] | None = None
    epochs: int | None = None
    batch_size: int = 32
    model: str | None = None
    channels: tuple[int, ...] | None = None
    kl_warmup_epochs: int | None = None
    kl_cycles: int | None = None
    free_bits: float | None = None
    sigma: Sigma | None = None
    likelihood: Likelihood | None = None
    binarization: Binarization | None = None
    precision: Precision | None = None

    def chosen(self) -> dict[str, Any]:
        """Return the fields of `RunConfig` that the user set, but `epochs` and `batch_size`."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v for k, v in given.items() if k in SETTINGS and v is not None}

    def base(self, config: RunConfig, epochs: int) -> RunConfig:
        """Return a configuration with all that the user chose; `epochs` are the dataset's."""
        self.check()
        epochs = epochs if self.epochs is None else self.epochs
        found = config.replace(epochs=epochs, batch_size=self.batch_size, **self.chosen())
        if self.channels is not None and found.model != "conv":
            raise UserError(f"--channels with model={found.model!r}: only conv has them")
        return found


SETTINGS = {field.name for field in fields(RunConfig)} - {"epochs", "batch_size"}
"""Fields of `RunConfig`: as options, None leaves a study its own value."""


@dataclass(frozen=True)
class Options(Common, Generic[Value]):
    """Options of every study's command line.

    Attributes:
        values: values of the study's axis instead of its own.
        seeds: repetitions of every value (the study's own number, at least 3).
        latent_size: number of latents (10).
        kl_normalization: what the KL sum is divided by (pixels).
    """

    values: tuple[Value, ...] | None = None
    seeds: int | None = None
    latent_size: int | None = None
    kl_normalization: KLNormalization | None = None


def at_least(least: int, **numbers: int) -> None:
    """Raise UserError for a number that is too low."""
    for name, value in numbers.items():
        if value < least:
            raise UserError(f"{name}={value}: give a whole number >= {least}")


def start_words(name: str) -> list[str]:
    """Return how Python runs a study: as a page of `studies`, or as the user's script."""
    page = Path(__file__).parents[1] / f"{name}.py"
    if page.exists() and '__name__ == "__main__"' in page.read_text(encoding="utf-8"):
        return ["-m", f"studies.{name}"]
    return [sys.argv[0]]


def program(name: str) -> str:
    """Return the command that starts a study, without options."""
    return shlex.join(["python", *start_words(name)])


def arguments(options: Places, left_out: Container[str] = ()) -> list[str]:
    """Return the command line that gives options, but for those left out."""
    words = []
    for field in fields(options):
        value = getattr(options, field.name)
        if value == field.default or field.name in left_out:
            continue
        words.append(f"--{field.name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else (value,))
    return words


def first_unused(name: str, taken: Container[str]) -> str:
    """Return the name, or the first of NAME-2, NAME-3, ... that is not taken."""
    numbered = (f"{name}-{i}" for i in itertools.count(2))
    return name if name not in taken else next(n for n in numbered if n not in taken)
