"""The same training in pythae (benchmark_VAE): its VAE, its BaseTrainer, its loop over an epoch.

The encoder and decoder are the blog's layers as pythae's own modules, the optimiser Adam, the batch
32. What pythae adds around an epoch (evaluation, copies of the best model, files) is left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from torch import Tensor, nn

from benchmarks import blog


class Encoder(BaseEncoder):
    """784-256-64-(10 + 10), mean and log-variance."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(blog.PIXELS, 256),
            nn.ReLU(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Linear(64, 2 * blog.LATENTS),
        )

    def forward(self, x: Tensor) -> ModelOutput:
        """Return the posterior of images (B, 1, 28, 28)."""
        mean, log_variance = self.layers(x.flatten(1)).chunk(2, dim=1)
        return ModelOutput(embedding=mean, log_covariance=log_variance)


class Decoder(BaseDecoder):
    """10-64-256-784, a sigmoid at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = blog.BlogVAE().decoder

    def forward(self, z: Tensor) -> ModelOutput:
        """Return images of latents (B, L)."""
        return ModelOutput(reconstruction=self.layers(z).unflatten(1, (1, 28, 28)))


def rounds(images: Tensor) -> Iterator[int]:
    """Train for ever; yield the images seen after each of the trainer's epochs.

    Args:
        images: uint8, shape (N, D); pythae moves batches to a GPU itself.
    """
    pixels = images.cpu().float().unflatten(1, (1, 28, 28)) / 255
    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=blog.LATENTS, reconstruction_loss="mse")
    with tempfile.TemporaryDirectory() as folder:
        trainer = BaseTrainer(
            VAE(config, Encoder(), Decoder()),
            BaseDataset(pixels, torch.zeros(len(pixels))),
            training_config=BaseTrainerConfig(
                output_dir=folder,
                per_device_train_batch_size=blog.BATCH,
                learning_rate=blog.LEARNING_RATE,
                optimizer_cls="Adam",
                no_cuda=not images.is_cuda,
            ),
        )
        trainer.prepare_training()
        epoch = 0
        while True:
            epoch += 1
            trainer.train_step(epoch)
            yield len(pixels)
