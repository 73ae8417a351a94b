"""Held-out metrics: pure functions of a stack of runs and a split.

The forward pass and the sum over an image's pixels are computed in the model's type; sums over
latents and images, and all that follows from them, in float64.

Names and units are those of the vocabulary: `mse` pixel^2 per pixel, `rate` nats per image, and so
on. Metrics that a model does not have are NaN: a deterministic latent has no `rate`, and a run has
no `kl/i` beyond its own latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from harness import elbo, objective, streams
from harness.config import RunConfig
from harness.cores import crew
from harness.data.dataset import Dataset, Split
from harness.linear.vae import linear_losses
from harness.nn import constant
from harness.vae import VAE, Posterior, SingleVAE

CHUNK = 500
"""Images evaluated at once, at most; fixed, so that a run's sums do not depend on its stack."""

CHUNK_PIXELS = 2**24
"""Pixels evaluated at once, at most, so that large images take no more memory: 64 MiB a run."""

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


def losses_of_linear(
    configs: Sequence[RunConfig], data: Dataset, splits: Sequence[Split]
) -> Tensor:
    """Return `linear_losses` of some splits, float64, shape (splits, S), on their device."""
    losses = np.stack([linear_losses(configs, data, split) for split in splits])
    return torch.from_numpy(losses).to(splits[0].images.device)


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
        classes: number of classes; without any there is no `mse_class/c`.
        variance: decoder variance for `distortion`, fitted on validation data, shape (S,);
            None fits it here: the maximum-likelihood variance is the `mse` itself.
        linear_loss: of the exact linear model, shape (S,); None leaves `gap_to_linear` out.

    Returns:
        `mse`, `rate`, `loss`, `distortion`, `neg_elbo`, `calibration_ratio`, `active_units`,
        `learned_variance`, `gap_to_linear`, `kl/i` of latent i and `mse_class/c` of class c.
    """
    seen = _forward(model, split, noise)
    pixels = split.images.shape[1]
    error, cross_entropy = seen.error.mean(1), _mean(seen.cross_entropy)
    mse = error / pixels
    fitted = mse if variance is None else variance
    beta = objective.betas(model.configs, pixels, error.device)
    kl = torch.full_like(seen.mean[:, 0], torch.nan).double() if seen.kl is None else seen.kl
    rate = kl.sum(-1)
    distortion = _distortion(model, mse, fitted, cross_entropy, pixels)
    metrics = {
        "loss": elbo.loss(model, error, cross_entropy, seen.kl, beta, pixels),
        "mse": mse,
        "rate": rate,
        "distortion": distortion,
        "neg_elbo": distortion + rate,
        "calibration_ratio": _decoder_variance(model, beta, fitted) / mse,
        "active_units": active_units(seen.mean),
    }
    if model.log_decoder_variance is not None:
        metrics["learned_variance"] = model.decoder_variances(torch.full_like(mse, torch.nan))
    if linear_loss is not None:
        metrics["gap_to_linear"] = gap_to_linear(metrics["loss"], linear_loss)
    by_latent = torch.where(model.used_latents.squeeze(1), kl, torch.nan)
    metrics |= _numbered("kl", by_latent)
    if not classes:
        return metrics
    return metrics | _numbered(
        "mse_class", mse_per_class(seen.error / pixels, split.labels, classes)
    )


def _numbered(name: str, columns: Tensor) -> Metrics:
    """Return the columns of (S, n) as metrics NAME/0 to NAME/n-1."""
    return {f"{name}/{i}": column for i, column in enumerate(columns.unbind(-1))}


def evaluate(model: VAE | SingleVAE, data: Dataset) -> list[dict[str, float]]:
    """Return the final metrics of each run, with the noise that its seed fixes.

    The decoder variance is fitted on the validation split; the test split is only read.

    Returns:
        One dict per run: names prefixed `val/` and `test/`, and plain names for test. Metrics
        that the run does not have are absent.
    """
    stack, data = prepared(model, data)
    known = losses_of_linear(stack.configs, data, (data.val, data.test))
    parts = apart(stack)

    def finals(index: int) -> list[dict[str, float]]:
        part, rows = parts[index]
        return _finals(part, known[:, list(rows)], data)

    with crew(finals, len(parts), stack.device) as cores:
        return [metrics for own in cores.map(range(len(parts))) for metrics in own]


def apart(stack: VAE) -> list[tuple[VAE, Sequence[int]]]:
    """Return the stacks that a stack is computed in, and their rows: on a CPU a run each.

    There a run then gives the same bits whatever its company.
    """
    count = len(stack.configs)
    if stack.device.type != "cpu" or (count == 1 and not stack.padded):
        return [(stack, range(count))]
    return [(VAE([stack.run(row)]), [row]) for row in range(count)]


@torch.no_grad()
def _finals(stack: VAE, linear: Tensor, data: Dataset) -> list[dict[str, float]]:
    noise = [evaluation_noise(stack, part, len(getattr(data, part))) for part in ("val", "test")]
    val = measure(stack, data.val, noise[0], data.classes, None, linear[0])
    test = measure(stack, data.test, noise[1], data.classes, val["mse"], linear[1])
    named = {f"val/{k}": v for k, v in val.items()} | {f"test/{k}": v for k, v in test.items()}
    values = to_arrays(named | test)
    return [of_run(values, run) for run in range(len(stack.configs))]


def prepared(model: VAE | SingleVAE, data: Dataset) -> tuple[VAE, Dataset]:
    """Return a model as a stack, and its dataset as its runs are measured on it, on its device."""
    stack = VAE([model]) if isinstance(model, SingleVAE) else model
    return stack, data.to(stack.device).binarized(stack.configs[0].binarization)


def chunks(images: int, pixels: int) -> Iterator[slice]:
    """Yield the rows of the images, of so many pixels each, that are evaluated at once."""
    size = max(1, min(CHUNK, CHUNK_PIXELS // pixels))
    for start in range(0, images, size):
        yield slice(start, min(start + size, images))


def posteriors(model: VAE, split: Split) -> Posterior:
    """Return the posteriors of a split, shape (S, N, L), on the model's device."""
    parts = []
    for rows in chunks(*split.images.shape):
        x = split.pixels(rows, model.dtype).to(model.device)
        parts.append(model.encode(x.expand(len(model.configs), -1, -1)))
    means, log_variances = zip(*((p.mean, p.log_variance) for p in parts), strict=True)
    return Posterior(torch.cat(means, 1), torch.cat(log_variances, 1))


