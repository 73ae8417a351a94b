"""The gradient of a stack's loss by autograd, for networks whose gradient is not written out."""

from __future__ import annotations

import torch
from torch import Tensor

from harness import elbo
from harness.config import RunConfig
from harness.cores import works_forked
from harness.gradient import flatten
from harness.nn import steady_convolutions
from harness.vae import VAE


def needs_autograd(config: RunConfig) -> bool:
    """Say whether a run's gradient is not written out in `harness.gradient`."""
    return config.model == "conv"


def may_fork(config: RunConfig) -> bool:
    """Say whether a process forked now can train a run.

    PyTorch's autograd keeps threads for a GPU, and after `torch.export` for a pretended one, and
    then refuses to work in a fork of the process that has used it. Nothing tells beforehand, so it
    is tried.
    """
    return not needs_autograd(config) or works_forked(_differentiate)


def _differentiate() -> None:
    one = torch.ones(1, requires_grad=True)
    torch.autograd.grad(one, one)


class Autograd:
    """Gradient of each run's loss with respect to its own weights, as `gradient.Gradient` has it.

    Args:
        model: the stack; its weights are moved into one buffer `weights`, shape (S, P), of which
            they become views. Their gradients are the same places of `gradients`, shape (S, P).
        batch: images of a step B.
    """

    def __init__(self, model: VAE, batch: int) -> None:
        self.model, self.batch = model, batch
        self.lead = () if len(model.configs) == 1 else (len(model.configs),)
        self.weights, self.gradients = flatten(model)
        self.parameters = list(model.parameters())
        self.slopes = [slope for p in self.parameters if (slope := p.grad) is not None]

    @torch.enable_grad()
    def __call__(self, x: Tensor, eps: Tensor, beta: Tensor) -> None:
        """Write the gradient of each run's loss into `gradients`.

        Args:
            x: pixels in [0, 1], shape (S, B, D), as are all without S for one run.
            eps: standard normal noise, shape (S, B, L).
            beta: weight of the rate, shape (S, 1, 1).
        """
        x, eps = (values.view(-1, self.batch, values.shape[-1]) for values in (x, eps))
        with steady_convolutions():  # which the way back follows too
            loss = elbo.losses(self.model, x, eps, beta.flatten()).sum()
            # Not `backward`, which a GPU could capture only on the stream that made the graph.
            # A learned variance has no slope once all runs that learn one are dropped.
            slopes = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        torch._foreach_copy_(self.slopes, slopes)
