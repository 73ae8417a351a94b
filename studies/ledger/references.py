"""Claims: exact linear models, the linear VAE trained, the blog's recipe, and two changes of it.

"brief" is SCIENCE.md, the reference numbers that this project began with; "blog" is De Jun
Huang, "Learning Day 37: Implementing Variational Autoencoder in Pytorch" (2021), which prints the
loss and the KL term of the last batch of epoch 176.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from analysis.frames import class_errors, paired_difference
from harness.config import RunConfig
from studies.ledger.claims import Claim, Ledger, Runs, decimals

if TYPE_CHECKING:
    from studies.ledger.evidence import Evidence

LINEAR = "brief 3 (Tipping & Bishop 1999; Lucas et al. 2019)"
SEED, BLOG, BURDA = "brief 4", "blog", "Burda et al. 2015"  # sources
BLOG_LOSS, BLOG_KL_TERM = "0.047659844", "0.007469548"
BLOG_EPOCHS = 176  # after which the blog prints these

WEIGHTS = (0.01, 0.02, 0.05, 0.1, 1.0)  # of which one should be calibrated; 1 is the blog's

EIGENVALUES = (
    "5.1168", "3.7413", "3.2527", "2.8416", "2.5671", "2.2736", "1.7251", "1.5205", "1.4563",
    "1.2427",
)  # fmt: skip
"""Of the covariance of MNIST's 60,000 training images, pixel^2."""

LINEAR_VAES = {
    (2, 1.0, "loss"): "0.059995", (5, 1.0, "loss"): "0.054206",
    (10, 1.0, "loss"): "0.050640", (16, 1.0, "loss"): "0.049687",
    (20, 1.0, "loss"): "0.049586", (23, 1.0, "loss"): "0.049580",
    (50, 1.0, "loss"): "0.049580", (20, 2.0, "loss"): "0.058006",
    (20, 0.1, "loss"): "0.029468", (20, 10.4, "loss"): "0.067251",
    (20, 1.0, "rate"): "10.083", (20, 1.0, "mse"): "0.036725",
    (20, 2.0, "latents in use"): "12", (20, 10.4, "latents in use"): "0",
}  # fmt: skip
"""(latents, weight, metric) -> its value; the loss is mse + weight * rate / 784."""


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


SHORT = Form(full=False, blog_epochs=20, blog_seeds=3, seeds=2)
FULL = Form(full=True, blog_epochs=BLOG_EPOCHS, blog_seeds=5, seeds=5)


def claims(form: Form) -> Ledger:
    """Return the whole ledger in one of its forms."""
    linear = RunConfig(model="linear", epochs=8)
    burda = RunConfig(
        hidden=(200, 200), latent_size=50, likelihood="bernoulli", binarization="stochastic",
        batch_size=100, epochs=500,
    )  # fmt: skip
    return {
        "Exact, by linear algebra": exact_claims(),
        "Linear VAE, trained": [
            Claim(f"linear VAE, trained, {size} latents: loss", LINEAR,
                  LINEAR_VAES[size, 1.0, "loss"], 0.001,
                  "about 2 %; weight 1, 8 epochs: at a fixed learning rate Adam stays about 1 % "
                  "above the optimum; that 5,000 of the 60,000 images are held out, and the "
                  "sampling of z, is 0.1 %",
                  loss, (Runs(f"linear VAE, {size} latents", linear.replace(latent_size=size), 1),))
            for size in (2, 10, 20)
        ],
        "The blog's recipe": blog_claims(form),
        "Linear head, smaller weight": head_claims(form),
        "Published likelihoods": [
            Claim(f"-log p(x) of binary MNIST, {name}", source, reference, 2.0,
                  "5,000 samples, 1,000 test images; ReLU where the paper has tanh, 500 epochs at "
                  "a fixed learning rate where it has 3,280 at a falling one, 55,000 training "
                  "images",
                  lambda e, runs: e.neg_log_likelihood(runs, 5_000),
                  (Runs("784-200-200-50, binary pixels", burda, 1, gpu=True),))
            for name, source, reference in (
                ("paper", BURDA, "86.76"), ("rerun", f"independent run of {BURDA}", "87.78"),
            )
        ],
    }  # fmt: skip


