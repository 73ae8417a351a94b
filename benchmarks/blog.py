"""The blog's VAE and training loop in plain PyTorch, independent of the harness.

Rewritten from "Learning Day 37: Implementing Variational Autoencoder in Pytorch" (De Jun Huang,
2021) as it is: ReLU behind mean and standard deviation, KL divided by batch x pixels, one
DataLoader batch a step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

PIXELS, LATENTS, BATCH = 784, 10, 32
LEARNING_RATE = 1e-3


class BlogVAE(nn.Module):
    """784-256-64-(10 + 10) encoder and 10-64-256-784 decoder, a ReLU or sigmoid after each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS, 256),
            nn.ReLU(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Linear(64, 2 * LATENTS),
            nn.ReLU(),
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, 64),
            nn.ReLU(),
            nn.Linear(64, 256),
            nn.ReLU(),
            nn.Linear(256, PIXELS),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction of images (B, 1, 28, 28) and the scaled KL of the batch."""
        flat = x.reshape(x.shape[0], PIXELS)
        mu, sigma = self.encoder(flat).chunk(2, dim=1)
        h = mu + sigma * torch.randn_like(sigma)
        kld = mu**2 + sigma**2 - torch.log(1e-8 + sigma**2) - 1
        return self.decoder(h).reshape(x.shape), 0.5 * torch.sum(kld) / flat.numel()


def adam(model: BlogVAE) -> torch.optim.Adam:
    """Return the blog's optimiser."""
    return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)


def train(
    model: BlogVAE, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]
) -> int:
    """Take one step per batch of images and labels, as from a DataLoader.

    Returns:
        The number of images seen.
    """
    device = next(model.parameters()).device
    criterion = nn.MSELoss()
    images = 0
    for batch, _ in batches:
        x = batch.to(device)
        x_hat, kld = model(x)
        loss = criterion(x_hat, x) + 1.0 * kld
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        images += len(x)
    return images
