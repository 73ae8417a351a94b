"""Options of the command lines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import docstring_parser
from tyro.conf import UseAppendAction, arg

from harness import registry
from harness.config import RunConfig, UserError, checked_name, whole


@dataclass(frozen=True)
class Places:
    """Options of every command line that trains: where, under which name, and how it is shown.

    Attributes:
        data_dir: folder of the MNIST family, downloaded into it if missing.
        device: auto takes a GPU where there is one.
        workers: processes on this machine that share the study and its cores. Any number of
            machines share one, too, that start the same command with a --storage of PostgreSQL.
        threads_per_run: cores that train one run on a CPU; more than 1 are meant for large
            networks of fewer runs than cores.
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
    threads_per_run: int = 1
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
        whole("checkpoint_every", self.checkpoint_every, at_least=0)
        whole("workers", self.workers, at_least=1)
        whole("threads_per_run", self.threads_per_run, at_least=1)
        return checked_name(default if self.study_name is None else self.study_name)


READ_WITH = ("image_size", "image_range", "background", "label")  # options of data
# They do not change the results; threads change bits.
ELSEWHERE = tuple(field.name for field in fields(Places) if field.name != "threads_per_run")


@dataclass(frozen=True)
class Common(Places):
    """Options of every command line that trains configurations of the user.

    Attributes:
        dataset: digits, which needs no download, mnist, fashion_mnist, kmnist, folder:PATH, your
            images in PATH/CLASS/ or in PATH, or table:FILE, the columns of a CSV or Parquet file.
        image_size: height and width to which images of a folder are resized, or one number for
            both.
        image_range: the values of black and white, of images that have more than 8 bits.
        background: on which transparent images are composed.
        label: column of a table that holds the class of each row.
        metric: a registered metric of every run, FILE.py:NAME.
        settings: settings of every run (`RunConfig`); those that a study sweeps are refused. A
            network, a likelihood or a term may be FILE.py:NAME.
    """

    dataset: str = "digits"
    image_size: tuple[int, ...] | None = None
    image_range: tuple[float, float] | None = None
    background: Literal["white", "black"] = "white"
    label: str | None = None
    metric: Annotated[tuple[str, ...], UseAppendAction] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def base(
        self, config: RunConfig, epochs: int, first: Mapping[str, Any] | None = None
    ) -> RunConfig:
        """Return a configuration with the given settings; `epochs` are the dataset's.

        The user's files are loaded. `first` are values of swept settings that others need.
        """
        for address in self.metric:
            if registry.load(address, "metric") not in registry.METRICS:
                raise UserError(f"--metric {address}: it is not registered; give FILE.py:NAME")
        given = dict(self.settings)
        for name, kind in registry.SETTINGS.items():
            if name in given:
                given[name] = registry.load(given[name], kind)
        if "terms" in given:
            given["terms"] = {registry.load(t, "term"): w for t, w in given["terms"].items()}
        found = config.replace(**{"epochs": epochs, **(first or {}), **given})
        if unknown := [name for name in found.terms if name not in terms()]:
            known = ", ".join(terms())
            raise UserError(f"term {unknown[0]!r}: choose one of {known}, or give FILE.py:NAME")
        for name, model in (("hidden", "mlp"), ("channels", "conv")):
            if name in self.settings and found.model != model:
                raise UserError(f"--{name} with model={found.model!r}: only {model} has them")
        return found


@dataclass(frozen=True)
class Options(Common):
    """Options of every study's command line.

    Attributes:
        values: values of the study's axis instead of its defaults; a value of several numbers has
            commas (--values 256 512,256), an empty one is none.
        seeds: repetitions of every value (3, unless the study has another number).
        refit: test images, the first of all, to which the posterior of every finished run is
            refitted one by one for the summary: neg_elbo of the decoder alone, and the gap of the
            encoder (0 leaves them out).
    """

    values: tuple[str, ...] | None = None  # of any kind from Python
    seeds: int | None = None
    refit: int = 0


# Options of several words NAME=VALUE, or, of terms, one option each.
NAMED = ("terms", "model_options", "term_options")
REPEATED = {"terms": "term", "metric": "metric"}
FORMS = {
    "terms": "[FILE.py:]NAME=WEIGHT",
    "model_options": "NAME=VALUE",
    "term_options": "TERM.NAME=VALUE",
}
SETTINGS = [field.name for field in fields(RunConfig) if field.name != "seed"]


