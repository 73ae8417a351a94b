"""The claims of `references.toml`: the runs that they need, their measures, and how each is judged.

A claim is a number that a source states, its measurement, and the values that pass.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from analysis.frames import class_errors, paired_difference
from harness.config import RunConfig

if TYPE_CHECKING:
    from studies.ledger.evidence import Evidence

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"
BLOG_EPOCHS = 176  # after which the blog prints its losses


@dataclass(frozen=True)
class Runs:
    """Runs that a claim is measured on: one configuration, several seeds.

    The label identifies their trials: other settings need another. With `gpu` only the full form on
    a GPU trains them, since a CPU would take a day.
    """

    label: str
    config: RunConfig
    seeds: int
    gpu: bool = False


Obtained = float | tuple[float, float]  # a range where the reference is a single draw from one


@dataclass(frozen=True)
class Claim:
    """A number that a source states, and the obtained values that agree with it.

    Attributes:
        reference: the number, or words, as the source prints it.
        within: a tolerance either way; limits, which may be infinite; or None where the number is
            one draw, which the obtained range should hold.
        reason: why this tolerance.
        measure: (`Evidence`, *the runs of `needs`) -> the obtained value.
        needs: runs that it is obtained from; none for linear algebra.
        digits: decimals of the obtained value; None for one more than the reference has.
    """

    name: str
    source: str
    reference: str
    within: float | tuple[float, float] | None
    reason: str
    measure: Callable[..., Obtained] = field(repr=False)
    needs: tuple[Runs, ...] = ()
    digits: int | None = None

    @property
    def tolerance(self) -> str:
        """The values that pass, in words."""
        if self.within is None:
            return "inside the range"
        if isinstance(self.within, tuple):
            low, high = self.within
            return f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
        return f"± {self.within:.2g}"

    def verdict(self, obtained: Obtained) -> str:
        """Judge a number, which passes within the limits, or a range, if it overlaps them."""
        if isinstance(self.within, tuple):
            least, most = self.within
        else:
            value, half = float(self.reference), self.within or 0.0
            least, most = value - half, value + half
        low, high = obtained if isinstance(obtained, tuple) else (obtained, obtained)
        return PASS if low <= most and high >= least else FAIL

    def write(self, obtained: Obtained) -> str:
        """Format an obtained value."""
        digits = decimals(self.reference) + 1 if self.digits is None else self.digits
        parts = obtained if isinstance(obtained, tuple) else (obtained,)
        return " to ".join(f"{part:.{digits}f}" for part in parts)


Ledger = Mapping[str, Sequence[Claim]]  # heading -> claims


def decimals(number: str) -> int:
    """Count the printed decimals of a number."""
    return len(number.partition(".")[2])


def required(ledger: Ledger, *, gpu: bool = True) -> list[Runs]:
    """Return the runs that a ledger's claims need, each once, in the order of the claims."""
    every = (runs for claims in ledger.values() for claim in claims for runs in claim.needs)
    return [runs for runs in dict.fromkeys(every) if gpu or not runs.gpu]


@dataclass(frozen=True)
class Form:
    """The amount of training; `full`: on a GPU also networks that would take a CPU a day."""

    full: bool
    blog_epochs: int
    blog_seeds: int
    seeds: int

    @property
    def blog(self) -> Runs:
        """The blog's recipe."""
        config = RunConfig.seed_recipe(epochs=self.blog_epochs)
        return Runs(f"blog's recipe, {self.blog_epochs} epochs", config, self.blog_seeds)

    def gaussian(self, weight: float, latent_size: int = 10) -> Runs:
        """Return the blog's network with a linear head: mean and log-variance."""
        config = RunConfig(kl_weight=weight, latent_size=latent_size, epochs=6)
        return Runs(f"linear head, weight {weight:g}, {latent_size} latents", config, self.seeds)

    def needs(self) -> dict[str, Runs]:
        """Return the runs of all claims, by the names that these have for them."""
        undivided = RunConfig.seed_recipe(epochs=2, kl_normalization="sum")
        binary = RunConfig(
            hidden=(200, 200), latent_size=50, likelihood="bernoulli", binarization="stochastic",
            batch_size=100, epochs=500,
        )  # fmt: skip
        named = {
            "blog": self.blog,
            "undivided": Runs("blog's recipe, KL undivided", undivided, 1),
            "20 latents": self.gaussian(0.05, latent_size=20),
            "binary": Runs("784-200-200-50, binary pixels", binary, 1, gpu=True),
        }
        for weight in (0.01, 0.02, 0.05, 0.1, 1.0):
            named[f"weight {weight:g}"] = self.gaussian(weight)
        for size in (2, 10, 20):
            linear = RunConfig(model="linear", latent_size=size, epochs=8)
            named[f"linear, {size} latents"] = Runs(f"linear VAE, {size} latents", linear, 1)
        return named


