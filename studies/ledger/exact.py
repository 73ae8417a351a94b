"""Claims that linear algebra settles on MNIST, as tables: the exact linear VAE and its floors.

"brief" is SCIENCE.md, the reference numbers that this project began with.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from studies.ledger.claims import Claim, printed

if TYPE_CHECKING:
    from studies.ledger.evidence import Evidence

LINEAR = "brief 3 (Tipping & Bishop 1999; Lucas et al. 2019)"

EIGENVALUES = (
    "5.1168", "3.7413", "3.2527", "2.8416", "2.5671", "2.2736", "1.7251", "1.5205", "1.4563",
    "1.2427",
)  # fmt: skip
"""Of the covariance of MNIST's 60,000 training images, pixel^2."""

LINEAR_LOSSES = {
    (2, 1.0): "0.059995",
    (5, 1.0): "0.054206",
    (10, 1.0): "0.050640",
    (16, 1.0): "0.049687",
    (20, 1.0): "0.049586",
    (23, 1.0): "0.049580",
    (50, 1.0): "0.049580",
    (20, 2.0): "0.058006",
    (20, 0.1): "0.029468",
    (20, 10.4): "0.067251",
}
"""(latents, weight) -> loss of the exact linear VAE, mse + weight * rate / 784."""

LINEAR_OTHERS = {
    (1.0, "rate"): "10.083",
    (1.0, "mse"): "0.036725",
    (2.0, "latents in use"): "12",
    (10.4, "latents in use"): "0",
}
"""(weight, metric) -> its value with 20 latents."""

FLOORS = {
    2: ("0.05595", "0.05567"),
    10: ("0.03442", "0.03407"),
    20: ("0.02397", "0.02354"),
    50: ("0.01179", "0.01149"),
}
"""Components -> mse of the PCA projection of training and of test images."""

LIKELIHOODS = {10: ("0.03487", "182.15", "186.02"), 20: ("0.02460", "299.76", "306.55")}
"""Latents -> pPCA's most likely variance, its log-likelihood of training and of test images."""


def exact_claims() -> list[Claim]:
    """Return every number of the brief's section 3."""
    return [*spectrum(), *linear_vaes(), *floors(), *likelihoods()]


def spectrum() -> list[Claim]:
    """Claim total variance and leading eigenvalues."""
    return [
        printed("total variance", LINEAR, "52.7250", lambda e: e.official.variances.sum()),
        printed(
            "mse of a collapsed model", LINEAR, "0.067251", lambda e: e.official.variances.mean()
        ),
        *(
            printed(f"eigenvalue {i + 1}", LINEAR, value, lambda e, i=i: e.official.variances[i])
            for i, value in enumerate(EIGENVALUES)
        ),
    ]


def linear_vaes() -> list[Claim]:
    """Claim losses of the exact linear VAE, and its rate, mse and latents where stated."""
    stated = {(size, weight, "loss"): value for (size, weight), value in LINEAR_LOSSES.items()}
    stated |= {(20, weight, metric): value for (weight, metric), value in LINEAR_OTHERS.items()}
    return [
        printed(
            f"linear VAE, {size} latents, weight {weight:g}: {metric}",
            LINEAR,
            value,
            partial(linear_metric, size=size, weight=weight, metric=metric),
        )
        for (size, weight, metric), value in stated.items()
    ]


def linear_metric(evidence: Evidence, size: int, weight: float, metric: str) -> float:
    """Read a metric of the exact linear VAE; in use are the first L with lambda_i > s2."""
    optimum = evidence.official_optimum(size, weight / 2)
    if metric == "latents in use":
        return float(optimum.active.sum())
    return float(getattr(optimum, metric))


def floors() -> list[Claim]:
    """Claim squared errors of PCA projections."""
    return [
        printed(
            f"PCA floor, {size} components, {part}: mse",
            LINEAR,
            value,
            partial(floor, size=size, part=part),
        )
        for size, values in FLOORS.items()
        for part, value in zip(("train", "test"), values, strict=True)
    ]


def floor(evidence: Evidence, size: int, part: str) -> float:
    """Read the mse of projecting official training or test images."""
    if part == "train":
        return evidence.official_optimum(size, 0.0).mse
    return evidence.official.floor(evidence.data.test, size)


def likelihoods() -> list[Claim]:
    """Claim likelihoods of probabilistic PCA at its most likely decoder variance."""
    names = ("decoder variance", "log p(x), train", "log p(x), test")
    return [
        printed(
            f"pPCA, {size} latents: {name}",
            LINEAR,
            value,
            partial(likelihood, size=size, name=name),
        )
        for size, values in LIKELIHOODS.items()
        for name, value in zip(names, values, strict=True)
    ]


def likelihood(evidence: Evidence, size: int, name: str) -> float:
    """Read the most likely variance, or the log-likelihood of training or test images at it."""
    variance = evidence.official.likeliest_variance(size)
    if name == "decoder variance":
        return variance
    if name.endswith("train"):
        return evidence.official_optimum(size, variance).log_likelihood
    return evidence.official_optimum(size, variance, evidence.data.test).log_likelihood
