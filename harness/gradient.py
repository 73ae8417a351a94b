"""The gradient of a stack's loss written out, forward and backward, into buffers made once.

It is what autograd gives for `elbo.loss` (a test compares them), without a graph or a
synchronisation and almost without allocations, so that a GPU can record a step and a CPU spends
little beside its matrix products. One run drops its axis S: `mm` is faster than a `bmm` of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.cores import shared_zeros
from harness.nn import MLP, Linear
from harness.vae import MIN_VARIANCE, VAE, has_sigmoid

ALIGNED = 16
"""Numbers in 64 bytes of float32, a cache line and a vector register."""


class Gradient:
    """Gradient of each run's loss with respect to its own weights.

    Args:
        model: the stack; its weights are moved into one buffer `weights`, shape (S, P), of which
            they become views. Their gradients are the same places of `gradients`, shape (S, P).
        batch: images of a step B.
    """

    def __init__(self, model: VAE, batch: int) -> None:
        self.model, self.batch, self.config = model, batch, model.configs[0]
        self.has_sigmoid = has_sigmoid(self.config)
        stack, latents = len(model.configs), model.latent_size
        self.lead = () if stack == 1 else (stack,)
        self.weights, self.gradients = flatten(model)
        self.encoder = _Layers(model.encoder, self)
        self.decoder = _Layers(model.decoder, self)
        self.z, self.std, self.scratch = (self.new(latents) for _ in range(3))
        self.head = self.encoder.outputs[-1].chunk(2, -1)
        self.head_slopes = self.encoder.slopes[-1].chunk(2, -1)
        self.used = model.used_latents[0] if stack == 1 else model.used_latents
        self.own_variance, self.learned, self.free_bits = (
            self._by_run([read(c) for c in model.configs])
            for read in (
                lambda c: c.sigma != "fixed",
                lambda c: c.sigma == "learned",
                lambda c: c.free_bits,
            )
        )
        self.fixed = not bool(self.own_variance.any())
        self.free = bool(self.free_bits.any())

    def new(self, width: int) -> Tensor:
        """Return a buffer for a batch of every run, shape (S, B, width), or (B, width) for one."""
        shape = (*self.lead, self.batch, width)
        return torch.zeros(shape, device=self.model.device, dtype=self.model.dtype)

    def _by_run(self, values: Sequence[float]) -> Tensor:
        """Return a number a run, shape (S, 1, 1), or (1, 1) for one; yes and no stay bool."""
        kept = torch.tensor(values, device=self.model.device).view(*self.lead, 1, 1)
        return kept if kept.dtype == torch.bool else kept.to(self.model.dtype)

    @torch.no_grad()
    def __call__(self, x: Tensor, eps: Tensor, beta: Tensor) -> None:
        """Write the gradient of each run's loss into `gradients`.

        Args:
            x: pixels in [0, 1], shape (S, B, D), as are all without S for one run.
            eps: standard normal noise, shape (S, B, L).
            beta: weight of the rate, shape (S, 1, 1).
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
        mean, second = self.head
        if self.config.latent == "deterministic":
            self.z.copy_(mean)
        elif self.config.head == "relu":
            torch.mul(second, second, out=self.std).add_(MIN_VARIANCE).sqrt_()
            torch.addcmul(mean, self.std, eps, out=self.z)
        else:
            torch.mul(second, 0.5, out=self.std).exp_()
            torch.addcmul(mean, self.std, eps, out=self.z)
        if self.model.padded:
            self.z.mul_(self.used)

    def _output_slope(self, output: Tensor, x: Tensor) -> None:
        """Write the slope of the reconstruction term at the decoder's last layer."""
        slope, values = self.decoder.slopes[-1], self.batch * x.shape[-1]
        if self.has_sigmoid:
            output.sigmoid_()
        torch.sub(output, x, out=slope)
        if self.config.likelihood == "bernoulli":
            slope.div_(values)
            return
        slope.mul_(2 / values if self.fixed else self._factor(slope, values))
        if self.has_sigmoid:
            torch.ops.aten.sigmoid_backward.grad_input(slope, output, grad_input=slope)

    def _factor(self, residual: Tensor, values: int) -> Tensor:
        """Return what each run's residual is multiplied by: 2 / (B D), or 1 / (B D variance).

        The slope of a learned log-variance, (1 - mse / variance) / 2, is written on the way.
        """
        mse = variance = residual.square().mean((-2, -1), keepdim=True)
        learned = self.model.log_decoder_variance
        if learned is not None:
            assert learned.grad is not None
            own = learned.detach().exp().view_as(mse)
            variance = torch.where(self.learned, own, mse)
            learned.grad.copy_(((1 - mse / variance) / 2).flatten())
        return torch.where(self.own_variance, 1 / variance, 2) / values

    def _latent_slope(self, head: Tensor, slope: Tensor, eps: Tensor, weight: Tensor) -> None:
        """Write the slope of the whole loss at the encoder's last layer.

        Args:
            head: mean and log-variance, or the blog's mean and deviation.
            slope: of the reconstruction term at z.
            eps: the noise in z.
            weight: beta / (B D), the KL's factor in the loss.
        """
        mean, second = self.head
        by_mean, by_second = self.head_slopes
        if self.model.padded:
            slope.mul_(self.used)
        if self.config.latent == "deterministic":
            by_mean.copy_(slope)
            by_second.zero_()
        else:
            if self.free:
                weight = weight * self._charged(mean)
            torch.addcmul(slope, weight, mean, out=by_mean)
            variance = torch.mul(self.std, self.std, out=self.scratch)
            torch.sub(variance, 1, out=by_second).mul_(weight)
            by_second.addcmul_(slope.mul_(eps), self.std)
            if self.config.head == "relu":  # ln(sigma^2 + min) by sigma
                by_second.mul_(second).div_(variance)
            else:
                by_second.mul_(0.5)
            if self.model.padded:
                by_second.mul_(self.used)
                by_mean.mul_(self.used)
        if self.config.head == "relu":
            by_head = self.encoder.slopes[-1]
            torch.ops.aten.threshold_backward.grad_input(by_head, head, 0, grad_input=by_head)

    def _charged(self, mean: Tensor) -> Tensor:
        """Return 1 for latents whose batch-mean KL is above the free bits, else 0, (S, 1, L)."""
        variance = self.std.square()
        kl = ((mean.square() + variance - variance.log() - 1) / 2).mean(-2, keepdim=True)
        return (kl > self.free_bits).to(kl.dtype)


