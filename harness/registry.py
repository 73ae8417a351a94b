"""Names of networks, likelihoods, terms and metrics: built-in ones, and a user's with their source.

This module imports no PyTorch: a built-in part is the address "module:name" of its code.
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
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from harness.errors import UserError, line_of

if TYPE_CHECKING:
    from harness.config import RunConfig

Output = Literal["sigmoid", "identity"]
Kind = Literal["network", "likelihood", "term", "metric"]
Function = TypeVar("Function", bound=Callable[..., Any])
T = TypeVar("T")


@dataclass(frozen=True)
class Network:
    """A registered network."""

    function: Callable[..., Any] | str  # as `network` registers it, or its address
    output: Output  # non-linearity behind the decoder's last layer
    settings: tuple[str, ...] = ()  # fields of `RunConfig` that a built-in network takes

    def build(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - of any network
        """Return the encoder and the decoder that the function makes."""
        address = self.function
        return (resolve_name(address) if isinstance(address, str) else address)(*args, **options)


@dataclass(frozen=True)
class Likelihood:
    """A registered likelihood."""

    kind: type | str  # as `likelihood` registers it, or its address
    has_scale: bool

    def load(self) -> Any:  # noqa: ANN401 - a class of `harness.parts.likelihoods`' protocol
        """Return the class."""
        return resolve_name(self.kind) if isinstance(self.kind, str) else self.kind


@dataclass(frozen=True)
class Metric:
    """A registered metric; with `every_epoch` it is measured on validation data every epoch too."""

    function: Callable[..., Any]
    every_epoch: bool


_BUILT_IN = "harness.models.networks:"
NETWORKS = {  # by the name that `RunConfig.model` takes
    "mlp": Network(f"{_BUILT_IN}mlp", "sigmoid", ("hidden", "activation")),
    "linear": Network(f"{_BUILT_IN}linear", "identity"),
    "conv": Network(f"{_BUILT_IN}conv", "sigmoid", ("channels", "activation")),
}
BUILT_IN = tuple(NETWORKS)
LIKELIHOODS = {  # by the name that `RunConfig.likelihood` takes
    "gaussian": Likelihood("harness.parts.likelihoods:Gaussian", has_scale=True),
    "laplace": Likelihood("harness.parts.likelihoods:Laplace", has_scale=True),
    "bernoulli": Likelihood("harness.parts.likelihoods:Bernoulli", has_scale=False),
    "continuous_bernoulli": Likelihood(
        "harness.parts.likelihoods:ContinuousBernoulli", has_scale=False
    ),
}
BUILT_IN_LIKELIHOODS = tuple(LIKELIHOODS)
TERMS: dict[str, Callable[..., Any]] = {}  # by the name that `RunConfig.terms` takes
METRICS: dict[str, Metric] = {}
REGISTERED: dict[Kind, dict[str, Any]] = {
    **{"network": NETWORKS, "likelihood": LIKELIHOODS, "term": TERMS, "metric": METRICS}
}
SETTINGS: dict[str, Kind] = {"model": "network", "likelihood": "likelihood"}  # that name a part

_files: dict[Path, str] = {}  # files that `load` has executed -> their text
_registered_in: dict[tuple[Kind, str], str] = {}  # file, or notebook cell, of a part


def network(name: str, *, output: Output = "sigmoid") -> Callable[[Function], Function]:
    """Register the decorated function as the network `RunConfig(model=name)`.

    The function is (data_shape, latent_size, **options) -> (encoder, decoder): two plain modules
    (B, *data_shape) -> (B, 2 L), the posterior's parameters, and (B, L) -> (B, *data_shape), behind
    which `output` is the non-linearity. `RunConfig.model_options` are its options. A second
    function of a name replaces the first.
    """
    if output not in get_args(Output):
        raise UserError(f"output={output!r} of network {name!r}: choose sigmoid or identity")
    return _registering("network", name, lambda function: Network(function, output))


def likelihood(name: str) -> Callable[[type[T]], type[T]]:
    """Register the decorated class as the likelihood `RunConfig(likelihood=name)`.

    Its static functions are `error(x, output)`, which training sums, shape (B,), of images and the
    decoder's output behind its non-linearity; `neg_log_density(error, scale, D)`, in nats; and
    `mean(output)`. `fit(mean_error, D)`, the best scale, may be left out. `logits = True` is for
    one that takes the output before the non-linearity, `has_scale = False` for one without scale.
    A second class of a name replaces the first.
    """

    def made(kind: type) -> Likelihood:
        if not isinstance(kind, type):
            raise UserError(f"likelihood {name!r} is {kind!r}: decorate a class")
        for function in ("error", "neg_log_density", "mean"):
            if not callable(getattr(kind, function, None)):
                raise UserError(f"likelihood {name!r} has no {function}: give it that function")
        for flag, default in (("logits", False), ("has_scale", True)):
            setattr(kind, flag, bool(getattr(kind, flag, default)))
        return Likelihood(kind, kind.has_scale)  # type: ignore[attr-defined]

    return _registering("likelihood", name, made)


def term(name: str) -> Callable[[Function], Function]:
    """Register the decorated function as the loss term `RunConfig(terms={name: weight})`.

    The function is (`harness.objective.Batch`, **options) -> Tensor of shape (); a second one of a
    name replaces the first. `RunConfig.term_options` are its options.
    """
    return _registering("term", name, lambda function: function)


def metric(name: str, *, every_epoch: bool = False) -> Callable[[Function], Function]:
    """Register the decorated function as a metric of every run that is measured from now on.

    The function is (`harness.VAE`, `harness.Split`) -> float. It is called once a run is trained,
    with the model in `eval` mode and without gradients, on the validation and the test split, with
    `every_epoch` on the former after every epoch too; the values are the metrics `val/NAME` and
    `test/NAME`. A second function of a name replaces the first. An exception or NaN costs the run
    that metric alone.
    """
    return _registering("metric", name, lambda function: Metric(function, every_epoch))


BUILT_IN_TERMS = (
    *("total_correlation", "total_correlation_weighted", "mmd", "dip_i", "dip_ii"),
    *("capacity", "rate_floor"),
)
QUALITY = (  # names of the metrics of `measure_quality`
    *("neg_log_likelihood", "neg_log_likelihood_se", "neg_log_likelihood_slack"),
    *("effective_samples", "proposal_inflation", "aggregate_gap", "mutual_information"),
    *("mutual_information_lower", "mutual_information_lower_se", "probe_accuracy", "knn_accuracy"),
    *("feature_accuracy", "frechet", "frechet_reconstructions", "frechet_floor"),
    *("latent_std", "posterior_sigma"),
)
MEASURED = (  # names of built-in metrics
    *("loss", "mse", "mae", "rate", "distortion", "neg_elbo", "neg_elbo_se", "bits_per_dim"),
    *("calibration_ratio", "active_units", "learned_variance", "learned_scale", "fitted_scale"),
    *("laplace_scale", "gap_to_linear", "pca_floor", *QUALITY),
)
TAKEN: dict[Kind, tuple[str, ...]] = {  # names of built-in parts
    "network": BUILT_IN,
    "likelihood": BUILT_IN_LIKELIHOODS,
    "term": BUILT_IN_TERMS,
    "metric": MEASURED,
}


def _registering(kind: Kind, name: str, made: Callable[[Any], Any]) -> Callable[[T], T]:
    if not name.isidentifier():
        raise UserError(f"{kind} {name!r}: choose a name of letters, digits and _")
    if name in TAKEN[kind]:
        raise UserError(f"{kind} {name!r}: choose a name that is none of {', '.join(TAKEN[kind])}")

    file = inspect.stack(0)[2].filename  # of the caller of `network`, `likelihood`, ...

    def register(part: T) -> T:
        REGISTERED[kind][name] = made(part)
        _registered_in[kind, name] = file
        return part

    return register


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
    if name not in REGISTERED[kind]:
        raise UserError(f"{kind} {address}: the file registers no {kind} of that name")
    return name


def restore(kind: Kind, name: str, text: str, trust: Callable[[str], bool]) -> None:
    """Register a part of a stored run again by executing the text of its file.

    Nothing is done where the name is registered from the same text. `trust` gets the text and what
    it is, and returns whether it may be executed; otherwise that is a `UserError`.
    """
    if name in REGISTERED[kind] and source(kind, name) == text:
        return
    if not text:
        raise UserError(f"{kind} {name!r}: its source was not stored; register it before")
    what = f"{kind} {name!r} of the stored run is code that was stored with it ({digest(text)})"
    if not trust(f"{text}\n\nThe {what}."):
        raise UserError(f"{what}: register the same code before, or allow it with trust (--trust)")
    _execute(text, f"<{kind} {name} of a stored run, {digest(text)}>")
    if name not in REGISTERED[kind]:
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


def source(kind: Kind, name: str) -> str:
    """Return the text of the file, or notebook cell, that registers a part, or ""."""
    text = "".join(linecache.getlines(_registered_in.get((kind, name), "")))
    return text if text.endswith("\n") or not text else f"{text}\n"  # as linecache reads a file


def options_of(function: Callable[..., Any] | str) -> dict[str, Any] | None:
    """Return options of a network or a term with their defaults; None if it takes any."""
    if isinstance(function, str):  # built in: its options are fields of `RunConfig`
        return {}
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    named = [p for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    return {p.name: p.default for p in named}


def digest(text: str) -> str:
    """Return the first 12 digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sources(config: RunConfig) -> dict[tuple[Kind, str], str]:
    """Return the source of each part of a run that a user has registered."""
    named: list[tuple[Kind, str]] = [("network", config.model), ("likelihood", config.likelihood)]
    named += [("term", name) for name in config.terms]
    named += [("metric", name) for name in METRICS]
    return {(kind, name): source(kind, name) for kind, name in named if name not in TAKEN[kind]}