def evaluation_noise(stack: VAE, part: str, images: int) -> Tensor:
    """Return the posterior noise of a split's images, shape (S, N, L), the same at every epoch."""
    width = stack.latent_size
    drawn = streams.noise(stack.configs, f"evaluate/{part}", images, width=width)
    return drawn.to(stack.device, stack.dtype)


def to_arrays(metrics: Metrics) -> dict[str, np.ndarray]:
    """Copy metrics to the host in one transfer: name -> float64 array of shape (S,)."""
    table = torch.stack(list(metrics.values())).cpu().numpy()
    return dict(zip(metrics, table, strict=True))


def of_run(metrics: Mapping[str, np.ndarray | Tensor], run: int) -> dict[str, float]:
    """Return the metrics of one run of a stack that it has a number for."""
    return finite({name: float(values[run]) for name, values in metrics.items()})


def finite(values: dict[str, float]) -> dict[str, float]:
    """Leave out the metrics that a run does not have, or has no number for (NaN, inf)."""
    return {name: value for name, value in values.items() if np.isfinite(value)}


def _distortion(
    model: VAE, mse: Tensor, fitted: Tensor, cross_entropy: Tensor | None, pixels: int
) -> Tensor:
    """Return -E_q log p(x|z), nats per image, (S,); NaN for grey pixels under cross-entropy."""
    if cross_entropy is None:
        return objective.distortion(mse, fitted, pixels)
    return cross_entropy if model.configs[0].has_likelihood else torch.full_like(mse, torch.nan)


def _decoder_variance(model: VAE, beta: Tensor, fitted: Tensor) -> Tensor:
    """Return the decoder variance for which each run's loss is an ELBO, (S,).

    beta / 2 where the KL weight sets it, else beta times the run's own variance; NaN for Bernoulli.
    """
    if model.configs[0].likelihood != "gaussian":
        return torch.full_like(fitted, torch.nan)
    which = tuple(c.sigma == "fixed" for c in model.configs)
    fixed = constant(which, torch.bool, fitted.device)
    return torch.where(fixed, beta / 2, beta * model.decoder_variances(fitted))


def _mean(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.mean(1)


def _forward(model: VAE, split: Split, noise: Tensor) -> elbo.Terms:
    """Return the terms of a whole split in float64; of the KL, its mean over images (S, L)."""
    stack, dtype = len(model.configs), noise.dtype
    parts: list[elbo.Terms] = []
    for rows in chunks(*split.images.shape):
        x = split.pixels(rows, dtype).expand(stack, -1, -1)
        part = elbo.terms(model, x, noise[:, rows])
        kl = None if part.kl is None else part.kl.double().sum(1)
        parts.append(part._replace(kl=kl))
    error, cross_entropy, kls, mean = zip(*parts, strict=True)
    return elbo.Terms(
        torch.cat(error, 1).double(),
        None if cross_entropy[0] is None else torch.cat(cross_entropy, 1).double(),
        None if kls[0] is None else torch.stack(kls).sum(0) / len(split),
        torch.cat(mean, 1),
    )
