"""Held-out metrics: pure functions of a stack of runs and a split, in float64.

Names and units are those of the vocabulary: `mse` pixel^2 per pixel, `rate` nats per image, and so
on. Metrics that a model does not have are NaN: a deterministic latent has no `rate`, and a run has
no `kl/i` beyond its own latent size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from harness import objective, oracle, streams
from harness.data import Dataset, Split
from harness.vae import VAE, SingleVAE

CHUNK = 500
"""Images evaluated at once; fixed, so that a run's sums do not depend on its stack."""

Metrics = dict[str, Tensor]
"""Metric name -> float64 values of shape (S,), on the model's device."""


def active_units(mean: Tensor) -> Tensor:
    """Count latents whose posterior mean varies: #{i : Var_x[mean_i(x)] > 0.01}.

    Source: Burda et al. 2015, section 5.2 (1509.00519).

    Args:
        mean: posterior means, shape (S, N, L).

    Returns:
        Count as float64, shape (S,).
    """
    return (mean.double().var(dim=1, correction=0) > objective.ACTIVE_VARIANCE).sum(-1).double()


def mse_per_class(mse: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Average the squared error per pixel over the images of each class.

    Args:
        mse: squared error per pixel of each image, shape (S, N).
        labels: shape (N,).
        classes: number of classes C.

    Returns:
        pixel^2, shape (S, C); NaN for a class without images.
    """
    member = functional.one_hot(labels, classes).to(mse)
    return mse @ member / member.sum(0)


def gap_to_linear(loss: Tensor, linear: Tensor) -> Tensor:
    """Say how much a loss is below the exact linear model's: 100 (linear - loss) / linear.

    Args:
        loss: shape (S,).
        linear: loss of the exact linear model at the same knob on the same images, shape (S,).

    Returns:
        %, shape (S,); negative is worse than linear.
    """
    return 100 * (linear - loss) / linear


def linear_losses(model: VAE, data: Dataset, split: Split) -> Tensor:
    """Return the loss of the exact linear model at each run's knob, on a split.

    Linear algebra of the training split, done once per dataset; NaN for a deterministic latent.

    Returns:
        float64, shape (S,), on the model's device.
    """
    return torch.from_numpy(oracle.linear_losses(model.configs, data, split)).to(model.device)


@torch.no_grad()
def measure(
    model: VAE,
    split: Split,
    noise: Tensor,
    classes: int,
    variance: Tensor | None = None,
    linear_loss: Tensor | None = None,
) -> Metrics:
    """Return every metric of one split for each run of a stack.

    Args:
        model: the stack.
        split: images and labels, on the model's device.
        noise: standard normal noise of the posterior samples, shape (S, N, L).
        classes: number of classes.
        variance: decoder variance for `distortion`, fitted on validation data, shape (S,);
            None fits it here: the maximum-likelihood variance is the `mse` itself.
        linear_loss: `linear_losses` of the split; None leaves `gap_to_linear` out.

    Returns:
        `mse`, `rate`, `loss`, `distortion`, `neg_elbo`, `calibration_ratio`, `active_units`,
        `gap_to_linear`, `kl/i` of latent i and `mse_class/c` of class c.
    """
    error, kl, mean = _forward(model, split, noise)
    pixels = split.images.shape[1]
    beta = objective.betas(model.configs, pixels).to(error.device)
    mse = error.mean(1) / pixels
    if model.configs[0].latent == "deterministic":
        kl = torch.full_like(kl, torch.nan)
        loss = mse
    else:
        loss = objective.loss(error.mean(1), kl.sum(-1), beta, pixels)
    distortion = objective.distortion(mse, mse if variance is None else variance, pixels)
    rate = kl.sum(-1)
    metrics = {
        "loss": loss,
        "mse": mse,
        "rate": rate,
        "distortion": distortion,
        "neg_elbo": distortion + rate,
        "calibration_ratio": beta / 2 / mse,
        "active_units": active_units(mean),
    }
    if linear_loss is not None:
        metrics["gap_to_linear"] = gap_to_linear(loss, linear_loss)
    kl = torch.where(model.used_latents.squeeze(1), kl, torch.nan)
    metrics |= {f"kl/{i}": column for i, column in enumerate(kl.unbind(-1))}
    per_class = mse_per_class(error / pixels, split.labels, classes)
    return metrics | {f"mse_class/{c}": column for c, column in enumerate(per_class.unbind(-1))}


@torch.no_grad()
def evaluate(model: VAE | SingleVAE, data: Dataset) -> list[dict[str, float]]:
    """Return the final metrics of each run, with the noise that its seed fixes.

    The decoder variance is fitted on the validation split; the test split is only read.

    Returns:
        One dict per run: names prefixed `val/` and `test/`, and plain names for test. Metrics
        that the run does not have are absent.
    """
    stack = VAE([model]) if isinstance(model, SingleVAE) else model
    data = data.to(stack.device)
    val_noise = evaluation_noise(stack, "val", len(data.val))
    test_noise = evaluation_noise(stack, "test", len(data.test))
    val_linear, test_linear = (linear_losses(stack, data, s) for s in (data.val, data.test))
    val = measure(stack, data.val, val_noise, data.classes, None, val_linear)
    test = measure(stack, data.test, test_noise, data.classes, val["mse"], test_linear)
    named = {f"val/{k}": v for k, v in val.items()} | {f"test/{k}": v for k, v in test.items()}
    named |= test
    values = to_arrays(named)
    return [finite({k: float(v[s]) for k, v in values.items()}) for s in range(len(stack.configs))]


def evaluation_noise(stack: VAE, part: str, images: int) -> Tensor:
    """Return the posterior noise of a split's images, shape (S, N, L), the same at every epoch."""
    width = stack.latent_size
    drawn = streams.noise(stack.configs, f"evaluate/{part}", images, width=width)
    return drawn.to(stack.device, stack.dtype)


def to_arrays(metrics: Metrics) -> dict[str, np.ndarray]:
    """Copy metrics to the host in one transfer: name -> float64 array of shape (S,)."""
    table = torch.stack(list(metrics.values())).cpu().numpy()
    return dict(zip(metrics, table, strict=True))


def finite(values: dict[str, float]) -> dict[str, float]:
    """Leave out the metrics that a run does not have, or has no number for (NaN, inf)."""
    return {name: value for name, value in values.items() if np.isfinite(value)}


def _forward(model: VAE, split: Split, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return SSE (S, N), KL per latent averaged over images (S, L), posterior means (S, N, L)."""
    stack, dtype = len(model.configs), noise.dtype
    errors, kls, means = [], [], []
    for start in range(0, len(split), CHUNK):
        rows = slice(start, start + CHUNK)
        x = split.pixels(rows, dtype).expand(stack, -1, -1)
        posterior = model.encode(x)
        z = model.reparameterize(posterior, noise[:, rows])
        errors.append(objective.squared_error(x, model.decode(z)).double())
        kl = objective.kl_per_latent(posterior.mean, posterior.log_variance)
        kls.append(kl.double().sum(1))
        means.append(posterior.mean)
    kl_total = torch.stack(kls).sum(0)
    return torch.cat(errors, 1), kl_total / len(split), torch.cat(means, 1)
