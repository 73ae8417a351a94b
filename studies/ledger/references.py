"""The claims of `references.toml`: the runs that they need, and their measures."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from analysis.frames import class_errors, paired_difference
from harness.config import RunConfig
from studies.ledger.claims import Claim, Ledger, Runs, decimals

if TYPE_CHECKING:
    from studies.ledger.evidence import Evidence

BLOG_EPOCHS = 176  # after which the blog prints its losses


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