SHORT = Form(full=False, blog_epochs=20, blog_seeds=3, seeds=2)
FULL = Form(full=True, blog_epochs=BLOG_EPOCHS, blog_seeds=5, seeds=5)


def claims(form: Form) -> Ledger:
    """Return the whole ledger in one of its forms."""
    file, known = Path(__file__).with_suffix(".toml"), dict[str, str]()
    return {
        heading: [c for row in section["claims"] for c in _claims(form, section | row, known)]
        for heading, section in tomllib.loads(file.read_text(encoding="utf-8")).items()
    }


def _claims(form: Form, row: Mapping[str, Any], known: dict[str, str]) -> Iterator[Claim]:
    # Of a row of the file; `known` are references by the name of their claim, in any row.
    central = f"central 95 % of all training batches of {form.blog_seeds} seeds"
    if form.blog_epochs < BLOG_EPOCHS:
        central += f", after {form.blog_epochs} epochs where the blog had {BLOG_EPOCHS}"
    runs = form.needs()
    for *values, given in row.get("references") or [[row["reference"]]]:
        name, within, measure = row["name"].format(*values), row.get("within"), row["measure"]
        reference = known[name] = known.get(given, given)
        if within == "printed":
            within = 0.5 * 10 ** -decimals(reference)
        needs = tuple(runs[need.format(*values)] for need in row.get("needs", ()))
        yield Claim(
            name=name,
            source=row["source"],
            reference=reference,
            within=tuple(within) if isinstance(within, list) else within,
            reason=row["reason"].format(central=central),
            measure=MEASURES[measure] if needs else partial(MEASURES[measure], *values),
            needs=needs,
            digits=row.get("digits"),
        )


def loss(evidence: Evidence, runs: Runs) -> float:
    """Return the loss on the whole training split, mean over seeds."""
    return fmean(evidence.batches(runs).loss.mean(1))


def relative_error(evidence: Evidence, runs: Runs) -> float:
    """Return the test mse of digit 8 over the mean of all classes, each the mean over seeds."""
    errors = class_errors(evidence.frame(runs))
    return float(errors[8] / errors.mean())


def gain(evidence: Evidence, runs: Runs, other: Runs) -> float:
    """Return how much lower neg_elbo is than in other runs, mean of the differences by seed."""
    return paired_difference(evidence.frame(other), evidence.frame(runs), "neg_elbo").mean


def best_ratio(evidence: Evidence, *swept: Runs) -> float:
    """Return the calibration_ratio of the runs with the lowest validation neg_elbo."""
    best = min(swept, key=lambda runs: evidence.mean(runs, "val/neg_elbo"))
    return evidence.mean(best, "calibration_ratio")


def batch_range(evidence: Evidence, runs: Runs, name: str) -> tuple[float, float]:
    """Return the central 95 % of `loss` or `kl_term` over all pairs of seed and batch."""
    ordered = sorted(getattr(evidence.batches(runs), name).ravel())
    low, high = (float(ordered[round(q * (len(ordered) - 1))]) for q in (0.025, 0.975))
    return low, high


def linear_vae(size: int, weight: float, metric: str, evidence: Evidence) -> float:
    """Return a metric of the exact linear VAE; in use are the first L with lambda_i > s2."""
    optimum = evidence.official_optimum(size, weight / 2)
    return float(optimum.active.sum() if metric == "latents in use" else getattr(optimum, metric))


def floor(size: int, part: str, evidence: Evidence) -> float:
    """Return the mse of the PCA projection of official training or test images."""
    if part == "train":
        return evidence.official_optimum(size, 0.0).mse
    return evidence.official.floor(evidence.data.test, size)


def likelihood(size: int, name: str, evidence: Evidence) -> float:
    """Return pPCA's most likely variance, or its log-likelihood of training or test images."""
    variance = evidence.official.likeliest_variance(size)
    if name == "decoder variance":
        return variance
    split = None if name.endswith("train") else evidence.data.test
    return evidence.official_optimum(size, variance, split).log_likelihood


MEASURES: Mapping[str, Callable[..., Any]] = {
    "total variance": lambda e: e.official.variances.sum(),
    "mean variance": lambda e: e.official.variances.mean(),
    "eigenvalue": lambda i, e: e.official.variances[i - 1],
    "linear_vae": linear_vae,
    "floor": floor,
    "likelihood": likelihood,
    "loss": loss,
    "gap to linear": lambda e, runs: fmean(e.gaps_to_linear(runs)),
    "batch losses": partial(batch_range, name="loss"),
    "batch KL terms": partial(batch_range, name="kl_term"),
    "active_units": lambda e, runs: e.mean(runs, "active_units"),
    "relative_error": relative_error,
    "gain": gain,
    "best_ratio": best_ratio,
    "neg_log_likelihood": lambda e, runs: e.neg_log_likelihood(runs, 5_000),
}
"""By name: (*values in the claim's name, evidence) -> number, or (evidence, *runs) -> number."""
