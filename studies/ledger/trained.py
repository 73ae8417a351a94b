"""Claims about training: the linear VAE, the blog's recipe, and two changes of it.

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

from harness.config import RunConfig
from studies.ledger.claims import Claim, Ledger, Runs, about, between, inside
from studies.ledger.exact import LINEAR, LINEAR_VAES, exact_claims

if TYPE_CHECKING:
    from studies.ledger.evidence import Evidence

SEED, BLOG, BURDA = "brief 4", "blog", "Burda et al. 2015"  # sources
BLOG_LOSS, BLOG_KL_TERM = "0.047659844", "0.007469548"
BLOG_EPOCHS = 176  # after which the blog prints these

TRAINED_SIZES = (2, 10, 20)  # latents of the linear VAEs that are trained at weight 1
WEIGHTS = (0.01, 0.02, 0.05, 0.1, 1.0)  # of which one should be calibrated; 1 is the blog's
SAMPLES = 5_000  # importance samples of a published likelihood
CENTRAL = (0.025, 0.975)  # quantiles of the batches' range, in which the blog's last one should lie


@dataclass(frozen=True)
class Form:
    """The amount of training, and the runs that the claims are measured on.

    Attributes:
        full: whether a GPU also trains the networks that would take a CPU a day.
        blog_epochs, blog_seeds: of the blog's recipe.
        seeds: of the configurations with a linear head.
    """

    full: bool
    blog_epochs: int
    blog_seeds: int
    seeds: int

    @property
    def blog(self) -> Runs:
        """The blog's recipe."""
        config = RunConfig.seed_recipe(epochs=self.blog_epochs)
        return Runs(f"blog's recipe, {self.blog_epochs} epochs", config, self.blog_seeds)

    @property
    def undivided(self) -> Runs:
        """The blog's recipe without the division of the KL term."""
        config = RunConfig.seed_recipe(epochs=2, kl_normalization="sum")
        return Runs("blog's recipe, KL undivided", config, 1)

    def gaussian(self, weight: float, latent_size: int = 10) -> Runs:
        """Return the blog's network with a linear head: mean and log-variance."""
        config = RunConfig(kl_weight=weight, latent_size=latent_size, epochs=6)
        return Runs(f"linear head, weight {weight:g}, {latent_size} latents", config, self.seeds)

    def linear(self, latent_size: int) -> Runs:
        """Return the linear VAE."""
        config = RunConfig(model="linear", latent_size=latent_size, epochs=8)
        return Runs(f"linear VAE, {latent_size} latents", config, 1)

    @property
    def burda(self) -> Runs:
        """The network of Burda et al. (2015) with this harness's ReLU and fixed learning rate."""
        config = RunConfig(
            hidden=(200, 200), latent_size=50, likelihood="bernoulli", binarization="stochastic",
            batch_size=100, epochs=500,
        )  # fmt: skip
        return Runs("784-200-200-50, binary pixels", config, 1, gpu=True)


SHORT = Form(full=False, blog_epochs=20, blog_seeds=3, seeds=2)
FULL = Form(full=True, blog_epochs=BLOG_EPOCHS, blog_seeds=5, seeds=5)


def claims(form: Form) -> Ledger:
    """Return the whole ledger in one of its forms."""
    return {
        "Exact, by linear algebra": exact_claims(),
        "Linear VAE, trained": [
            about(f"linear VAE, trained, {size} latents: loss", LINEAR,
                  LINEAR_VAES[size, 1.0, "loss"], 0.001,
                  "about 2 %; weight 1, 8 epochs: at a fixed learning rate Adam stays about 1 % "
                  "above the optimum; that 5,000 of the 60,000 images are held out, and the "
                  "sampling of z, is 0.1 %",
                  loss, form.linear(size))
            for size in TRAINED_SIZES
        ],
        "The blog's recipe": blog_claims(form),
        "Linear head, smaller weight": head_claims(form),
        "Published likelihoods": [
            about(f"-log p(x) of binary MNIST, {name}", source, reference, 2.0,
                  "5,000 samples, 1,000 test images; ReLU where the paper has tanh, 500 epochs at "
                  "a fixed learning rate where it has 3,280 at a falling one, 55,000 training "
                  "images",
                  neg_log_likelihood, form.burda)
            for name, source, reference in (
                ("paper", BURDA, "86.76"), ("rerun", f"independent run of {BURDA}", "87.78"),
            )
        ],
    }  # fmt: skip


