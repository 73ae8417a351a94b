"""The gradient of one run's loss written out for linear layers: an accelerator on a CPU.

It equals autograd's gradient of `harness.objective.objective` (a test compares every combination
that `covers` accepts) and is faster. Autograd computes the gradient of all other runs.
"""

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
    once and without hooks; a Gaussian or Bernoulli likelihood; no loss terms, even of weight 0.
    """
    if config.likelihood not in ("gaussian", "bernoulli"):
        return False
    if terms or type(model) is not VAE or has_hooks(model):
        return False
    if not type(model.encoder) is type(model.decoder) is nn.Sequential:
        return False
    (first, *encoder), (*decoder, last) = model.encoder, model.decoder
    flat = type(first) is nn.Flatten and (first.start_dim, first.end_dim) == (1, -1)
    shaped = type(last) is nn.Unflatten and tuple(last.unflattened_size) == model.data_shape
    if not (flat and shaped and last.dim == 1 and _alternates(encoder) and _alternates(decoder)):
        return False
    used = [p for layer in (*encoder[::2], *decoder[::2]) for p in (layer.weight, layer.bias)]
    used += [model.log_decoder_variance] if config.sigma == "learned" else []
    trained = all(parameter is not None and parameter.requires_grad for parameter in used)
    return trained and len(used) == len(set(used)) == len(list(model.parameters()))


def _alternates(layers: list[nn.Module]) -> bool:
    types = [type(layer) for layer in layers]
    return len(types) % 2 == 1 and types == ([nn.Linear, nn.ReLU] * len(types))[: len(types)]


class MLPGradient:
    """Gradient of the loss of a run that `covers` accepts, written to each parameter's `grad`."""

    def __init__(self, config: RunConfig, model: VAE) -> None:
        self.config, self.model = config, model
        batch, new = config.batch_size, next(model.parameters()).new_zeros
        # Numbers are tensors: on a CPU to make one of a Python number costs as much as a small sum.
        number = next(model.parameters()).new_tensor
        self.values, self.factor = number(batch * model.pixels), number(2 / (batch * model.pixels))
        self.one, self.half, self.least = number(1.0), number(0.5), number(MIN_VARIANCE)
        self.encoder, self.decoder = _Layers(model.encoder, batch), _Layers(model.decoder, batch)
        self.z, self.std, self.scratch = (new(batch, model.latent_size) for _ in range(3))
        self.mean, self.second = self.encoder.outputs[-1].chunk(2, -1)
        self.by_mean, self.by_second = self.encoder.slopes[-1].chunk(2, -1)

    def __call__(self, x: Tensor, eps: Tensor, beta: Tensor) -> None:
        """Write the gradient for pixels x (B, D), normal noise eps (B, L) and the rate's weight."""
        relu, stochastic = self.config.head == "relu", self.config.latent == "stochastic"
        head = self.encoder.forward(x)
        if relu:
            head.relu_()
        if not stochastic:
            self.z.copy_(self.mean)
        else:
            if relu:
                torch.mul(self.second, self.second, out=self.std).add_(self.least).sqrt_()
            else:
                torch.mul(self.second, self.half, out=self.std).exp_()
            torch.addcmul(self.mean, self.std, eps, out=self.z)
        self._output_slope(self.decoder.forward(self.z), x)
        slope = self.decoder.backward(self.z, inputs=True)
        if stochastic:
            self._latent_slopes(slope, eps, beta / self.values)
        else:
            self.by_mean.copy_(slope)
            self.by_second.zero_()
        if relu:
            by_head = self.encoder.slopes[-1]
            torch.ops.aten.threshold_backward.grad_input(by_head, head, 0, grad_input=by_head)
        self.encoder.backward(x, inputs=False)

    def _output_slope(self, output: Tensor, x: Tensor) -> None:
        config, slope = self.config, self.decoder.slopes[-1]
        if self.model.has_sigmoid or config.likelihood == "bernoulli":
            output.sigmoid_()
        torch.sub(output, x, out=slope)
        if config.likelihood == "bernoulli":
            slope.div_(self.values)
            return
        factor = self.factor
        if config.sigma != "fixed":  # 1 / (B D variance)
            mse = variance = slope.square().mean()
            if config.sigma == "learned":
                logarithm = self.model.log_decoder_variance
                variance = logarithm.detach().exp()
                logarithm.grad.copy_((1 - mse / variance) / 2)  # type: ignore[union-attr]
            factor = 1 / variance / self.values
        slope.mul_(factor)
        if self.model.has_sigmoid:
            torch.ops.aten.sigmoid_backward.grad_input(slope, output, grad_input=slope)

    def _latent_slopes(self, slope: Tensor, eps: Tensor, weight: Tensor) -> None:
        # `slope` is that of the reconstruction term at z; `weight` = beta / (B D), the KL's factor.
        if self.config.free_bits > 0:  # of latents whose KL, a mean over the batch, is above
            variance = self.std.square()
            kl = (self.mean.square() + variance - variance.log() - 1) / 2
            weight = weight * (kl.mean(0, keepdim=True) > self.config.free_bits).to(kl.dtype)
        torch.addcmul(slope, weight, self.mean, out=self.by_mean)
        variance = torch.mul(self.std, self.std, out=self.scratch)
        torch.sub(variance, self.one, out=self.by_second).mul_(weight)
        self.by_second.addcmul_(slope.mul_(eps), self.std)
        if self.config.head == "relu":  # ln(sigma^2 + min) by sigma
            self.by_second.mul_(self.second).div_(variance)
        else:
            self.by_second.mul_(self.half)


class _Layers:
    """Forward and backward of linear layers into buffers; `slopes[i]` is that at output i."""

    def __init__(self, part: nn.Module, batch: int) -> None:
        layers = [layer for layer in part.children() if type(layer) is nn.Linear]
        # Views (in, out) are made once: on a CPU each costs as much as a small product.
        self.weights_t = [layer.weight.detach() for layer in layers]
        self.weights = [weight.t() for weight in self.weights_t]
        self.biases = [layer.bias.detach() for layer in layers]
        self.by_weight = [layer.weight.grad.t() for layer in layers]  # type: ignore[union-attr]
        self.by_bias = [layer.bias.grad for layer in layers]
        new = layers[0].weight.new_zeros
        self.outputs = [new(batch, layer.out_features) for layer in layers]
        self.slopes = [new(batch, layer.out_features) for layer in layers]
        self.input_slope = new(batch, layers[0].in_features)
        self.outputs_t = [output.mT for output in self.outputs]

    def forward(self, x: Tensor) -> Tensor:
        for i, output in enumerate(self.outputs):
            torch.addmm(self.biases[i], x, self.weights[i], out=output)
            if i < len(self.outputs) - 1:
                output.relu_()
            x = output
        return x

    def backward(self, x: Tensor, *, inputs: bool) -> Tensor:
        for i, slope in reversed([*enumerate(self.slopes)]):
            torch.mm(self.outputs_t[i - 1] if i else x.mT, slope, out=self.by_weight[i])
            torch.sum(slope, 0, out=self.by_bias[i])
            if i:
                lower, below = self.slopes[i - 1], self.outputs[i - 1]
                torch.mm(slope, self.weights_t[i], out=lower)
                torch.ops.aten.threshold_backward.grad_input(lower, below, 0, grad_input=lower)
            elif inputs:
                torch.mm(slope, self.weights_t[i], out=self.input_slope)
        return self.input_slope
