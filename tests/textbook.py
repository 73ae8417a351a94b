"""One run in plain PyTorch, written from SCIENCE.md; and stacks of runs to compare with it."""

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from harness.config import RunConfig
from harness.streams import batches, noise
from harness.vae import initial

SMALL = RunConfig(hidden=(16, 12), epochs=2, batch_size=8)
MIXED = [
    SMALL,
    SMALL.replace(latent_size=3, kl_weight=0.1, kl_normalization="batch", seed=1),
    SMALL.replace(latent_size=16, kl_weight=0.01, kl_normalization="sum", learning_rate=3e-3),
    SMALL.replace(latent_size=7, kl_weight=0.0, kl_normalization="latent", kl_warmup_epochs=1),
    SMALL.replace(latent_size=1, kl_weight=3.0, learning_rate=1e-4, kl_warmup_epochs=3, seed=2),
]
WIDE = [c.replace(hidden=(256, 64), batch_size=32) for c in MIXED]


class Textbook(nn.Module):
    """A VAE of `nn.Linear` layers in float64 with the same initial weights as the harness's run."""

    def __init__(self, config: RunConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.config = config
        pixels = image_shape[0] * image_shape[1] * image_shape[2]
        hidden = config.hidden if config.model == "mlp" else ()
        self.encoder = _layers([pixels, *hidden, 2 * config.latent_size])
        self.decoder = _layers([config.latent_size, *hidden[::-1], pixels])
        self.double()
        with torch.no_grad():
            start = initial(config, image_shape).parameters()
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
        return torch.sigmoid(output) if self.config.model == "mlp" else output

    def loss(self, x: Tensor, eps: Tensor, warmup: float = 1.0) -> Tensor:
        """Return SSE / (B D) + warmup * kl_weight * KL / c of a batch (B, D)."""
        q = self.posterior(x)
        if self.config.latent == "deterministic":
            return functional.mse_loss(self.decode(q.mean), x)
        kl = kl_divergence(q, Normal(torch.zeros_like(q.mean), 1.0)).sum()
        scale = {"pixels": x.numel(), "batch": len(x), "latent": q.mean.numel(), "sum": 1}
        c = scale[self.config.kl_normalization]
        error = functional.mse_loss(self.decode(q.mean + q.stddev * eps), x)
        return error + warmup * self.config.kl_weight * kl / c

    def train_epochs(self, pixels: Tensor) -> None:
        """Train with `torch.optim.Adam` on pixels (N, D), batches and noise as in the harness."""
        config = self.config
        optimizer = torch.optim.Adam(self.parameters(), lr=config.learning_rate, foreach=False)
        steps = len(pixels) // config.batch_size
        for epoch in range(config.epochs):
            rows = batches([config], len(pixels), epoch + 1)[0].split(config.batch_size)
            draws = noise([config], "noise", steps * config.batch_size, epoch + 1)[0].double()
            for step, eps in enumerate(draws.split(config.batch_size)):
                length = config.kl_warmup_epochs * steps
                warmup = min(1.0, (epoch * steps + step) / length) if length else 1.0
                optimizer.zero_grad()
                self.loss(pixels[rows[step]], eps, warmup).backward()
                optimizer.step()


def _layers(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, size in enumerate(sizes[1:]):
        layers += [nn.ReLU()] if i else []
        layers.append(nn.Linear(sizes[i], size))
    return nn.Sequential(*layers)


def flat(model: nn.Module) -> Tensor:
    """Return all weights of a plain model as one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def plain(configs: list[RunConfig]) -> list[RunConfig]:
    """Return the runs as plain autoencoders."""
    return [c.replace(latent="deterministic", kl_weight=0.0) for c in configs]
