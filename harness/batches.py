"""Loss and KL term batch by batch: what a training script prints of its last batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harness import elbo, objective, streams
from harness.data.dataset import Dataset
from harness.vae import VAE, SingleVAE


@dataclass(frozen=True)
class BatchLosses:
    """The two numbers that the blog prints, for every batch of an epoch; float64, shape (S, steps).

    Attributes:
        loss: the training loss of each batch, z sampled, pixel^2.
        kl_term: the part of it that is the KL: beta * rate / D of the batch, pixel^2.
    """

    loss: np.ndarray
    kl_term: np.ndarray


@torch.no_grad()
def batch_losses(runs: Sequence[SingleVAE], data: Dataset) -> BatchLosses:
    """Return what one more epoch of training would read, with the weights held.

    Batches and noise are those of the epoch after a run's last, so they are the next draw of the
    streams that the run was trained with. The mean over batches is the loss on the training split.
    The KL term is the loss less the loss at beta = 0 with the same noise, whatever the loss is;
    pixels drawn anew every epoch are those that the run is measured on.

    Args:
        runs: trained runs that can share a stack.
        data: their dataset.

    Raises:
        UserError: the runs cannot share a stack.
    """
    model = VAE(runs)
    configs, size = model.configs, model.configs[0].batch_size
    split = data.binarized(configs[0].binarization).train
    order = streams.batches(configs, len(split), configs[0].epochs + 1)
    noise = streams.noise(configs, "noise", order.shape[1], configs[0].epochs + 1).to(model.dtype)
    beta = objective.betas(configs, data.pixels).to(model.dtype)
    columns = []
    for rows, eps in zip(order.split(size, 1), noise.split(size, 1), strict=True):
        seen = elbo.terms(model, split.pixels(rows, model.dtype), eps)
        both = [elbo.mean_loss(model, seen, b, data.pixels) for b in (beta, 0 * beta)]
        columns.append(torch.stack(both))
    loss, error = torch.stack(columns, -1).double().numpy()
    return BatchLosses(loss, loss - error)
