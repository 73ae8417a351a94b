"""`RunConfig`: the settings of one training run, checked when it is made."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pkgutil import resolve_name
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from harness import registry
from harness.errors import UserError as UserError

Drawing = Literal["none", "stochastic", "threshold", "uniform"]
Precision = Literal["float32", "tf32"]

# Settings of the update of weights, all numbers of each run.
UPDATE = (
    *("optimizer", "learning_rate", "adam_betas", "adam_eps", "momentum", "weight_decay"),
    *("lr_schedule", "lr_milestones", "lr_factor", "lr_warmup_epochs"),
)

# Settings that have an effect only beside some values of another setting.
NEEDS = {
    "adam_betas": ("optimizer", ("adam", "adamw")),
    "adam_eps": ("optimizer", ("adam", "adamw")),
    "momentum": ("optimizer", ("sgd",)),
    "lr_milestones": ("lr_schedule", ("steps",)),
    "lr_factor": ("lr_schedule", ("exponential", "steps")),
    "activation": ("model", ("mlp", "conv")),
}

FROM_ZERO = ("kl_warmup_epochs", "lr_warmup_epochs", "patience", "seed")
POSITIVE = ("learning_rate", "adam_eps", "lr_factor")  # other numbers may be 0


def checked_name(name: str, what: str = "study_name", longest: int = 100) -> str:
    """Return a name that is allowed for folders and in MLflow; another is a `UserError`."""
    if not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{longest - 1}}}", name):
        allowed = f"up to {longest} letters, digits, '.', '_' and '-', the first no '.' or '-'"
        raise UserError(f"{what}={name!r}: use {allowed}")
    return name


class Default(float):
    """A default value, as distinct from an equal value that is given."""


class Options(dict[str, Any]):
    """Values by name, in the order of the names; hashable, since a configuration is a value."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