def flatten(model: VAE) -> tuple[Tensor, Tensor]:
    """Move weights into one buffer (S, P), and give them gradients in another.

    Each begins at a multiple of 16 numbers, where matrix products read fastest.
    """
    parameters = list(model.parameters())
    sizes = [parameter[0].numel() for parameter in parameters]
    widths = [-(-size // ALIGNED) * ALIGNED for size in sizes]
    shape = (len(model.configs), sum(widths))
    values = shared_zeros(shape, model.device, model.dtype)
    slopes = torch.zeros_like(values)
    places = zip(parameters, sizes, values.split(widths, 1), slopes.split(widths, 1), strict=True)
    for parameter, size, value, slope in places:
        own = value[:, :size].view(parameter.shape)
        own.copy_(parameter.detach())
        parameter.data, parameter.grad = own, slope[:, :size].view(parameter.shape)
    return values, slopes


class _Layers:
    """Forward and backward of an `MLP` into buffers; `slopes[i]` is that at layer i's output."""

    def __init__(self, network: MLP, owner: Gradient) -> None:
        one = owner.lead == ()
        self.mm = torch.mm if one else torch.bmm
        self.affine = torch.addmm if one else torch.baddbmm
        layers = [layer for layer in network.layers if isinstance(layer, Linear)]
        self.weights = [_of_run(layer.weight.detach(), one) for layer in layers]
        self.biases = [_of_run(layer.bias.detach().unsqueeze(1), one) for layer in layers]
        self.by_weight = [_of_run(_grad(layer.weight), one) for layer in layers]
        self.by_bias = [_of_run(_grad(layer.bias).unsqueeze(1), one) for layer in layers]
        widths = [layer.bias.shape[1] for layer in layers]
        self.outputs, self.slopes = ([owner.new(width) for width in widths] for _ in range(2))
        self.input_slope = owner.new(layers[0].weight.shape[1])
        # Views are made once: on a CPU each costs as much as a small product.
        self.weights_t = [weight.mT for weight in self.weights]
        self.outputs_t = [output.mT for output in self.outputs]

    def forward(self, x: Tensor) -> Tensor:
        """Return the last layer's output."""
        for i, output in enumerate(self.outputs):
            self.affine(self.biases[i], x, self.weights[i], out=output)
            if i < len(self.outputs) - 1:
                output.relu_()
            x = output
        return x

    def backward(self, x: Tensor, *, inputs: bool) -> Tensor:
        """Write the gradients of weights and biases, and the slope at the input if it is wanted."""
        for i in range(len(self.outputs) - 1, -1, -1):
            slope = self.slopes[i]
            self.mm(self.outputs_t[i - 1] if i else x.mT, slope, out=self.by_weight[i])
            torch.sum(slope, -2, keepdim=True, out=self.by_bias[i])
            if i or inputs:
                lower = self.slopes[i - 1] if i else self.input_slope
                self.mm(slope, self.weights_t[i], out=lower)
                if i:
                    below = self.outputs[i - 1]
                    torch.ops.aten.threshold_backward.grad_input(lower, below, 0, grad_input=lower)
        return self.input_slope


def _of_run(parameter: Tensor, one: bool) -> Tensor:  # noqa: FBT001 - a shape, not a switch
    return parameter[0] if one else parameter


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
