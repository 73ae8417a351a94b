"""Claims that training settles: the linear VAE, the blog's recipe, and what two changes do to it.

"brief" is SCIENCE.md, the reference numbers that this project was begun with; "blog" is De Jun
Huang, "Learning Day 37: Implementing Variational Autoencoder in Pytorch" (2021), which prints the
loss and the KL term of the last batch of epoch 176.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from harness.config import RunConfig
from studies.claims import Claim, Runs, Spread, about, between, inside
from studies.exact_claims import LINEAR, LINEAR_LOSSES

if TYPE_CHECKING:
    from studies.evidence import Evidence

SEED = "brief 4"
BLOG = "blog"
BLOG_EPOCHS = 176
BLOG_LOSS, BLOG_KL_TERM = "0.047659844", "0.007469548"

TRAINED_SIZES = (2, 10, 20)
"""Latents of the linear VAEs that are trained at weight 1."""

WEIGHTS = (0.01, 0.02, 0.05, 0.1, 1.0)
"""KL weights among which the calibrated one is looked for; 1 is the blog's."""

CENTRAL = (0.025, 0.975)
"""Quantiles of the range over batches in which the blog's last batch should lie."""


@dataclass(frozen=True)
class Form:
    """How much is trained.

    Attributes:
        name: "short" or "full".
        blog_epochs: epochs of the blog's recipe.
        blog_seeds: seeds of the blog's recipe.
        seeds: seeds of the configurations with a linear head.
    """

    name: str
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
        """The blog's network with a linear head: mean and log-variance."""
        config = RunConfig(kl_weight=weight, latent_size=latent_size, epochs=6)
        return Runs(f"linear head, weight {weight:g}, {latent_size} latents", config, self.seeds)

    def linear(self, latent_size: int) -> Runs:
        """The linear VAE."""
        config = RunConfig(model="linear", latent_size=latent_size, epochs=8)
        return Runs(f"linear VAE, {latent_size} latents", config, 1)


SHORT = Form("short", blog_epochs=20, blog_seeds=3, seeds=2)
FULL = Form("full", blog_epochs=BLOG_EPOCHS, blog_seeds=5, seeds=5)


def linear_claims(form: Form) -> list[Claim]:
    """Claim the closed form of what training reaches."""
    return [
        about(
            f"linear VAE trained 8 epochs, {size} latents, weight 1: loss",
            LINEAR,
            LINEAR_LOSSES[size, 1.0],
            0.02 * float(LINEAR_LOSSES[size, 1.0]),
            "2 %: at a fixed learning rate Adam stays about 1 % above the optimum; that 5,000 of "
            "the 60,000 images are held out, and the sampling of z, is 0.1 %",
            partial(loss, runs=form.linear(size)),
            (form.linear(size),),
        )
        for size in TRAINED_SIZES
    ]


def blog_claims(form: Form) -> list[Claim]:
    """Claim what the blog prints and says, and what the brief measured of its recipe."""
    runs = form.blog
    needs = (runs,)
    central = f"central 95 % of all training batches of {runs.seeds} seeds"
    if form.blog_epochs < BLOG_EPOCHS:
        central += f", after {form.blog_epochs} epochs where the blog had {BLOG_EPOCHS}"
    return [
        inside(
            "last batch's total loss",
            f"{BLOG}, epoch 176",
            BLOG_LOSS,
            central,
            lambda e: batch_range(e, runs, "loss"),
            needs,
        ),
        inside(
            "last batch's KL term",
            f"{BLOG}, epoch 176",
            BLOG_KL_TERM,
            central,
            lambda e: batch_range(e, runs, "kl_term"),
            needs,
        ),
        between(
            "training loss after tens of epochs",
            SEED,
            "0.046 to 0.050",
            (0.046, 0.050),
            "the range that the brief states; whole training split, mean over seeds",
            partial(loss, runs=runs),
            needs,
            digits=4,
        ),
        between(
            "training loss below the exact linear model's, %",
            SEED,
            "about 0",
            (-10.0, 10.0),
            "0.046, the lowest that the brief states, is 9 % below the linear 0.05064",
            lambda e: mean(e.gaps_to_linear(runs)),
            needs,
        ),
        between(
            "active latents of 10",
            SEED,
            "1 or 2",
            (0.5, 2.5),
            "mean over seeds, rounded: which ReLU dies is chance, so single seeds differ",
            lambda e: e.mean(runs, "active_units"),
            needs,
        ),
        between(
            "digit that reconstructs worst",
            BLOG,
            "8",
            (8, 8),
            "test images, mean over seeds",
            lambda e: worst_class(e, runs),
            needs,
            digits=0,
        ),
        between(
            'KL undivided, "it cannot learn properly": active latents',
            BLOG,
            "0",
            (0, 0),
            "weight 1 is then decoder variance 12,544, the largest eigenvalue being 5",
            lambda e: e.mean(form.undivided, "active_units"),
            (form.undivided,),
            digits=0,
        ),
    ]


