"""The gradient of one run's loss written out for linear layers: an accelerator on a CPU.

It equals autograd's gradient of `harness.objective.objective` (a test compares every combination
that `covers` accepts) and is faster, since it records nothing and works in buffers made once.
Whatever `covers` does not list is left to autograd.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from harness.config import RunConfig
from harness.models.stack import has_hooks
from harness.models.vae import VAE
from harness.objective import MIN_VARIANCE, Terms


def covers(config: RunConfig, model: VAE, terms: Terms) -> bool:
    """Return whether the gradient of a run is written out here.

    It is a whitelist by exact types of layers and by names, never by values: linear layers with
    ReLUs between them, behind `nn.Flatten` and before `nn.Unflatten`, every parameter trained, used
    once and without hooks; no loss terms, even of weight 0.
    """
    if terms or type(model) is not VAE or has_hooks(model):
        return False
    if config.likelihood not in ("gaussian", "bernoulli") or not (
        type(model.encoder) is type(model.decoder) is nn.Sequential
    ):
        return False
    (first, *encoder), (*decoder, last) = model.encoder, model.decoder
    flat = type(first) is nn.Flatten and (first.start_dim, first.end_dim) == (1, -1)
    shaped = type(last) is nn.Unflatten and tuple(last.unflattened_size) == model.data_shape
    if not (flat and shaped and last.dim == 1 and _alternates(encoder) and _alternates(decoder)):
        return False
    linears = [*encoder[::2], *decoder[::2]]
    used = [parameter for layer in linears for parameter in (layer.weight, layer.bias)]
    used += [model.log_decoder_variance] if config.sigma == "learned" else []
    return (
        all(parameter is not None and parameter.requires_grad for parameter in used)
        and len(used) == len({id(parameter) for parameter in used})
        and {id(parameter) for parameter in used} == {id(p) for p in model.parameters()}
    )


def _alternates(layers: list[nn.Module]) -> bool:
    """Return whether layers are linear, ReLU, linear, ..., linear."""
    types = [type(layer) for layer in layers]
    return len(types) % 2 == 1 and types == ([nn.Linear, nn.ReLU] * len(types))[: len(types)]


class MLPGradient:
    """Gradient of a run's loss with respect to its weights.

    Args:
        config: the run.
        model: its model, which `covers` accepts; weights of linear layers lie as (in, out).
        gradients: place of the gradient of each parameter, by name; written by each call.
    """

    def __init__(self, config: RunConfig, model: VAE, gradients: Mapping[str, Tensor]) -> None:
        self.config, self.model, self.batch = config, model, config.batch_size
        self.encoder, self.decoder = (
            _Layers(model, part, gradients, self.batch) for part in ("encoder", "decoder")
        )
        latents = model.latent_size
        new = next(model.parameters()).new_zeros
        self.z, self.std, self.scratch = (new(self.batch, latents) for _ in range(3))
        self.mean, self.second = self.encoder.outputs[-1].chunk(2, -1)
        self.by_mean, self.by_second = self.encoder.slopes[-1].chunk(2, -1)
        self.by_variance = gradients.get("log_decoder_variance")

    @torch.no_grad()
    def __call__(self, x: Tensor, eps: Tensor, beta: Tensor) -> None:
        """Write the gradient of the loss on a batch.

        Args:
            x: pixels in [0, 1], shape (B, D).
            eps: standard normal noise, shape (B, L).
            beta: weight of the rate, shape ().
        """
        head = self.encoder.forward(x)
        self._sample(head, eps)
        output = self.decoder.forward(self.z)
        self._output_slope(output, x)
        slope = self.decoder.backward(self.z, inputs=True)
        self._latent_slope(head, slope, eps, beta / (self.batch * x.shape[-1]))
        self.encoder.backward(x, inputs=False)

    def _sample(self, head: Tensor, eps: Tensor) -> None:
        """Write the posterior's deviation and the latents that the decoder sees."""
        if self.config.head == "relu":
            head.relu_()
        if self.config.latent == "deterministic":
            self.z.copy_(self.mean)
        elif self.config.head == "relu":
            torch.mul(self.second, self.second, out=self.std).add_(MIN_VARIANCE).sqrt_()
            torch.addcmul(self.mean, self.std, eps, out=self.z)
        else:
            torch.mul(self.second, 0.5, out=self.std).exp_()
            torch.addcmul(self.mean, self.std, eps, out=self.z)

    def _output_slope(self, output: Tensor, x: Tensor) -> None:
        """Write the slope of the reconstruction term at the decoder's last layer."""
        slope, values = self.decoder.slopes[-1], self.batch * x.shape[-1]
        if self.model.has_sigmoid:
            output.sigmoid_()
        torch.sub(output, x, out=slope)
        if self.config.likelihood == "bernoulli":
            slope.div_(values)
            return
        slope.mul_(2 / values if self.config.sigma == "fixed" else self._factor(slope, values))
        if self.model.has_sigmoid:
            torch.ops.aten.sigmoid_backward.grad_input(slope, output, grad_input=slope)

    def _factor(self, residual: Tensor, values: int) -> Tensor:
        """Return the residual's factor 1 / (B D variance).

        The slope of a learned log-variance, (1 - mse / variance) / 2, is written on the way.
        """
        mse = variance = residual.square().mean()
        if self.by_variance is not None:
            variance = self.model.log_decoder_variance.detach().exp()
            self.by_variance.copy_((1 - mse / variance) / 2)
        return 1 / variance / values

    def _latent_slope(self, head: Tensor, slope: Tensor, eps: Tensor, weight: Tensor) -> None:
        """Write the slope of the whole loss at the encoder's last layer.

        Args:
            head: mean and log-variance, or the blog's mean and deviation.
            slope: of the reconstruction term at z.
            eps: the noise in z.
            weight: beta / (B D), the KL's factor in the loss.
        """
        by_mean, by_second = self.by_mean, self.by_second
        if self.config.latent == "deterministic":
            by_mean.copy_(slope)
            by_second.zero_()
        else:
            if self.config.free_bits > 0:
                weight = weight * self._charged()
            torch.addcmul(slope, weight, self.mean, out=by_mean)
            variance = torch.mul(self.std, self.std, out=self.scratch)
            torch.sub(variance, 1, out=by_second).mul_(weight)
            by_second.addcmul_(slope.mul_(eps), self.std)
            if self.config.head == "relu":  # ln(sigma^2 + min) by sigma
                by_second.mul_(self.second).div_(variance)
            else:
                by_second.mul_(0.5)
        if self.config.head == "relu":
            by_head = self.encoder.slopes[-1]
            torch.ops.aten.threshold_backward.grad_input(by_head, head, 0, grad_input=by_head)

    def _charged(self) -> Tensor:
        """Return 1 for latents whose batch-mean KL is above the free bits, else 0, shape (1, L)."""
        variance = self.std.square()
        kl = (self.mean.square() + variance - variance.log() - 1) / 2
        return (kl.mean(0, keepdim=True) > self.config.free_bits).to(kl.dtype)


