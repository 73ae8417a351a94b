"""The ledger's short and full form: which runs its claims are measured on."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config import RunConfig
from studies.runs import Runs

BLOG_EPOCHS = 176
"""Epochs after which the blog prints its numbers."""


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

    @property
    def burda(self) -> Runs:
        """The network of Burda et al. (2015) with this harness's ReLU and fixed learning rate."""
        config = RunConfig(
            hidden=(200, 200),
            latent_size=50,
            likelihood="bernoulli",
            binarization="stochastic",
            batch_size=100,
            epochs=500,
        )
        return Runs("784-200-200-50, binary pixels", config, 1, gpu=True)


SHORT = Form("short", blog_epochs=20, blog_seeds=3, seeds=2)
FULL = Form("full", blog_epochs=BLOG_EPOCHS, blog_seeds=5, seeds=5)