def batch_range(evidence: Evidence, runs: Runs, name: str) -> Spread:
    """Return the central 95 % of `loss` or `kl_term` over all pairs of seed and batch."""
    ordered = sorted(getattr(evidence.batches(runs), name).ravel())
    low, high = (float(ordered[round(q * (len(ordered) - 1))]) for q in CENTRAL)
    return Spread(low, high)


def worst_class(evidence: Evidence, runs: Runs) -> float:
    """Return the class with the largest test mse, mean over seeds."""
    from analysis import frames

    return float(frames.class_errors(evidence.frame(runs)).index[0])


def head_claims(form: Form) -> list[Claim]:
    """Claim what the brief measured of the same network with a linear head."""
    plain, calibrated = form.gaussian(1.0), form.gaussian(0.05)
    wide = form.gaussian(0.05, latent_size=20)
    swept = tuple(form.gaussian(weight) for weight in WEIGHTS)
    return [
        about(
            "linear head, weight 1: training loss after 6 epochs",
            SEED,
            "0.0387",
            0.001,
            '"about"; whole training split, mean over seeds',
            partial(loss, runs=plain),
            (plain,),
        ),
        about(
            "linear head, weight 1: active latents of 10",
            SEED,
            "8",
            1.0,
            "mean over seeds, which differ by one",
            lambda e: e.mean(plain, "active_units"),
            (plain,),
        ),
        between(
            "weight 0.05 instead of 1: nats of neg_elbo less",
            SEED,
            "well over 100",
            (100.0, math.inf),
            "as stated; test images, paired by seed",
            lambda e: e.gain(calibrated, plain),
            (calibrated, plain),
        ),
        about(
            "weight 0.05: active latents of 10",
            SEED,
            "10",
            0.0,
            "all of them with every seed",
            lambda e: e.mean(calibrated, "active_units"),
            (calibrated,),
        ),
        about(
            "weight 0.05, 20 latents instead of 10: nats of neg_elbo less",
            SEED,
            "100",
            50.0,
            '"another 100" is a round number; test images, paired by seed',
            lambda e: e.gain(wide, calibrated),
            (wide, calibrated),
        ),
        between(
            "calibration_ratio of the weight with the lowest neg_elbo",
            "brief 2 (Rybkin et al. 2021)",
            "near 1",
            (0.5, 2.0),
            f"weights tried: {', '.join(f'{weight:g}' for weight in WEIGHTS)}, steps of 2 to 2.5 "
            "near the best, which is chosen on validation images",
            lambda e: e.mean(best(e, swept), "calibration_ratio"),
            swept,
            digits=2,
        ),
    ]


def best(evidence: Evidence, swept: Sequence[Runs]) -> Runs:
    """Return the runs with the lowest validation neg_elbo, mean over seeds."""
    return min(swept, key=lambda runs: evidence.mean(runs, "val/neg_elbo"))


def loss(evidence: Evidence, runs: Runs) -> float:
    """Return the loss on the whole training split, mean over seeds."""
    return mean(evidence.losses(runs))


def mean(values: Sequence[float]) -> float:
    """Average over seeds."""
    return sum(values) / len(values)
