"""One run in plain PyTorch, written from SCIENCE.md; and lists of runs to compare with it."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from harness.config import RunConfig
from harness.models.vae import build
from harness.streams import batches, noise

SMALL = RunConfig(hidden=(16, 12), channels=(4, 6), epochs=2, batch_size=8)
MIXED = [
    SMALL,
    SMALL.replace(latent_size=3, kl_weight=0.1, kl_normalization="batch", seed=1),
    SMALL.replace(latent_size=16, kl_weight=0.01, kl_normalization="sum", learning_rate=3e-3),
    SMALL.replace(latent_size=7, kl_weight=0.0, kl_normalization="latent", kl_warmup_epochs=1),
    SMALL.replace(latent_size=1, kl_weight=3.0, learning_rate=1e-4, kl_warmup_epochs=3, seed=2),
]
ALIKE = [c.replace(latent_size=4) for c in MIXED]
"""Runs of equal shapes: one stack."""
REMEDIES = [
    SMALL.replace(epochs=4, kl_warmup_epochs=1, kl_cycles=2, kl_weight=2.0),
    SMALL.replace(epochs=4, kl_warmup_epochs=1, kl_cycles=3, latent_size=3, seed=1),
    SMALL.replace(epochs=4, free_bits=0.5, latent_size=7, kl_weight=0.3),
    SMALL.replace(epochs=4, free_bits=0.1, latent_size=2, sigma="optimal"),
    SMALL.replace(epochs=4, sigma="optimal", kl_weight=0.5, latent_size=4),
    SMALL.replace(epochs=4, sigma="learned", latent_size=4, learning_rate=1e-2),
    SMALL.replace(epochs=4, sigma="learned", seed=1),
]
"""Runs with every remedy, of different latent sizes."""
BERNOULLI = [c.replace(likelihood="bernoulli") for c in [*MIXED, REMEDIES[2].replace(epochs=2)]]
WIDE = [c.replace(hidden=(256, 64), channels=(32, 64), batch_size=32) for c in MIXED]

KINDS = [
    {"model": "mlp", "head": "gaussian"},
    {"model": "mlp", "head": "relu"},
    {"model": "linear", "head": "gaussian"},
    {"model": "conv", "head": "gaussian"},
]
"""Networks and heads that have a textbook form."""


ACTIVATIONS = {
    "relu": functional.relu,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
}


class Activation(nn.Module):
    """A function between layers, by its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        """Return the function's values."""
        return self.function(x)


