"""The variational autoencoder of one run."""

import copy
import math
import operator
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness import registry, streams
from harness.config import RunConfig
from harness.data.dataset import Columns
from harness.errors import UserError, line_of
from harness.likelihoods import Kind
from harness.models import networks
from harness.objective import Batch, Posterior


class VAE(nn.Module):
    """A variational autoencoder around two plain modules.

    Args:
        encoder: maps images (B, *data_shape) to the posterior's parameters (B, 2 L).
        decoder: maps latents (B, L) to (B, *data_shape), before the output's non-linearity.
        data_shape: shape of an image, e.g. (channels, height, width).
        latent_size: L.
        head, latent, likelihood: as in `RunConfig`; a "bernoulli" decoder returns logits.
        output: non-linearity of a decoder that returns no logits: "sigmoid" or "identity".
        learned_variance: whether the decoder's variance, or scale, is a trained parameter.
        largest: grey value of uint8 images that stands for 1; None accepts floats alone.
        columns: of a table, in whose own units `encode` takes values and `decode` gives them.

    Examples:
        >>> encoder, decoder = nn.Linear(4, 2), nn.Linear(1, 4)
        >>> model = VAE(encoder, decoder, data_shape=(4,), latent_size=1)
        >>> model.encode(torch.zeros(3, 4)).mean.shape, model.sample(5).shape
        (torch.Size([3, 1]), torch.Size([5, 4]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        data_shape: Sequence[int],
        latent_size: int,
        head: str = "gaussian",
        latent: str = "stochastic",
        likelihood: str = "gaussian",
        output: str = "sigmoid",
        learned_variance: bool = False,
        largest: int | None = 255,
        columns: Columns | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.data_shape, self.latent_size = tuple(data_shape), latent_size
        self.pixels = math.prod(data_shape)  # D: values of an image, all channels
        self.head, self.latent, self.likelihood = head, latent, likelihood
        self.kind: Kind = registry.LIKELIHOODS[likelihood].load()
        self.has_sigmoid = output == "sigmoid" and not self.kind.logits
        self.largest, self.columns = largest, columns
        if learned_variance:
            self.log_decoder_variance = nn.Parameter(torch.zeros(()))
        lay_out(self)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def scale(self) -> Tensor | None:
        """Learned variance of the decoder, pixel^2, or scale, shape (); None if none is learned."""
        logarithm = getattr(self, "log_decoder_variance", None)
        return None if logarithm is None else logarithm.exp()

    def posterior(self, x: Tensor) -> Posterior:
        """Return the posterior (B, L) of pixels in [0, 1], shape (B, *data_shape)."""
        return Posterior.from_head(self.encoder(x), self.head)

    def decoder_mean(self, z: Tensor) -> Tensor:
        """Return the decoder means (B, *data_shape) of latents (B, L), as the loss compares them.

        They are pixels in [0, 1], or standardised columns of a table.
        """
        return self._means(self.decoder(z))

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstructions of pixels (B, *data_shape) from their posterior means."""
        return self.decoder_mean(self.posterior(x).mean)

    def batch(
        self,
        x: Tensor,
        eps: Tensor,
        prior: Tensor | None = None,
        training_size: int = 0,
        progress: Tensor | float = 1.0,
    ) -> Batch:
        """Encode pixels (B, *data_shape), sample with noise eps (B, L), and decode (`Batch`)."""
        posterior = self.posterior(x)
        z = posterior.mean if self.latent == "deterministic" else posterior.sample(eps)
        output = self.decoder(z)
        decoded = self.decoded(output)
        given = self.kind.mean(decoded), self.scale, prior, training_size, progress
        return Batch(x, posterior, z, output, *given, decoded)

    def encode(self, images: Tensor) -> Posterior:
        """Return the posteriors (B, L) of images (B, *data_shape) or (B, D).

        They are uint8 with the grey levels of the training data, or floats in [0, 1]; rows of a
        table are in its columns' own units.
        """
        return self.posterior(self._pixels(images))

    def decode(self, z: Tensor) -> Tensor:
        """Return the decoder means (B, *data_shape) of latents (B, L).

        They are in [0, 1], or of a table in its columns' own units.
        """
        means = self.decoder_mean(z)
        return means if self.columns is None else self.columns.in_own_units(means)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Return the decoder means (B, *data_shape) of the posterior means of images."""
        return self.decode(self.encode(images).mean)

    @torch.no_grad()
    def sample(self, count: int, *, seed: int = 0) -> Tensor:
        """Return decoder means (count, *data_shape) of latents drawn from N(0, I) by a seed."""
        drawn = streams.noise(seed, "prior", count, self.latent_size)
        return self.decode(drawn.to(self.device, self.dtype))

    @torch.no_grad()
    def interpolate(self, first: Tensor, second: Tensor, steps: int = 9) -> Tensor:
        """Return decoder means (B, steps, *data_shape) on lines between posterior means."""
        ends = self.encode(first).mean, self.encode(second).mean
        share = torch.linspace(0, 1, steps, dtype=self.dtype, device=self.device)
        z = torch.lerp(ends[0].unsqueeze(1), ends[1].unsqueeze(1), share.view(1, -1, 1))
        return self.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])

    def decoded(self, output: Tensor) -> Tensor:
        """Return what the likelihood takes: the output of the decoder behind its non-linearity."""
        return output.sigmoid() if self.has_sigmoid else output

    def _means(self, output: Tensor) -> Tensor:
        return self.kind.mean(self.decoded(output))

    def _pixels(self, images: Tensor) -> Tensor:
        shape, kind = tuple(images.shape), images.dtype
        if len(shape) < 2 or shape[1:] not in (self.data_shape, (self.pixels,)):
            sizes = dict.fromkeys([", ".join(map(str, self.data_shape)), str(self.pixels)])
            what = "images" if self.columns is None else "rows"
            wanted = " or ".join(f"(B, {size})" for size in sizes)
            raise UserError(f"{what} of shape {shape}: give {wanted}")
        if self.columns is not None:
            x = self.columns.standardized(images.to(self.device))
            if not x.isfinite().all():
                raise UserError("rows of a table have values that are no finite numbers")
            return x.to(self.dtype)
        if kind != torch.uint8 and not images.is_floating_point():
            allowed = f"torch.uint8 from 0 to {self.largest}, or floats from 0 to 1"
            raise UserError(f"images of type {kind}: give {allowed}")
        one = self.largest if kind == torch.uint8 else 1
        if one is None:
            why = "the grey value that stands for 1 was not stored with this model"
            raise UserError(f"images of type {kind}: {why}; give floats from 0 to 1")
        if images.numel() and not 0 <= images.min() <= images.max() <= one:  # NaN too
            given = f"from {float(images.min()):g} to {float(images.max()):g}"
            raise UserError(f"images {given}: {kind} must be from 0 to {one}")
        return images.to(self.device, self.dtype).reshape(-1, *self.data_shape) / one


def lay_out(model: nn.Module) -> None:
    """Store the weights of linear layers as (in, out), seen through transposed views.

    The order of summation, and so the bits, then do not depend on how the model was created.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight.data = module.weight.data.t().contiguous().t()