def setting_options(base: RunConfig, notes: Mapping[str, str]) -> type:
    """Return a dataclass with an option for every setting but the seed; None means not given.

    The help shows the settings of `base` as defaults, or the note on a setting.
    """
    parsed = docstring_parser.parse(RunConfig.__doc__ or "").params
    helps = {param.arg_name: " ".join((param.description or "").split()) for param in parsed}
    kinds, made = get_type_hints(RunConfig), list[tuple[str, Any, Any]]()
    for name in SETTINGS:
        default = " ".join(words(getattr(base, name))) or "none"
        if name == "epochs":
            default = "50; 20 for 10,000 training images or more"
        shown = "" if name in NAMED else f"({notes.get(name, f'default: {default}')})"
        hint: Any = arg(help=helps[name], help_behavior_hint=shown, metavar=FORMS.get(name))
        kind = tuple[str, ...] if name in NAMED else kinds[name]
        option: Any = Annotated[kind | None, hint]
        if name == "terms":
            hint = arg(name="term", help=helps[name], metavar=FORMS[name])
            option = Annotated[kind, UseAppendAction, hint]
        brief = notes.get(name, default).removeprefix("default: ")
        brief = f"({brief.partition(',')[0]})" if name in notes and name != "epochs" else brief
        unset = () if name == "terms" else None
        made.append((name, option, field(default=unset, metadata={"default": brief})))
    return make_dataclass("Settings", made, frozen=True)


def flag(name: str) -> str:
    """Return an option as it is written on a command line."""
    return f"--{REPEATED.get(name, name).replace('_', '-')}"


def terms() -> list[str]:
    """Return the names of all loss terms: the built-in and the registered ones."""
    return [*dict.fromkeys([*registry.BUILT_IN_TERMS, *registry.TERMS])]


def start_words(name: str) -> list[str]:
    """Return the words after `python` that start a study: a page of `studies`, or this script."""
    is_page = (Path(__file__).parents[1] / f"{name}.py").exists()
    return ["-m", f"studies.{name}"] if is_page else [sys.argv[0]]


def text(value: object) -> str:
    """Return a value of an axis as text: several numbers with commas, "none" if it is empty."""
    if isinstance(value, Mapping):
        value = tuple(f"{name}={weight}" for name, weight in value.items())
    return (",".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


def option_text(value: object) -> str:
    """Return an option of a network or a term as text, which `option_value` reads."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) + "," * (len(value) < 2)
    return str(value)


def option_value(text: str) -> Any:  # noqa: ANN401 - of any kind
    """Return a number, True or False, a tuple of several with commas, or else the text."""
    if "," in text:
        return tuple(option_value(part) for part in text.split(",") if part)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def read_named(name: str, given: Sequence[str]) -> dict[str, Any]:
    """Return a setting of `NAMED` from the words of its option."""
    found = dict[str, Any]()
    for word in given:
        key, equal, value = word.rpartition("=") if name == "terms" else word.partition("=")
        term, dot, option = key.partition(".")
        read = option_value(value)
        right = not isinstance(read, bool | str | tuple) if name == "terms" else True
        if not (key and equal and right and (name != "term_options" or (term and option))):
            raise UserError(f"{flag(name)} {word}: write {FORMS[name]}")
        if name == "term_options":
            found.setdefault(term, {})[option] = read
        else:
            found[key] = read
    return found


def words(value: object) -> list[str]:
    """Return the words after an option on a command line."""
    if isinstance(value, Mapping):
        flat = dict[str, Any]()
        for name, given in value.items():
            one = isinstance(given, Mapping)
            flat |= {f"{name}.{option}": v for option, v in given.items()} if one else {name: given}
        return [f"{name}={option_text(v)}" for name, v in flat.items()]
    return [text(part) for part in value] if isinstance(value, tuple) else [str(value)]


def chosen(options: Places, left_out: Container[str] = ()) -> dict[str, Any]:
    """Return the options and settings that are given, but for those left out, by name."""
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    defaults = {f.name: f.default for f in fields(options)}
    both = {**given.pop("settings", {}), **given}
    return {k: v for k, v in both.items() if k not in left_out and v != defaults.get(k)}


def arguments(options: Places, left_out: Container[str] = ()) -> list[str]:
    """Return the command line that gives options, but for those left out."""
    line = []
    for name, value in chosen(options, left_out).items():
        option = flag(name)
        given_words = [] if value is True else words(value)
        if name in REPEATED:
            line += [word for pair in given_words for word in (option, pair)]
        else:
            line += [option, *given_words]
    return line
