"""Names of networks, loss terms and metrics: the built-in ones, and a user's with their source.

This module imports no PyTorch: a built-in network is the address of a function, "module:function".
"""

from __future__ import annotations

import hashlib
import inspect
import linecache
import sys
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args

from harness.errors import UserError, line_of

Output = Literal["sigmoid", "identity"]
Kind = Literal["network", "term", "metric"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Network:
    """A registered network."""

    function: Callable[..., Any] | str  # as `network` registers it, or its address
    output: Output  # non-linearity behind the decoder's last layer
    # Weights are drawn from the run's stream "weights", or by the function itself from PyTorch's
    # generator, seeded from that stream.
    initialize: Literal["stream", "torch"] = "torch"
    settings: tuple[str, ...] = ()  # fields of `RunConfig` that a built-in network takes

    def build(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - of any network
        """Return the encoder and the decoder that the function makes."""
        address = self.function
        return (resolve_name(address) if isinstance(address, str) else address)(*args, **options)


@dataclass(frozen=True)
class Metric:
    """A registered metric; with `every_epoch` it is measured on validation data every epoch too."""

    function: Callable[..., Any]
    every_epoch: bool


_BUILT_IN = "harness.models.networks:"
NETWORKS = {  # by the name that `RunConfig.model` takes
    "mlp": Network(f"{_BUILT_IN}mlp", "sigmoid", "stream", ("hidden", "activation")),
    "linear": Network(f"{_BUILT_IN}linear", "identity", "stream"),
    "conv": Network(f"{_BUILT_IN}conv", "sigmoid", "stream", ("channels", "activation")),
}
BUILT_IN = tuple(NETWORKS)
TERMS: dict[str, Callable[..., Any]] = {}  # by the name that `RunConfig.terms` takes
METRICS: dict[str, Metric] = {}

_files: dict[Path, str] = {}  # files that `load` has executed -> their text


def network(name: str, *, output: Output = "sigmoid") -> Callable[[Function], Function]:
    """Register the decorated function as the network `RunConfig(model=name)`.

    The function is (data_shape, latent_size, **options) -> (encoder, decoder): two plain modules
    (B, *data_shape) -> (B, 2 L), the posterior's parameters, and (B, L) -> (B, *data_shape).
    `RunConfig.model_options` are its options.

    Args:
        name: not that of a built-in network; a second function of the same name replaces the first.
        output: non-linearity that follows the decoder: "sigmoid" for pixels in [0, 1], "identity".
    """
    _check("network", name, BUILT_IN)
    if output not in get_args(Output):
        raise UserError(f"output={output!r} of network {name!r}: choose sigmoid or identity")

    def register(function: Function) -> Function:
        NETWORKS[name] = Network(function, output)
        return function

    return register


def term(name: str) -> Callable[[Function], Function]:
    """Register the decorated function as the loss term `RunConfig(terms={name: weight})`.

    The function is (`harness.objective.Batch`, **options) -> Tensor of shape (); a second one of a
    name replaces the first. `RunConfig.term_options` are its options.
    """
    _check("term", name, BUILT_IN_TERMS)

    def register(function: Function) -> Function:
        TERMS[name] = function
        return function

    return register


def metric(name: str, *, every_epoch: bool = False) -> Callable[[Function], Function]:
    """Register the decorated function as a metric of every run that is measured from now on.

    The function is (`harness.VAE`, `harness.Split`) -> float. It is called once a run is trained,
    with the model in `eval` mode and without gradients, on the validation and the test split; the
    values are the metrics `val/NAME` and `test/NAME`. A second function of a name replaces the
    first. An exception or NaN costs the run that metric alone.

    Args:
        name: not that of a built-in metric.
        every_epoch: measure it on the validation split after every epoch too.
    """
    _check("metric", name, MEASURED)

    def register(function: Function) -> Function:
        METRICS[name] = Metric(function, every_epoch)
        return function

    return register


BUILT_IN_TERMS = ("total_correlation", "total_correlation_weighted", "mmd", "dip_i", "dip_ii")
QUALITY = (  # names of the metrics of `measure_quality`
    *("neg_log_likelihood", "neg_log_likelihood_se", "effective_samples", "aggregate_gap"),
    *("mutual_information", "mutual_information_lower", "probe_accuracy", "knn_accuracy"),
    *("feature_accuracy", "frechet", "frechet_reconstructions", "frechet_floor"),
)
MEASURED = (  # names of built-in metrics
    *("loss", "mse", "rate", "distortion", "neg_elbo", "calibration_ratio", "active_units"),
    *("learned_variance", "gap_to_linear", "pca_floor", *QUALITY),
)


def _check(kind: Kind, name: str, taken: tuple[str, ...]) -> None:
    if not name.isidentifier():
        raise UserError(f"{kind} {name!r}: choose a name of letters, digits and _")
    if name in taken:
        raise UserError(f"{kind} {name!r}: choose a name that is none of {', '.join(taken)}")


# --- a user's files -----------------------------------------------------------------------------


def load(address: str, kind: Kind) -> str:
    """Execute FILE.py of an address FILE.py:NAME, once, and return NAME, which it must register.

    A name alone is returned as it is. Modules beside the file can be imported by it.
    """
    path, _, name = address.rpartition(":")
    if not path:
        return address
    file = Path(path).resolve()
    if file not in _files:
        try:
            with tokenize.open(file) as open_file:  # in the encoding that Python reads
                text = open_file.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise UserError(f"{kind} {address}: {file} cannot be read ({error})") from error
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        _execute(text, str(file))
        _files[file] = text
    if name not in _registered(kind):
        raise UserError(f"{kind} {address}: the file registers no {kind} of that name")
    return name


def restore(kind: Kind, name: str, text: str, trust: Callable[[str], bool]) -> None:
    """Register a part of a stored run again by executing the text of its file.

    Nothing is done where the name is registered from the same text. `trust` gets the text and what
    it is, and returns whether it may be executed; otherwise that is a `UserError`.
    """
    if name in _registered(kind) and source(kind, name) == text:
        return
    if not text:
        raise UserError(f"{kind} {name!r}: its source was not stored; register it before")
    what = f"{kind} {name!r} of the stored run is code that was stored with it ({digest(text)})"
    if not trust(f"{text}\n\nThe {what}."):
        raise UserError(f"{what}: register the same code before, or allow it with trust (--trust)")
    _execute(text, f"<{kind} {name} of a stored run, {digest(text)}>")
    if name not in _registered(kind):
        raise UserError(f"{what}: it does not register that name")


def _execute(text: str, file: str) -> None:
    module = ModuleType(Path(file).stem)
    module.__file__ = file
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # where dataclasses look for it
    try:
        exec(compile(text, file, "exec"), vars(module))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{file} cannot be executed: {line_of(error)}") from error
    finally:
        # A module that is found by no name is sent to worker processes whole.
        del sys.modules[module.__name__]
        if before is not None:
            sys.modules[module.__name__] = before


def _registered(kind: Kind) -> dict[str, Any]:
    known: dict[Kind, dict[str, Any]] = {"network": NETWORKS, "term": TERMS, "metric": METRICS}
    return known[kind]


def source(kind: Kind, name: str) -> str:
    """Return the text of the file, or notebook cell, that defines a part, or ""."""
    part = _registered(kind)[name]
    function = inspect.unwrap(getattr(part, "function", part))
    function = getattr(function, "func", function)  # of a partial
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    text = "".join(linecache.getlines(code.co_filename)) if code else ""
    return text if text.endswith("\n") or not text else f"{text}\n"  # as linecache reads a file


def options_of(function: Callable[..., Any] | str) -> dict[str, Any] | None:
    """Return the options of a network or a term, parameters with a name alone or a default, and it.

    None if it takes any. A built-in network has none: its options are fields of `RunConfig`.
    """
    if isinstance(function, str):
        return {}
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    named = [p for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    return {p.name: p.default for p in named}


def digest(text: str) -> str:
    """Return the first 12 digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sources(model: str, terms: tuple[str, ...]) -> dict[tuple[Kind, str], str]:
    """Return the source of each part of a run that a user has registered."""
    parts: list[tuple[Kind, str]] = [] if model in BUILT_IN else [("network", model)]
    parts += [("term", name) for name in terms if name not in BUILT_IN_TERMS]
    return {part: source(*part) for part in [*parts, *(("metric", name) for name in METRICS)]}