def check_network(config: RunConfig, data_shape: Sequence[int]) -> None:
    """Refuse a user's network that cannot be trained, naming its layer, its line or its shapes."""
    name, count = f"network {config.model!r}", 3
    try:
        model = build(config, data_shape)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be built: {line_of(error)}") from error
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{name} has no parameter to train")
    modules = [(f"{name}: layer {n} ({type(m).__name__})", m) for n, m in model.named_modules()]
    known = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for layer, module in modules:
        if why := _unsupported(module, known):
            raise UserError(f"{layer} {why}")
    before = [_attributes(module) for _, module in modules]
    sizes = (*data_shape,), (2 * config.latent_size,), (config.latent_size,)
    parts = (
        ("encoder", sizes[0], sizes[1], "2 L parameters of the posterior"),
        ("decoder", sizes[2], sizes[0], "an image"),
    )
    for part, given, wanted, what in parts:
        shape, outputs = (count, *given), list[Any]()
        for same in (copy.deepcopy(model).eval(), copy.deepcopy(model), model):
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    outputs.append(getattr(same, part)(torch.full(shape, 0.5)))
            except Exception as error:
                raise UserError(
                    f"{name}: its {part} fails on shape {shape}: {line_of(error)}"
                ) from error
        for output in outputs:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            if found != (count, *wanted):
                expected = f"expected {(count, *wanted)}, {what} each, for {shape}"
                raise UserError(f"{name}: its {part} returns {found}; {expected}")
        if not torch.allclose(outputs[1], outputs[2], equal_nan=True):
            raise UserError(f"{name}: its {part} draws numbers that are not PyTorch's; use torch")
    for (layer, module), held in zip(modules, before, strict=True):
        for attribute, values in _attributes(module).items():
            then = held.get(attribute, [])
            if len(then) != len(values) or any(map(operator.is_not, then, values)):
                why = f"sets {attribute} in its forward, which is lost between processes"
                raise UserError(f"{layer} {why}; change a buffer in place instead")