def blog_claims(form: Form) -> list[Claim]:
    """Return the claims of the blog, and of the brief about the blog's recipe."""
    runs, last = (form.blog,), f"{BLOG}, epoch 176"
    undivided = RunConfig.seed_recipe(epochs=2, kl_normalization="sum")
    central = f"central 95 % of all training batches of {form.blog_seeds} seeds"
    if form.blog_epochs < BLOG_EPOCHS:
        central += f", after {form.blog_epochs} epochs where the blog had {BLOG_EPOCHS}"
    return [
        Claim("last batch's total loss", last, BLOG_LOSS, None, central,
              partial(batch_range, name="loss"), runs, digits=5),
        Claim("last batch's KL term", last, BLOG_KL_TERM, None, central,
              partial(batch_range, name="kl_term"), runs, digits=5),
        Claim("training loss after tens of epochs", SEED, "0.046 to 0.050", (0.046, 0.050),
              "the range that the brief states; whole training split, mean over seeds",
              loss, runs, digits=4),
        Claim("loss below the exact linear model's, %", SEED, "about 0", (-10.0, 10.0),
              "0.046, the lowest that the brief states, is 9 % below the linear 0.05064",
              lambda e, runs: fmean(e.gaps_to_linear(runs)), runs, digits=1),
        Claim("active latents of 10", SEED, "1 or 2", (0.5, 2.5),
              "mean over seeds, rounded: which ReLU dies is chance, so single seeds differ",
              active_units, runs, digits=1),
        Claim("digit 8: mse over the mean of all digits", BLOG, "over 1", (1.0, math.inf),
              '"underperforms for complicated digits like 8"; test images, mean over seeds',
              relative_error, runs, digits=2),
        Claim("KL undivided: active latents", BLOG, "0", (0, 0),
              '"it cannot learn properly": weight 1 is then decoder variance 12,544, the largest '
              "eigenvalue being 5",
              active_units, (Runs("blog's recipe, KL undivided", undivided, 1),), digits=0),
    ]  # fmt: skip


def head_claims(form: Form) -> list[Claim]:
    """Return the claims of the brief about the same network with a linear head."""
    plain, calibrated = form.gaussian(1.0), form.gaussian(0.05)
    wide = form.gaussian(0.05, latent_size=20)
    return [
        Claim("linear head, weight 1, 6 epochs: training loss", SEED, "0.0387", 0.001,
              '"about"; whole training split, mean over seeds', loss, (plain,)),
        Claim("linear head, weight 1: active latents of 10", SEED, "8", 1.0,
              "mean over seeds, which differ by one", active_units, (plain,)),
        Claim("weight 0.05 instead of 1: neg_elbo gained, nats", SEED, "well over 100",
              (100.0, math.inf), "as stated; test images, 10 latents, paired by seed",
              gain, (calibrated, plain), digits=1),
        Claim("weight 0.05: active latents of 10", SEED, "10", 0.0,
              "all of them with every seed", active_units, (calibrated,)),
        Claim("20 latents instead of 10: neg_elbo gained, nats", SEED, "100", 50.0,
              '"another 100" is a round number; weight 0.05, test images, paired by seed',
              gain, (wide, calibrated)),
        Claim("calibration_ratio of the best weight", "brief 2 (Rybkin et al. 2021)", "near 1",
              (0.5, 2.0),
              f"weights tried: {', '.join(f'{weight:g}' for weight in WEIGHTS)}, steps of 2 to "
              "2.5 near the best, which has the lowest validation neg_elbo",
              best_ratio, tuple(map(form.gaussian, WEIGHTS)), digits=2),
    ]  # fmt: skip


def loss(evidence: Evidence, runs: Runs) -> float:
    """Return the loss on the whole training split, mean over seeds."""
    return fmean(evidence.batches(runs).loss.mean(1))


def active_units(evidence: Evidence, runs: Runs) -> float:
    """Return the number of active latents, mean over seeds."""
    return evidence.mean(runs, "active_units")


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


CLAIMS = (
    ("total variance", lambda e: e.official.variances.sum(), {(): "52.7250"}),
    ("mse of a collapsed model", lambda e: e.official.variances.mean(), {(): "0.067251"}),
    ("eigenvalue {}", lambda i, e: e.official.variances[i - 1],
     {(i,): value for i, value in enumerate(EIGENVALUES, 1)}),
    ("linear VAE, {} latents, weight {:g}: {}", linear_vae, LINEAR_VAES),
    ("PCA floor, {} components, {}: mse", floor, {
        (2, "train"): "0.05595", (2, "test"): "0.05567",
        (10, "train"): "0.03442", (10, "test"): "0.03407",
        (20, "train"): "0.02397", (20, "test"): "0.02354",
        (50, "train"): "0.01179", (50, "test"): "0.01149",
    }),
    ("pPCA, {} latents: {}", likelihood, {
        (10, "decoder variance"): "0.03487", (10, "log p(x), train"): "182.15",
        (10, "log p(x), test"): "186.02",
        (20, "decoder variance"): "0.02460", (20, "log p(x), train"): "299.76",
        (20, "log p(x), test"): "306.55",
    }),
)  # fmt: skip
"""Name, measure: (*values in the name, evidence) -> number, and references by these values."""


def exact_claims() -> list[Claim]:
    """Return every number of the brief's section 3."""
    reason = "half a unit of the last printed digit: no chance is involved"
    return [
        Claim(name.format(*values), LINEAR, reference, 0.5 * 10 ** -decimals(reference), reason,
              partial(measure, *values))
        for name, measure, references in CLAIMS
        for values, reference in references.items()
    ]  # fmt: skip