class Textbook(nn.Module):
    """A VAE of `nn.Linear` layers in float64 with the same initial weights as the harness's run."""

    def __init__(self, config: RunConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.config = config
        pixels = image_shape[0] * image_shape[1] * image_shape[2]
        hidden = config.hidden if config.model == "mlp" else ()
        if config.model == "conv":
            self.encoder, self.decoder = _convolutions(config, image_shape)
        else:
            activation = config.activation
            self.encoder = _layers([pixels, *hidden, 2 * config.latent_size], activation)
            self.decoder = _layers([config.latent_size, *hidden[::-1], pixels], activation)
        if config.sigma == "learned":
            self.log_variance = nn.Parameter(torch.zeros(()))
        self.double()
        with torch.no_grad():
            start = build(config, image_shape).parameters()
            for own, given in zip(self.parameters(), start, strict=True):
                own.copy_(given)

    def posterior(self, x: Tensor) -> Normal:
        """Return q(z|x) of images (B, D)."""
        size = self.config.latent_size
        output = self.encoder(x)
        if self.config.head == "relu":
            output = output.clamp(min=0)
            return Normal(output[:, :size], torch.sqrt(output[:, size:] ** 2 + 1e-8))
        return Normal(output[:, :size], torch.exp(output[:, size:] / 2))

    def decode(self, z: Tensor) -> Tensor:
        """Map latents (B, L) to decoder means (B, D)."""
        output = self.decoder(z)
        linear = self.config.model == "linear" and self.config.likelihood == "gaussian"
        return output if linear else torch.sigmoid(output)

    def error(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the loss without its KL term, of a batch (B, D)."""
        mean = self.decode(z)
        if self.config.likelihood == "bernoulli":
            return functional.binary_cross_entropy(mean, x)
        if self.config.sigma == "fixed":
            return functional.mse_loss(mean, x)
        learned = self.config.sigma == "learned"
        variance = self.log_variance.exp() if learned else functional.mse_loss(mean, x)
        return -Normal(mean, variance.sqrt()).log_prob(x).mean()

    def loss(self, x: Tensor, eps: Tensor, warmup: float = 1.0) -> Tensor:
        """Return SSE / (B D) + warmup * kl_weight * KL / c of a batch (B, D), or what replaces it.

        Free bits: of the batch's mean KL, each latent counts at least so many nats.
        """
        q = self.posterior(x)
        if self.config.latent == "deterministic":
            return self.error(x, q.mean)
        kl = kl_divergence(q, Normal(torch.zeros_like(q.mean), 1.0)).mean(0)
        kl = len(x) * torch.clamp(kl, min=self.config.free_bits).sum()
        scale = {"pixels": x.numel(), "batch": len(x), "latent": q.mean.numel(), "sum": 1}
        c = scale[self.config.kl_normalization]
        return self.error(x, q.mean + q.stddev * eps) + warmup * self.config.kl_weight * kl / c

    def train_epochs(
        self,
        pixels: Tensor,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
        *,
        clip: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        """Train on pixels (N, D), with batches and noise as in the harness.

        The optimiser is Adam unless given; its scheduler is stepped once an epoch. The loss is
        multiplied by `scale`, and its gradient clipped where `clip` is above 0.
        """
        config = self.config
        if config.sigma == "learned":
            nn.init.constant_(self.log_variance, math.log(pixels.var(0, correction=0).mean()))
        adam = partial(torch.optim.Adam, lr=config.learning_rate, foreach=False)
        optimizer = optimizer or adam(self.parameters())
        steps = len(pixels) // config.batch_size
        for epoch in range(config.epochs):
            images, latents = steps * config.batch_size, config.latent_size
            rows = batches(config, len(pixels), epoch + 1).split(config.batch_size)
            draws = noise(config.seed, "noise", images, latents, epoch + 1).double()
            for step, eps in enumerate(draws.split(config.batch_size)):
                length = config.kl_warmup_epochs * steps
                since = math.fmod(epoch * steps + step, config.epochs * steps / config.kl_cycles)
                warmup = min(1.0, since / length) if length else 1.0
                optimizer.zero_grad()
                (scale * self.loss(pixels[rows[step]], eps, warmup)).backward()
                if clip:
                    nn.utils.clip_grad_norm_(self.parameters(), clip)
                optimizer.step()
            if schedule is not None:
                schedule.step()


def _layers(sizes: list[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, size in enumerate(sizes[1:]):
        layers += [Activation(activation)] if i else []
        layers.append(nn.Linear(sizes[i], size))
    return nn.Sequential(*layers)


def _convolutions(
    config: RunConfig, image_shape: tuple[int, int, int]
) -> tuple[nn.Sequential, nn.Sequential]:
    """Return a convolutional encoder and decoder that find their sizes by being run."""
    image = torch.zeros(1, *image_shape)
    there: list[nn.Module] = [nn.Unflatten(1, image_shape)]
    back: list[nn.Module] = [nn.Flatten()]
    for channels in config.channels:
        conv = nn.Conv2d(image.shape[1], channels, 3, stride=2, padding=1)
        smaller = conv(image)
        even = [int(side % 2 == 0) for side in image.shape[2:]]
        turned = nn.ConvTranspose2d(channels, image.shape[1], 3, 2, 1, output_padding=even)
        assert turned(smaller).shape == image.shape
        there += [conv, Activation(config.activation)]
        back = [Activation(config.activation), turned, *back]
        image = smaller
    head = nn.Linear(image.numel(), 2 * config.latent_size)
    first = nn.Linear(config.latent_size, image.numel())
    return (
        nn.Sequential(*there, nn.Flatten(), head),
        nn.Sequential(first, back[0], nn.Unflatten(1, image.shape[1:]), *back[1:]),
    )


def flat(model: nn.Module) -> Tensor:
    """Return all weights of a plain model as one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def plain(configs: list[RunConfig]) -> list[RunConfig]:
    """Return the runs as plain autoencoders."""
    return [c.replace(latent="deterministic", kl_weight=0.0) for c in configs]
