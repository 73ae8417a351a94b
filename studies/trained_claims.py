"""Claims that training settles: the linear VAE, the blog's recipe, and what two changes do to it.

"brief" is SCIENCE.md, the reference numbers that this project was begun with; "blog" is De Jun
Huang, "Learning Day 37: Implementing Variational Autoencoder in Pytorch" (2021), which prints the
loss and the KL term of the last batch of epoch 176.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from studies.claims import Claim, Spread, about, between, inside
from studies.exact_claims import LINEAR, LINEAR_LOSSES
from studies.forms import BLOG_EPOCHS, Form
from studies.runs import Runs

if TYPE_CHECKING:
    from studies.evidence import Evidence

SEED = "brief 4"
BLOG = "blog"
BURDA = "Burda et al. 2015"
BLOG_LOSS, BLOG_KL_TERM = "0.047659844", "0.007469548"

TRAINED_SIZES = (2, 10, 20)
"""Latents of the linear VAEs that are trained at weight 1."""

WEIGHTS = (0.01, 0.02, 0.05, 0.1, 1.0)
"""KL weights among which the calibrated one is looked for; 1 is the blog's."""

SAMPLES = 5_000
"""Importance samples of a published likelihood."""

CENTRAL = (0.025, 0.975)
"""Quantiles of the range over batches in which the blog's last batch should lie."""


def linear_claims(form: Form) -> list[Claim]:
    """Claim the closed form of what training reaches."""
    return [
        about(
            f"linear VAE, trained, {size} latents: loss",
            LINEAR,
            LINEAR_LOSSES[size, 1.0],
            0.001,
            "about 2 %; weight 1, 8 epochs: at a fixed learning rate Adam stays about 1 % above "
            "the optimum; that 5,000 of the 60,000 images are held out, and the sampling of z, "
            "is 0.1 %",
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
            "loss below the exact linear model's, %",
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
            "digit 8: mse over the mean of all digits",
            BLOG,
            "over 1",
            (1.0, math.inf),
            '"underperforms for complicated digits like 8"; test images, mean over seeds',
            lambda e: relative_error(e, runs, digit=8),
            needs,
            digits=2,
        ),
        between(
            "KL undivided: active latents",
            BLOG,
            "0",
            (0, 0),
            '"it cannot learn properly": weight 1 is then decoder variance 12,544, the largest '
            "eigenvalue being 5",
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


def relative_error(evidence: Evidence, runs: Runs, digit: int) -> float:
    """Return the test mse of a digit over the mean of all ten, mean over seeds."""
    from analysis import frames

    errors = frames.class_errors(evidence.frame(runs))
    return float(errors[digit] / errors.mean())


def head_claims(form: Form) -> list[Claim]:
    """Claim what the brief measured of the same network with a linear head."""
    plain, calibrated = form.gaussian(1.0), form.gaussian(0.05)
    wide = form.gaussian(0.05, latent_size=20)
    swept = tuple(form.gaussian(weight) for weight in WEIGHTS)
    return [
        about(
            "linear head, weight 1, 6 epochs: training loss",
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
            "weight 0.05 instead of 1: neg_elbo gained, nats",
            SEED,
            "well over 100",
            (100.0, math.inf),
            "as stated; test images, 10 latents, paired by seed",
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
            "20 latents instead of 10: neg_elbo gained, nats",
            SEED,
            "100",
            50.0,
            '"another 100" is a round number; weight 0.05, test images, paired by seed',
            lambda e: e.gain(wide, calibrated),
            (wide, calibrated),
        ),
        between(
            "calibration_ratio of the best weight",
            "brief 2 (Rybkin et al. 2021)",
            "near 1",
            (0.5, 2.0),
            f"weights tried: {', '.join(f'{weight:g}' for weight in WEIGHTS)}, steps of 2 to 2.5 "
            "near the best, which has the lowest validation neg_elbo",
            lambda e: e.mean(best(e, swept), "calibration_ratio"),
            swept,
            digits=2,
        ),
    ]


def published_claims(form: Form) -> list[Claim]:
    """Claim published likelihoods of binary MNIST."""
    reason = (
        "5,000 samples, 1,000 test images; ReLU where the paper has tanh, 500 epochs at a fixed "
        "learning rate where it has 3,280 at a falling one, 55,000 training images"
    )
    stated = {"paper": (BURDA, "86.76"), "rerun": (f"independent run of {BURDA}", "87.78")}
    return [
        about(
            f"-log p(x) of binary MNIST, {name}",
            source,
            reference,
            2.0,
            reason,
            lambda e: mean(e.neg_log_likelihoods(form.burda, SAMPLES)),
            (form.burda,),
        )
        for name, (source, reference) in stated.items()
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
