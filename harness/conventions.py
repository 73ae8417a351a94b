"""The KL weights of well-known codebases, and of any loss, in one unit.

A codebase's loss is A E + W rate for each image, where E is the data term, summed over the D values
of an image, and the rate is the KL, summed over the L latents. Up to a factor of the whole loss,
which Adam ignores but for its eps, that is E + beta * rate with

    beta = W / (A a^k),   k = 2 of the squared, 1 of the absolute error, 0 of cross-entropy,

of pixels from 0 to 1, where the codebase's own pixels are a wide. It is the loss of a Gaussian
decoder of variance beta / 2, of a Laplace decoder of scale beta, and of binary pixels at beta = 1.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from harness.config import RunConfig, finite, whole
from harness.errors import UserError

Data = Literal["mse", "l1", "bce"]
Reduction = Literal["mean", "sum", "total"]
KLNormalization = Literal["pixels", "batch", "latent", "sum"]

LIKELIHOODS: dict[Data, Any] = {"mse": "gaussian", "l1": "laplace", "bce": "bernoulli"}
FORM = (
    "[factor*]DATA:REDUCTION + weight*kl:REDUCTION, where DATA is mse, l1 or bce, REDUCTION mean, "
    "sum or total"
)
GREY = "cross-entropy is an exact ELBO of binary pixels at beta 1, and no likelihood of grey ones"


@dataclass(frozen=True)
class Convention:
    """The loss of a codebase, with its defaults.

    Attributes:
        name: by which `translate` finds it.
        data, reduction, factor: the data term, its reduction and its factor. "mean" is over values
            and images, "sum" over values, with the mean over images, "total" the sum over both.
        weight, kl, kl_factor: the KL's weight and reduction, and a factor beside the weight.
        source: path and version in which it was read.
        shape, latent_size, batch_size, training_size: of an image, channels first; number of
            latents; images of a step; images of the training set.
        weight_by: "training_size" where the weight is batch_size / training_size.
        pixels: lowest and highest value of the pixels.
        scale: whether the decoder's scale is fixed by the weight, fitted or learned.
        channel_mean: whether the data term is a mean over channels.
        settings: further settings of `RunConfig`.
        notes: what a user has to know of it, a sentence each.
    """

    name: str
    data: Data
    reduction: Reduction
    kl: Reduction
    factor: float = 1.0
    weight: float = 1.0
    kl_factor: float = 1.0
    source: str = ""
    shape: tuple[int, ...] = (1, 28, 28)
    latent_size: int = 10
    batch_size: int = 32
    training_size: int = 0
    weight_by: str = ""
    pixels: tuple[float, float] = (0.0, 1.0)
    scale: Literal["fixed", "optimal", "learned"] = "fixed"
    channel_mean: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = {"latent_size": self.latent_size, "batch_size": self.batch_size}
        sizes |= {"training_size": self.training_size} if self.weight_by else {}
        for name, value in [*sizes.items(), *(("shape", side) for side in self.shape or (0,))]:
            whole(name, value, at_least=1)
        if not (len(self.pixels) == 2 and -math.inf < self.pixels[0] < self.pixels[1] < math.inf):
            raise UserError(f"pixels={self.pixels!r}: give the lowest and the highest value")
        if self.data == "bce" and tuple(self.pixels) != (0, 1):
            given = f"bce with pixels={self.pixels!r}"
            raise UserError(f"{given}: cross-entropy needs pixels from 0 to 1; give mse or l1")
        finite("weight", self.weight, ">= 0")
        finite("factor", self.factor, "> 0")

    @property
    def loss(self) -> str:
        """The loss in the form of `parse`, without `scale` and `channel_mean`."""
        factor = "" if self.factor == 1 else f"{self.factor:g}*"
        weight = "B/N" if self.weight_by else f"{self.weight * self.kl_factor:g}"
        return f"{factor}{self.data}:{self.reduction} + {weight}*kl:{self.kl}"

    @property
    def beta(self) -> float:
        """Weight of the rate beside the summed data term of pixels from 0 to 1, if that is fixed.

        Beside the negative log-likelihood, where the scale is fitted or learned.
        """
        values, batch = math.prod(self.shape), float(self.batch_size)
        a = self.factor * {"mean": 1 / values, "sum": 1.0, "total": batch}[self.reduction]
        if self.channel_mean:
            a /= self.shape[0]
        if self.scale == "fixed":
            a *= (self.pixels[1] - self.pixels[0]) ** {"mse": 2, "l1": 1, "bce": 0}[self.data]
        weight = batch / self.training_size if self.weight_by else self.weight
        reduced = {"mean": 1 / self.latent_size, "sum": 1.0, "total": batch}[self.kl]
        return weight * self.kl_factor * reduced / a

    def equal_weights(self) -> dict[KLNormalization, float]:
        """Return the KL weight of the same beta in each normalisation of the harness."""
        values = math.prod(self.shape)
        per_value = self.beta / values
        return {
            "pixels": self.beta,
            "batch": per_value,
            "latent": per_value * self.latent_size,
            "sum": per_value / self.batch_size,
        }

    def config(self) -> RunConfig:
        """Return a run whose loss has a gradient of the same direction.

        In the normalisation whose weight is the same for images of any size.
        """
        of_kl: dict[Reduction, KLNormalization] = {"sum": "batch", "mean": "latent", "total": "sum"}
        normalization = of_kl[self.kl] if self.reduction == "mean" else "pixels"
        return RunConfig(
            likelihood=LIKELIHOODS[self.data],
            kl_weight=self.equal_weights()[normalization],
            kl_normalization=normalization,
            latent_size=self.latent_size,
            batch_size=self.batch_size,
            sigma=self.scale,
            **self.settings,
        )


@cache
def conventions() -> dict[str, Convention]:
    """Return all conventions by name (harness/conventions.toml)."""
    file = Path(__file__).with_suffix(".toml")
    found = {}
    for name, row in tomllib.loads(file.read_text(encoding="utf-8")).items():
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k != "loss"
        }
        found[name] = replace(parse(row["loss"]), name=name, **values)
    return found


@dataclass(frozen=True)
class Translation:
    """A codebase's KL weight in the harness's units.

    Attributes:
        name: of the convention, or its loss as it was given.
        beta: weight of the rate beside the data term, summed over an image of pixels from 0 to 1;
            None where the decoder's scale is fitted or learned.
        decoder_variance: beta / 2 of the squared error, pixel^2; else None.
        laplace_scale: beta of the absolute error; else None.
        grey_levels: standard deviation of that decoder, in grey levels of 255; else None.
        equal_weights: KL weight of the same beta by normalisation.
        config: a run whose loss has a gradient of the same direction.
        warnings: what to know of it, a sentence each.
    """

    name: str
    beta: float | None
    decoder_variance: float | None
    laplace_scale: float | None
    grey_levels: float | None
    equal_weights: Mapping[KLNormalization, float]
    config: RunConfig
    warnings: tuple[str, ...]


def translate(
    name: str,
    *,
    weight: float | None = None,
    shape: Sequence[int] | None = None,
    latent_size: int | None = None,
    batch_size: int | None = None,
    training_size: int | None = None,
    pixels: Sequence[float] | None = None,
) -> Translation:
    """Return what the KL weight of a codebase means; what is not given has its defaults.

    The name is that of a convention, or a loss as `parse` reads it; all else is as in `Convention`.

    Examples:
        >>> translate("pytorch_vae").beta, translate("mse:mean + 0.1*kl:sum").beta
        (3.072, 78.4)
    """
    sizes = {"latent_size": latent_size, "batch_size": batch_size, "training_size": training_size}
    found = find(name, weight=weight, shape=shape, pixels=pixels, **sizes)
    beta = found.beta if found.scale == "fixed" else None
    variance = scale = levels = None
    if beta is not None and found.data == "mse":
        variance, levels = beta / 2, 255 * math.sqrt(beta / 2)
    if beta is not None and found.data == "l1":
        scale, levels = beta, 255 * (math.sqrt(2) * beta)
    warnings = found.notes
    if found.data == "bce" and not math.isclose(found.beta, 1):
        needed = f"cross-entropy needs beta 1, and here it is {found.beta:.4g}"
        warnings = (f"no ELBO of any data: {needed}", *warnings)
    elif found.data == "bce" and not found.settings.get("binarization"):
        warnings = (GREY, *warnings)
    weights, config = found.equal_weights(), found.config()
    return Translation(found.name, beta, variance, scale, levels, weights, config, warnings)


def find(name: str, **given: Any) -> Convention:  # noqa: ANN401 - the arguments of `translate`
    """Return the convention that `translate` takes; a UserError names those that are near."""
    if ":" not in name and name not in conventions():
        near = difflib.get_close_matches(name, conventions(), 3, 0.5) or list(conventions())
        raise UserError(
            f"convention {name!r}: choose among {', '.join(near)}, or give a loss {FORM}"
        )
    values: dict[str, Any] = {
        k: tuple(v) if k in ("shape", "pixels") else v for k, v in given.items() if v is not None
    }
    if "weight" in values:
        values["weight_by"] = ""
    return replace(parse(name) if ":" in name else conventions()[name], **values)


TERM = re.compile(
    r"((?P<factor>(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)\*)?(?P<term>mse|l1|bce|kl):(?P<by>mean|sum|total)"
)


def parse(loss: str) -> Convention:
    """Return the convention of a loss `[factor*]DATA:REDUCTION + weight*kl:REDUCTION`.

    DATA is mse, l1 or bce, and a reduction mean, sum or total, as in `Convention`. The two terms
    have any order. A UserError names the term that cannot be read.
    """
    found = dict[str, tuple[float, Any, Any]]()
    for term in re.split(r"(?<!e)\+", loss):
        match = TERM.fullmatch("".join(term.split()))
        kind = "kl" if match and match["term"] == "kl" else "data"
        if match is None or kind in found:
            raise UserError(f"loss {loss!r}: {term.strip()!r} cannot be read; give {FORM}")
        found[kind] = float(match["factor"] or 1), match["term"], match["by"]
    if len(found) < 2:
        raise UserError(f"loss {loss!r} lacks a term; give {FORM}")
    (factor, data, reduction), (weight, _, kl) = found["data"], found["kl"]
    return Convention(loss, data, reduction, kl, factor, weight)
