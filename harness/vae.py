"""The variational autoencoder: a stack of S runs (`VAE`) and one plain run (`SingleVAE`).

Runs of different latent sizes share a stack by padding: beyond its own latent size a run has
posterior mean 0 and variance 1, hence KL 0, and decoder weights 0, which get no gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness import networks, streams
from harness.config import RunConfig, UserError, check_static
from harness.nn import Conv, Linear, Shape, constant

MIN_VARIANCE = 1e-8
"""Floor of the blog's posterior variance (its 1e-8 inside the logarithm), latent^2."""


@dataclass(frozen=True)
class Posterior:
    """q(z|x) = N(mean, diag(exp(log_variance))), both of shape (..., B, L)."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def from_head(cls, output: Tensor, head: str) -> Posterior:
        """Read an encoder's output (..., B, 2 L) as a posterior.

        gaussian: the halves are mean and log-variance.
        relu: the halves behind a ReLU are mean and standard deviation sigma, as in the blog;
        log_variance = ln(sigma^2 + 1e-8).
        """
        if head == "gaussian":
            return cls(*output.chunk(2, dim=-1))
        mean, sigma = output.relu().chunk(2, dim=-1)
        return cls(mean, (sigma.square() + MIN_VARIANCE).log())

    def sample(self, eps: Tensor) -> Tensor:
        """Reparameterise: z = mean + exp(log_variance / 2) * eps, shape (..., B, L)."""
        return self.mean + (self.log_variance / 2).exp() * eps


def has_sigmoid(config: RunConfig) -> bool:
    """Say whether decoder means are a sigmoid of the last layer: all but the linear Gaussian."""
    return config.model != "linear" or config.likelihood == "bernoulli"


class SingleVAE(nn.Module):
    """One run as a plain module of `torch.nn` layers.

    Args:
        config: the run's configuration.
        image_shape: (channels, height, width).
    """

    def __init__(self, config: RunConfig, image_shape: Shape) -> None:
        super().__init__()
        self.config = config
        self.image_shape = image_shape
        self.encoder = networks.encoder(config, image_shape)
        self.decoder = networks.decoder(config, image_shape)
        if has_sigmoid(config):
            self.decoder.append(nn.Sigmoid())
        if config.sigma == "learned":
            self.log_decoder_variance = nn.Parameter(torch.zeros(()))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(self.parameters()).dtype

    def encode(self, x: Tensor) -> Posterior:
        """Map images (B, D) or (B, C, H, W), pixels in [0, 1], to their posterior (B, L)."""
        return Posterior.from_head(self.encoder(x.flatten(1)), self.config.head)

    def decode(self, z: Tensor) -> Tensor:
        """Map latents (B, L) to decoder means (B, D)."""
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct images from their posterior means: (B, ...) to the same shape."""
        return self.decode(self.encode(x).mean).reshape(x.shape)