def _unsupported(module: nn.Module, known: set[int]) -> str:
    # `known` are the identities of all registered modules and tensors.
    own = list(module.parameters(recurse=False))
    if any(map(nn.parameter.is_lazy, [*own, *module.buffers(recurse=False)])):
        return "is lazy; give it its sizes"
    if any(not parameter.is_floating_point() for parameter in own):
        return "has a parameter that is no real floating-point number"
    if getattr(module, "sparse", False):
        return "has sparse gradients, which the optimiser does not take"
    for attribute, values in _attributes(module).items():
        if any(isinstance(v, Tensor | nn.Module) and id(v) not in known for v in values):
            kinds = "register_buffer, nn.Parameter or nn.ModuleList"
            return f"holds a tensor or module in {attribute} that is not registered; use {kinds}"
        if any(isinstance(v, torch.Generator | np.random.Generator | Random) for v in values):
            return f"has a random generator in {attribute}; draw from that of PyTorch"
        try:
            copy.deepcopy([] if attribute == "_modules" else values)
        except Exception as error:
            return f"cannot be copied: {attribute}: {line_of(error)}"
    return ""


def _attributes(module: nn.Module) -> dict[str, list[Any]]:
    # The values of each attribute, those in collections too.
    found = dict[str, list[Any]]()
    for name, value in vars(module).items():
        inner = value.values() if isinstance(value, dict) else value
        found[name] = [*inner] if isinstance(value, dict | list | tuple | set) else [value]
    return found


def build(
    config: RunConfig,
    data_shape: Sequence[int],
    largest: int | None = 255,
    columns: Columns | None = None,
) -> VAE:
    """Return an untrained VAE with the initial weights that a run's seed fixes.

    The decoder of a table's standardised `columns` has no sigmoid, whatever the network's output.
    """
    network = registry.NETWORKS[config.model]
    stream = streams.generator(config.seed, "weights", latent_size=config.latent_size)
    options = {name: getattr(config, name) for name in network.settings}
    options |= config.model_options
    with torch.random.fork_rng(devices=[]):  # PyTorch's generator stays as it was
        if network.initialize == "torch":
            torch.manual_seed(int(stream.integers(2**63)))
        made = network.build(tuple(data_shape), config.latent_size, **options)
    if not (isinstance(made, tuple) and list(map(isinstance, made, [nn.Module] * 2)) == [True] * 2):
        raise UserError(
            f"network {config.model!r} returns {made!r}; return two modules: encoder, decoder"
        )
    encoder, decoder = made
    if network.initialize == "stream":
        networks.draw((*encoder.modules(), *decoder.modules()), stream)
    return VAE(
        encoder,
        decoder,
        data_shape=data_shape,
        latent_size=config.latent_size,
        head=config.head,
        latent=config.latent,
        likelihood=config.likelihood,
        output=network.output if columns is None else "identity",
        learned_variance=config.sigma == "learned",
        largest=largest,
        columns=columns,
    )