def blog_claims(form: Form) -> list[Claim]:
    """Return the claims of the blog, and of the brief about the blog's recipe."""
    runs, last = form.blog, f"{BLOG}, epoch 176"
    central = f"central 95 % of all training batches of {runs.seeds} seeds"
    if form.blog_epochs < BLOG_EPOCHS:
        central += f", after {form.blog_epochs} epochs where the blog had {BLOG_EPOCHS}"
    return [
        inside("last batch's total loss", last, BLOG_LOSS, central,
               partial(batch_range, name="loss"), runs),
        inside("last batch's KL term", last, BLOG_KL_TERM, central,
               partial(batch_range, name="kl_term"), runs),
        between("training loss after tens of epochs", SEED, "0.046 to 0.050", (0.046, 0.050),
                "the range that the brief states; whole training split, mean over seeds",
                loss, runs, digits=4),
        between("loss below the exact linear model's, %", SEED, "about 0", (-10.0, 10.0),
                "0.046, the lowest that the brief states, is 9 % below the linear 0.05064",
                lambda e, runs: fmean(e.gaps_to_linear(runs)), runs),
        between("active latents of 10", SEED, "1 or 2", (0.5, 2.5),
                "mean over seeds, rounded: which ReLU dies is chance, so single seeds differ",
                active_units, runs),
        between("digit 8: mse over the mean of all digits", BLOG, "over 1", (1.0, math.inf),
                '"underperforms for complicated digits like 8"; test images, mean over seeds',
                lambda e, runs: e.relative_error(runs, 8), runs, digits=2),
        between("KL undivided: active latents", BLOG, "0", (0, 0),
                '"it cannot learn properly": weight 1 is then decoder variance 12,544, the largest '
                "eigenvalue being 5",
                active_units, form.undivided, digits=0),
    ]  # fmt: skip


def head_claims(form: Form) -> list[Claim]:
    """Return the claims of the brief about the same network with a linear head."""
    plain, calibrated = form.gaussian(1.0), form.gaussian(0.05)
    wide = form.gaussian(0.05, latent_size=20)
    return [
        about("linear head, weight 1, 6 epochs: training loss", SEED, "0.0387", 0.001,
              '"about"; whole training split, mean over seeds', loss, plain),
        about("linear head, weight 1: active latents of 10", SEED, "8", 1.0,
              "mean over seeds, which differ by one", active_units, plain),
        between("weight 0.05 instead of 1: neg_elbo gained, nats", SEED, "well over 100",
                (100.0, math.inf), "as stated; test images, 10 latents, paired by seed",
                lambda e, *runs: e.gain(*runs), calibrated, plain),
        about("weight 0.05: active latents of 10", SEED, "10", 0.0,
              "all of them with every seed", active_units, calibrated),
        about("20 latents instead of 10: neg_elbo gained, nats", SEED, "100", 50.0,
              '"another 100" is a round number; weight 0.05, test images, paired by seed',
              lambda e, *runs: e.gain(*runs), wide, calibrated),
        between("calibration_ratio of the best weight", "brief 2 (Rybkin et al. 2021)", "near 1",
                (0.5, 2.0),
                f"weights tried: {', '.join(f'{weight:g}' for weight in WEIGHTS)}, steps of 2 to "
                "2.5 near the best, which has the lowest validation neg_elbo",
                best_ratio, *map(form.gaussian, WEIGHTS), digits=2),
    ]  # fmt: skip


def loss(evidence: Evidence, runs: Runs) -> float:
    """Return the loss on the whole training split, mean over seeds."""
    return fmean(evidence.losses(runs))


def active_units(evidence: Evidence, runs: Runs) -> float:
    """Return the number of active latents, mean over seeds."""
    return evidence.mean(runs, "active_units")


def neg_log_likelihood(evidence: Evidence, runs: Runs) -> float:
    """Return -log p(x) of test images, nats / image, mean over seeds."""
    return fmean(evidence.neg_log_likelihoods(runs, SAMPLES))


def best_ratio(evidence: Evidence, *swept: Runs) -> float:
    """Return the calibration_ratio of the runs with the lowest validation neg_elbo."""
    best = min(swept, key=lambda runs: evidence.mean(runs, "val/neg_elbo"))
    return evidence.mean(best, "calibration_ratio")


def batch_range(evidence: Evidence, runs: Runs, name: str) -> tuple[float, float]:
    """Return the central 95 % of `loss` or `kl_term` over all pairs of seed and batch."""
    ordered = sorted(getattr(evidence.batches(runs), name).ravel())
    low, high = (float(ordered[round(q * (len(ordered) - 1))]) for q in CENTRAL)
    return low, high