class VAE(nn.Module):
    """A stack of S independent runs with equal static settings.

    Args:
        runs: the single runs, in stack order; their weights are copied.

    Raises:
        UserError: the runs differ in a setting that fixes tensor shapes.
    """

    used_latents: Tensor
    """Which latents belong to a run and which are padding, bool, shape (S, 1, L)."""

    def __init__(self, runs: Sequence[SingleVAE]) -> None:
        super().__init__()
        self.configs = tuple(run.config for run in runs)
        self.image_shape = runs[0].image_shape
        check_static(self.configs)
        if len({run.image_shape for run in runs}) > 1:
            raise UserError("runs of one stack must agree in the shape of their images")
        sizes = [c.latent_size for c in self.configs]
        self.latent_size = max(sizes)
        shared = self.configs[0], self.image_shape
        halves = [run.encoder for run in runs], [run.decoder for run in runs]
        self.encoder = networks.stacked_encoder(*shared, halves[0], self.latent_size)
        self.decoder = networks.stacked_decoder(*shared, halves[1], self.latent_size)
        used = torch.arange(self.latent_size) < torch.tensor(sizes).unsqueeze(1)
        self.register_buffer("used_latents", used.unsqueeze(1).to(self.device))
        self.padded = not bool(used.all())
        self.log_decoder_variance = _learned_variances(runs)

    @property
    def pixels(self) -> int:
        """D: values of an image, all channels."""
        return math.prod(self.image_shape)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(self.parameters()).dtype

    def encode(self, x: Tensor) -> Posterior:
        """Map images (S, B, D), pixels in [0, 1], to their posteriors (S, B, L)."""
        posterior = Posterior.from_head(self.encoder(x), self.configs[0].head)
        if not self.padded:
            return posterior
        return Posterior(
            posterior.mean * self.used_latents, posterior.log_variance * self.used_latents
        )

    def reparameterize(self, posterior: Posterior, eps: Tensor) -> Tensor:
        """Return the latents that the decoder sees, (S, B, L): a sample, or the mean itself."""
        if self.configs[0].latent == "deterministic":
            return posterior.mean
        return posterior.sample(eps)

    def decode(self, z: Tensor) -> Tensor:
        """Map latents (S, B, L) to decoder means (S, B, D)."""
        output = self.decoder_output(z)
        return output.sigmoid() if has_sigmoid(self.configs[0]) else output

    def decoder_output(self, z: Tensor) -> Tensor:
        """Map latents (S, B, L) to the last layer (S, B, D), before any sigmoid: the logits."""
        return self.decoder(z)

    def decoder_variances(self, mse: Tensor) -> Tensor:
        """Return each run's own decoder variance, pixel^2, shape (S,): learned, or the given mse.

        Args:
            mse: variance of the runs that learn none, shape (S,).
        """
        if self.log_decoder_variance is None:
            return mse
        which = tuple(c.sigma == "learned" for c in self.configs)
        learned = constant(which, torch.bool, mse.device)
        return torch.where(learned, self.log_decoder_variance.exp(), mse)

    def keep(self, rows: Sequence[int]) -> VAE:
        """Copy some runs into a stack of their own, in the given order; its padding stays."""
        kept = copy.deepcopy(self)
        kept.configs = tuple(self.configs[row] for row in rows)
        kept.used_latents = self.used_latents[list(rows)]
        for layer in (*kept.encoder.layers, *kept.decoder.layers):
            layer.weight = nn.Parameter(layer.weight.detach()[list(rows)])
            layer.bias = nn.Parameter(layer.bias.detach()[list(rows)])
        if self.log_decoder_variance is not None:
            kept.log_decoder_variance = nn.Parameter(self.log_decoder_variance.detach()[list(rows)])
        return kept

    def run(self, index: int) -> SingleVAE:
        """Copy one run out of the stack as a plain module on the CPU."""
        config = self.configs[index]
        single = empty(config, self.image_shape).to(self.dtype)
        head = self.encoder.layers[-1]
        kept = torch.arange(self.latent_size) < config.latent_size
        columns = torch.cat([kept, kept])
        with torch.no_grad():
            for own, stacked in _pairs(single, self):
                weight, bias = stacked.weight[index].cpu(), stacked.bias[index].cpu()
                if stacked is head:
                    weight, bias = weight[:, columns], bias[columns]
                if stacked is self.decoder.layers[0]:
                    weight = weight[kept]
                own_weight, own_bias = own.parameters()
                own_weight.copy_(networks.facing(own, weight))
                own_bias.copy_(bias)
            if self.log_decoder_variance is not None and config.sigma == "learned":
                single.log_decoder_variance.copy_(self.log_decoder_variance[index])
        return single


def initial(config: RunConfig, image_shape: Shape) -> SingleVAE:
    """Return an untrained run with weights and biases U(-1, 1) / sqrt(inputs) from its stream.

    This is PyTorch's default for linear layers, hence the blog's, and for convolutions; of a
    transposed one it takes the outputs times the kernel for the inputs.
    """
    run = empty(config, image_shape)
    stream = streams.generator(config.seed, "weights", latent_size=config.latent_size)
    networks.draw(networks.layers(run.encoder, run.decoder), stream)
    return run


def untrained(configs: Sequence[RunConfig], image_shape: Shape) -> VAE:
    """Return a stack of runs with their initial weights."""
    return VAE([initial(config, image_shape) for config in configs])


def _learned_variances(runs: Sequence[SingleVAE]) -> nn.Parameter | None:
    """Return the logarithms of learned decoder variances, shape (S,); None if no run learns one."""
    if all(run.config.sigma != "learned" for run in runs):
        return None
    none = next(runs[0].parameters()).new_zeros(())
    return nn.Parameter(
        torch.stack([getattr(run, "log_decoder_variance", none).detach() for run in runs])
    )


def empty(config: RunConfig, image_shape: Shape) -> SingleVAE:
    """Return a run whose weights are to be written, of any values."""
    with torch.random.fork_rng(devices=[]):  # leaves PyTorch's global random state alone
        return SingleVAE(config, image_shape)


def _pairs(run: SingleVAE, stack: VAE) -> list[tuple[networks.Plain, Linear | Conv]]:
    own = networks.layers(run.encoder, run.decoder)
    return list(zip(own, (*stack.encoder.layers, *stack.decoder.layers), strict=True))