@dataclass(frozen=True)
class RunConfig:
    """Settings of one run; together with a dataset they determine every number of it.

    A setting that cannot be used, alone or beside the others, is a `UserError`.

    Attributes:
        model: "mlp"; "linear": no hidden layers, no output sigmoid (pPCA as a VAE); "conv": 3 x 3
            convolutions of stride 2 and a linear layer; or the name of a registered network.
        model_options: options of a registered network by name.
        hidden: widths of the encoder's hidden layers, for "mlp"; the decoder mirrors them.
        channels: channels of the encoder's convolutions, for "conv"; the decoder mirrors them.
        activation: of hidden layers, a name of `torch.nn.functional`; for "mlp" and "conv".
        latent_size: number of latents L.
        head: "gaussian": mean, log-variance; "relu": ReLUs of mean, standard deviation (the blog).
        latent: "stochastic", or "deterministic": a plain autoencoder without noise or KL.
        kl_weight: factor of the KL term; 0, also the default of a deterministic latent, trains on
            the error alone.
        kl_normalization: divides the KL by batch x "pixels", "batch", batch x "latent" or 1, "sum".
        kl_warmup_epochs: epochs over which the KL weight rises linearly from 0.
        kl_cycles: equal parts of the training that each begin with that warm-up (Fu et al. 2019).
        free_bits: nats of each latent's batch-mean KL that are not penalised (Kingma et al. 2016).
        sigma: the Gaussian decoder's variance: "fixed": beta / 2; "optimal": the mse of each batch;
            "learned": one trained scalar (sigma-VAE, Rybkin et al. 2021). Unless fixed, the loss is
            an exact negative ELBO per pixel at beta = 1. Likewise the scale of a Laplace decoder:
            beta, the mean absolute error, or learned.
        likelihood: "gaussian"; "laplace": absolute error; "bernoulli": cross-entropy, exact ELBO of
            binary data at beta = 1; "continuous_bernoulli": density of grey pixels in [0, 1], exact
            ELBO at beta = 1; or the name of a registered likelihood.
        binarization: "none"; "stochastic": training pixels are drawn anew every epoch with their
            grey value as probability; "threshold": at a half. Only with "bernoulli", which without
            it is grey-pixel cross-entropy: a loss, and no likelihood.
        dequantize: "uniform": a pixel of grey level k, 0 to K, is (k + u) / (K + 1) with u from
            U(0, 1), drawn anew every epoch, so that a density bounds the likelihood of grey levels.
        terms: weight of each registered loss term by name, in the unit of beta: the loss is
            proportional to error + beta * rate + weight * term for all settings of the KL.
        term_options: options of loss terms by name: {term: {option: value}}.
        optimizer: "adam", "adamw" (decoupled weight decay) or "sgd", those of `torch.optim`.
        learning_rate: the optimiser's rate.
        adam_betas: decay of Adam's two moments per step.
        adam_eps: Adam's summand of the root of the second moment.
        momentum: factor of SGD's former step.
        weight_decay: of all weights: an L2 penalty in the gradient, or with "adamw" a shrinkage.
        lr_schedule: of the rate, by epochs t after the warm-up: "constant"; "cosine" to 0 at the
            end; "exponential": lr_factor^t; "steps": lr_factor at each milestone.
        lr_milestones: epochs t after which "steps" multiplies the rate, ascending.
        lr_factor: in (0, 1], of "exponential" and "steps".
        lr_warmup_epochs: epochs n = 1 to W before that, at n / (W + 1) of the rate.
        clip_norm: greatest norm of the gradient of all weights, to which it is shortened; 0: any.
        patience: epochs without a new best one after which training stops; 0: never.
        keep: weights that are evaluated, saved and shown: of the "last" or the "best" epoch, that
            with the lowest validation neg_elbo, or loss where that is not defined.
        batch_size: images per step; an incomplete last batch is left out of its epoch.
        epochs: passes over the training split.
        precision: of training's matrix products: "float32", or "tf32" (10 instead of 23 bits of
            their factors), faster on a GPU; evaluation is always exact.
        seed: key of the initial weights, the batch order and the noise.
    """

    model: str = "mlp"
    hidden: tuple[int, ...] = (256, 64)
    channels: tuple[int, ...] = (32, 64)
    activation: Literal["relu", "tanh", "gelu", "silu", "leaky_relu", "elu"] = "relu"
    latent_size: int = 10
    head: Literal["gaussian", "relu"] = "gaussian"
    latent: Literal["stochastic", "deterministic"] = "stochastic"
    kl_weight: float = Default(1.0)
    kl_normalization: Literal["pixels", "batch", "latent", "sum"] = "pixels"
    kl_warmup_epochs: int = 0
    kl_cycles: int = 1
    free_bits: float = 0.0
    sigma: Literal["fixed", "optimal", "learned"] = "fixed"
    likelihood: str = "gaussian"
    binarization: Literal["none", "stochastic", "threshold"] = "none"
    dequantize: Literal["none", "uniform"] = "none"
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-3
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    lr_schedule: Literal["constant", "cosine", "exponential", "steps"] = "constant"
    lr_milestones: tuple[int, ...] = ()
    lr_factor: float = 1.0
    lr_warmup_epochs: int = 0
    clip_norm: float = 0.0
    patience: int = 0
    keep: Literal["last", "best"] = "last"
    batch_size: int = 32
    epochs: int = 20
    precision: Precision = "float32"
    seed: int = 0
    terms: Mapping[str, float] = field(default_factory=Options)
    model_options: Mapping[str, Any] = field(default_factory=Options)
    term_options: Mapping[str, Mapping[str, Any]] = field(default_factory=Options)

    def __post_init__(self) -> None:
        values = {name: plain(value) for name, value in vars(self).items()}
        for name, kind in registry.SETTINGS.items():
            known = [*registry.REGISTERED[kind]]  # a list, for what has no hash
            if values[name] not in known:
                choices = f"one of {', '.join(known)}, or register a {kind} of that name"
                raise UserError(f"{name}={values[name]!r}: choose {choices}")
        if values["latent"] == "deterministic" and isinstance(values["kl_weight"], Default):
            values["kl_weight"] = 0.0
        values |= {name: _checked(name, values[name], of) for name, of in _kinds().items()}
        weights = _named("terms", values["terms"], "weights")
        weights = {name: finite(f"terms[{name!r}]", w) for name, w in weights.items()}
        of_terms = _named("term_options", values["term_options"], "options of terms")
        of_terms = {n: _values(f"term_options[{n!r}]", o) for n, o in of_terms.items()}
        values |= {"terms": Options(weights), "term_options": Options(of_terms)}
        values["model_options"] = _values("model_options", values["model_options"])
        vars(self).update(values)  # the fields are frozen
        self._check_together()
        self._check_update()
        self._check_options()

    def _refuse(self, name: str, other: str, why: str) -> NoReturn:
        given = f"{name}={getattr(self, name)!r} with {other}={getattr(self, other)!r}"
        raise UserError(f"{given}{why}")

    def _check_together(self) -> None:
        if self.model == "conv" and not self.channels:
            self._refuse("channels", "model", ": give at least one convolution")
        if self.latent == "deterministic":
            for name, off in (("kl_weight", 0), ("free_bits", 0), ("sigma", "fixed")):
                if getattr(self, name) != off:
                    why = f", which has no KL and no likelihood: set {name}={off!r}"
                    self._refuse(name, "latent", why)
        if not self.has_scale and self.sigma != "fixed":
            why = ", which has no variance or scale; set sigma='fixed'"
            self._refuse("sigma", "likelihood", why)
        if self.likelihood != "bernoulli" and self.binarization != "none":
            why = ": binary pixels need likelihood='bernoulli'"
            self._refuse("binarization", "likelihood", why)
        if self.likelihood == "bernoulli" and self.dequantize != "none":
            why = ": it needs a density; choose another likelihood"
            self._refuse("dequantize", "likelihood", why)
        if self.kl_cycles > 1 and self.kl_warmup_epochs * self.kl_cycles > self.epochs:
            why = f": every warm-up must end within epochs={self.epochs}"
            self._refuse("kl_warmup_epochs", "kl_cycles", why)

    def _check_update(self) -> None:
        for name, value, allowed, fits in (
            ("adam_betas", self.adam_betas, "two numbers < 1", max(self.adam_betas) < 1),
            ("momentum", self.momentum, "a number < 1", self.momentum < 1),
            ("lr_factor", self.lr_factor, "a number <= 1", self.lr_factor <= 1),
        ):
            if not fits:
                raise UserError(f"{name}={value!r}: give {allowed}")
        if [*self.lr_milestones] != sorted(set(self.lr_milestones)):
            raise UserError(f"lr_milestones={self.lr_milestones!r}: give ascending epochs")
        if self.lr_warmup_epochs >= self.epochs:
            why = ": the warm-up must end before the last epoch"
            self._refuse("lr_warmup_epochs", "epochs", why)
        if self.patience > self.epochs:
            why = " never ends a training: give fewer epochs of patience, or 0"
            self._refuse("patience", "epochs", why)
        for name, (other, values) in NEEDS.items():
            default = RunConfig.__dataclass_fields__[name].default
            if getattr(self, other) not in values and getattr(self, name) != default:
                allowed = " or ".join(f"{other}={v!r}" for v in values)
                self._refuse(name, other, f" has no effect: leave it out, or give {allowed}")
        if self.lr_schedule == "steps" and not self.lr_milestones:
            self._refuse("lr_schedule", "lr_milestones", ": give at least one epoch")
        if self.lr_schedule in NEEDS["lr_factor"][1] and self.lr_factor == 1:
            self._refuse("lr_schedule", "lr_factor", " has no effect: give a factor below 1")

    def _check_options(self) -> None:
        network, defaults = registry.NETWORKS[self.model], RunConfig.__dataclass_fields__
        for name in ("hidden", "channels") if self.model not in registry.BUILT_IN else ():
            if getattr(self, name) != defaults[name].default:
                why = ": only a built-in network has it; give model_options"
                self._refuse(name, "model", why)
        for option in self.model_options:
            if option in defaults or option in self.terms:
                what = "fields of RunConfig" if option in defaults else "terms"
                raise UserError(f"model_options: {option!r} is one of the {what} too; rename it")
        what = f"network {self.model!r}"
        _known("model_options", self.model_options, what, registry.options_of(network.function))
        for name, options in self.term_options.items():
            if name not in self.terms:
                raise UserError(f"term_options: {name!r} is none of the terms; give its weight too")
            if name in registry.TERMS:
                allowed = registry.options_of(registry.TERMS[name])
                _known(f"term_options[{name!r}]", options, f"term {name!r}", allowed)

    @classmethod
    def seed_recipe(cls, **changes: Any) -> RunConfig:  # noqa: ANN401 - fields of this class
        """Return the blog's recipe (`head="relu"`, 10 latents, weight 1 / pixels), with changes."""
        return cls.from_convention("blog", **changes)

    @classmethod
    def from_convention(cls, name: str, **changes: Any) -> RunConfig:  # noqa: ANN401 - of this class
        """Return the settings of a codebase's loss (`harness.conventions`), with changes.

        Its likelihood, KL weight and normalisation, latent and batch size; the KL weight is that of
        the latent and batch size that are given.

        Examples:
            >>> round(RunConfig.from_convention("lightning_bolts", latent_size=20).kl_weight, 9)
            0.1
        """
        find = resolve_name("harness.conventions:find")  # which imports this module
        sizes = {k: v for k, v in changes.items() if k in ("latent_size", "batch_size")}
        found = find(name, **sizes).config()
        return replace(found, **{"kl_weight": Default(found.kl_weight), **changes})

    def replace(self, **changes: Any) -> RunConfig:  # noqa: ANN401 - fields of this class
        """Return a copy with some fields changed and everything checked again."""
        return replace(self, **changes)

    @property
    def selection(self) -> str:
        """The validation metric by which `keep` and `patience` compare epochs."""
        return "neg_elbo" if self.has_likelihood and self.latent == "stochastic" else "loss"

    @property
    def has_likelihood(self) -> bool:
        """Whether the decoder's output is a likelihood of the data: all but grey cross-entropy."""
        return self.likelihood != "bernoulli" or self.binarization != "none"

    @property
    def drawing(self) -> Drawing:
        """How pixels are drawn from grey ones: the binarization, or "uniform" dequantisation."""
        return self.binarization if self.dequantize == "none" else self.dequantize

    @property
    def has_scale(self) -> bool:
        """Whether the likelihood has a scale: variance of a Gaussian, b of a Laplace decoder."""
        return registry.LIKELIHOODS[self.likelihood].has_scale

    def named(self) -> dict[str, Any]:
        """Return every setting by the name under which it is recorded and swept.

        Fields by their names, options of the network by theirs, weights of terms by those of the
        terms, and options of terms as `term.option`.
        """
        values = asdict(self)
        weights, options = values.pop("terms"), values.pop("model_options")
        of_terms = values.pop("term_options").items()
        flat = {f"{term}.{name}": v for term, given in of_terms for name, v in given.items()}
        return values | options | weights | flat

    def to_json(self) -> str:
        """Return the configuration as a JSON object, field by field."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """Read a configuration that `to_json` wrote; fields that it lacks take their defaults."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:  # also digits and brackets without end
            raise UserError(f"configuration is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise UserError(f"configuration is not a JSON object ({type(values).__name__})")
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise UserError(f"configuration has unknown fields {unknown}, of another version")
        return cls(**values)


@cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(RunConfig)


def _checked(name: str, value: Any, kind: Any) -> Any:  # noqa: ANN401 - of any kind
    """Return a setting as its type has it."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"{name}={value!r}: choose one of {', '.join(get_args(kind))}")
    elif kind is int:
        whole(name, value, at_least=0 if name in FROM_ZERO else 1)
    elif kind is float:
        return finite(name, value, "> 0" if name in POSITIVE else ">= 0")  # 1 and 1.0 are one run
    elif kind == tuple[int, ...]:
        if not isinstance(value, list | tuple):
            raise UserError(f"{name}={value!r}: give a list of whole numbers >= 1")
        for width in value:
            whole(name, width, at_least=1)
        return tuple(value)
    elif kind == tuple[float, float]:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise UserError(f"{name}={value!r}: give two numbers >= 0 and < 1")
        return tuple(finite(name, part, ">= 0") for part in value)
    return value


def _known(
    name: str, given: Mapping[str, Any], what: str, allowed: Mapping[str, Any] | None
) -> None:
    for option in given:
        if allowed is not None and option not in allowed:
            has = ", ".join(allowed) or "none"
            raise UserError(f"{name}: {option!r} is no option of {what} (it has: {has})")


def _named(name: str, value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(n, str) for n in value):
        raise UserError(f"{name}={value!r}: give a dictionary of {what} by name")
    return dict(sorted(value.items()))


def _values(name: str, given: object) -> Options:
    values = _named(name, given, "options")
    for option, value in values.items():
        each = value if isinstance(value, list | tuple) else [value]
        for part in each:
            if isinstance(part, int | float) and not isinstance(part, bool):
                finite(f"{name}[{option!r}]", part)
            elif not isinstance(part, str | bool):
                raise UserError(
                    f"{name}[{option!r}]={value!r}: give a number, a text, True, False or a list"
                )
        values[option] = tuple(each) if isinstance(value, list | tuple) else value
    return Options(values)


def plain(value: Any) -> Any:  # noqa: ANN401 - any setting
    """Return a setting with Python's numbers and lists in place of those of other libraries."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value.tolist() if hasattr(value, "tolist") else value


def whole(name: str, value: object, at_least: int) -> None:
    """Raise UserError for what is no whole number, or too low a one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise UserError(f"{name}={value!r}: give a whole number >= {at_least}")


def finite(name: str, value: object, sign: str = "") -> float:
    """Return a number as a float; else raise UserError. The sign is "", ">= 0" or "> 0"."""
    # A comparison, as math.isfinite overflows on a whole number without end.
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
        and (not sign or value > 0 or (value == 0 and sign == ">= 0"))
    ):
        return float(value)
    raise UserError(f"{name}={value!r}: give a finite number {sign}".rstrip())
