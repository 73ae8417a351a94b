"""Options of the command lines."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, get_type_hints

import docstring_parser
from tyro.conf import arg

from harness.config import RunConfig, UserError, checked_name

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
        checkpoint_every: epochs between checkpoints of unfinished runs, from which the same command
            continues; 0 writes none.
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

    def named(self, default: str) -> str:
        """Return the study's name; it and the numbers are checked."""
        at_least(0, checkpoint_every=self.checkpoint_every)
        at_least(1, workers=self.workers)
        return checked_name(default if self.study_name is None else self.study_name)


ELSEWHERE = tuple(field.name for field in fields(Places))  # they do not change the results


@dataclass(frozen=True)
class Common(Places):
    """Options of every command line that trains configurations of the user.

    Attributes:
        dataset: digits, which needs no download, mnist, fashion_mnist, kmnist, or folder:PATH, your
            images in PATH/CLASS/ or in PATH.
        image_size: height and width to which images of a folder are resized, or one number for
            both.
        settings: settings of every run (`RunConfig`); those that a study sweeps are refused.
    """

    dataset: str = "digits"
    image_size: tuple[int, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def base(self, config: RunConfig, epochs: int) -> RunConfig:
        """Return a configuration with the given settings; `epochs` are the dataset's."""
        found = config.replace(**{"epochs": epochs, **self.settings})
        for name, model in (("hidden", "mlp"), ("channels", "conv")):
            if name in self.settings and found.model != model:
                raise UserError(f"--{name} with model={found.model!r}: only {model} has them")
        return found


@dataclass(frozen=True)
class Options(Common, Generic[Value]):
    """Options of every study's command line.

    Attributes:
        values: values of the study's axis instead of its defaults; a value of several numbers has
            commas (--values 256 512,256), an empty one is none.
        seeds: repetitions of every value (3, unless the study has another number).
    """

    values: tuple[Value, ...] | None = None
    seeds: int | None = None


SETTINGS = [field.name for field in fields(RunConfig) if field.name != "seed"]


def setting_options(base: RunConfig, notes: Mapping[str, str]) -> type:
    """Return a dataclass with an option for every setting but the seed; None means not given.

    The help shows the settings of `base` as defaults, or the note on a setting.
    """
    parsed = docstring_parser.parse(RunConfig.__doc__ or "").params
    helps = {param.arg_name: " ".join((param.description or "").split()) for param in parsed}
    kinds, made = get_type_hints(RunConfig), []
    for name in SETTINGS:
        default = " ".join(words(getattr(base, name))) or "none"
        if name == "epochs":
            default = "50; 20 for 10,000 training images or more"
        hint = arg(
            help=helps[name], help_behavior_hint=f"({notes.get(name, f'default: {default}')})"
        )
        option: Any = Annotated[kinds[name] | None, hint]
        made.append((name, option, None))
    return make_dataclass("Settings", made, frozen=True)


def at_least(least: int, **numbers: int) -> None:
    """Raise UserError for a number that is too low."""
    for name, value in numbers.items():
        if value < least:
            raise UserError(f"{name}={value}: give a whole number >= {least}")


def is_page(name: str) -> bool:
    """Return whether a study is a page of `studies`."""
    page = Path(__file__).parents[1] / f"{name}.py"
    return page.exists() and '__name__ == "__main__"' in page.read_text(encoding="utf-8")


def start_words(name: str) -> list[str]:
    """Return how Python runs a study: as a page of `studies`, or as the user's script."""
    return ["-m", f"studies.{name}"] if is_page(name) else [sys.argv[0]]


def program(name: str) -> str:
    """Return the command that starts a study, without options."""
    return shlex.join(["python", *start_words(name)])


def text(value: object) -> str:
    """Return a value of an axis as text: several numbers with commas, "none" if it is empty."""
    if isinstance(value, Mapping):
        value = tuple(f"{name}={weight}" for name, weight in value.items())
    return (",".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


def words(value: object) -> list[str]:
    """Return the words after an option on a command line."""
    if isinstance(value, Mapping):
        return [str(word) for pair in value.items() for word in pair]
    return [text(part) for part in value] if isinstance(value, tuple) else [str(value)]


def arguments(options: Places, left_out: Container[str] = ()) -> list[str]:
    """Return the command line that gives options, but for those left out."""
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    defaults = {f.name: f.default for f in fields(options)}
    line = []
    for name, value in {**given.pop("settings", {}), **given}.items():
        if name not in left_out and value != defaults.get(name):
            line += [f"--{name.replace('_', '-')}", *([] if value is True else words(value))]
    return line