class _Layers:
    """Forward and backward of linear layers into buffers; `slopes[i]` is that at output i."""

    def __init__(self, model: VAE, part: str, gradients: Mapping[str, Tensor], batch: int) -> None:
        linears = {
            f"{part}.{name}": layer
            for name, layer in getattr(model, part).named_children()
            if type(layer) is nn.Linear
        }
        layers = list(linears.values())
        # Views are made once: on a CPU each costs as much as a small product.
        self.weights_t = [layer.weight.detach() for layer in layers]
        self.weights = [weight.t() for weight in self.weights_t]
        self.biases = [layer.bias.detach() for layer in layers]
        self.by_weight = [gradients[f"{name}.weight"].t() for name in linears]
        self.by_bias = [gradients[f"{name}.bias"].unsqueeze(0) for name in linears]
        new = layers[0].weight.new_zeros
        self.outputs, self.slopes = (
            [new(batch, layer.out_features) for layer in layers] for _ in range(2)
        )
        self.input_slope = new(batch, layers[0].in_features)
        self.outputs_t = [output.mT for output in self.outputs]

    def forward(self, x: Tensor) -> Tensor:
        """Return the last layer's output."""
        for i, output in enumerate(self.outputs):
            torch.addmm(self.biases[i], x, self.weights[i], out=output)
            if i < len(self.outputs) - 1:
                output.relu_()
            x = output
        return x

    def backward(self, x: Tensor, *, inputs: bool) -> Tensor:
        """Write the gradients of weights and biases, and the slope at the input if it is wanted."""
        for i in range(len(self.outputs) - 1, -1, -1):
            slope = self.slopes[i]
            torch.mm(self.outputs_t[i - 1] if i else x.mT, slope, out=self.by_weight[i])
            torch.sum(slope, -2, keepdim=True, out=self.by_bias[i])
            if i or inputs:
                lower = self.slopes[i - 1] if i else self.input_slope
                torch.mm(slope, self.weights_t[i], out=lower)
                if i:
                    below = self.outputs[i - 1]
                    torch.ops.aten.threshold_backward.grad_input(lower, below, 0, grad_input=lower)
        return self.input_slope
