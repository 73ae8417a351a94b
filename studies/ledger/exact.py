"""Claims about MNIST that need no training: the exact linear VAE and its floors.

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

LINEAR_VAES = {
    (2, 1.0, "loss"): "0.059995",
    (5, 1.0, "loss"): "0.054206",
    (10, 1.0, "loss"): "0.050640",
    (16, 1.0, "loss"): "0.049687",
    (20, 1.0, "loss"): "0.049586",
    (23, 1.0, "loss"): "0.049580",
    (50, 1.0, "loss"): "0.049580",
    (20, 2.0, "loss"): "0.058006",
    (20, 0.1, "loss"): "0.029468",
    (20, 10.4, "loss"): "0.067251",
    (20, 1.0, "rate"): "10.083",
    (20, 1.0, "mse"): "0.036725",
    (20, 2.0, "latents in use"): "12",
    (20, 10.4, "latents in use"): "0",
}
"""(latents, weight, metric) -> its value; the loss is mse + weight * rate / 784."""


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
        (10, "decoder variance"): "0.03487",
        (10, "log p(x), train"): "182.15",
        (10, "log p(x), test"): "186.02",
        (20, "decoder variance"): "0.02460",
        (20, "log p(x), train"): "299.76",
        (20, "log p(x), test"): "306.55",
    }),
)  # fmt: skip
"""Name, measure: (*values in the name, evidence) -> number, and references by these values."""


def exact_claims() -> list[Claim]:
    """Return every number of the brief's section 3."""
    return [
        printed(name.format(*values), LINEAR, reference, partial(measure, *values))
        for name, measure, references in CLAIMS
        for values, reference in references.items()
    ]
