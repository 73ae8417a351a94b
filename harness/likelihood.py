"""Log-likelihood of held-out images by importance sampling from the posterior.

The bound of k samples is log p(x) >= log 1/k sum_j w_j with w_j = p(x|z_j) p(z_j) / q(z_j|x) and
z_j ~ q(z|x): the ELBO at k = 1, never lower in expectation with more samples, log p(x) in the limit
(Burda et al. 2015, 1509.00519). All sums are streamed, so memory does not grow with k.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness import objective, streams
from harness.data.dataset import Dataset, Split
from harness.evaluate import (
    Metrics,
    evaluation_noise,
    measure,
    of_run,
    posteriors,
    prepared,
    to_arrays,
)
from harness.vae import VAE, Posterior

SAMPLES = (1, 8, 64, 512)
"""Numbers of samples whose bounds are reported; the largest gives `neg_log_likelihood`."""

LIKELIHOOD_IMAGES = 1000
"""Test images that are estimated, at most: each costs as many decodings as there are samples.

`neg_log_likelihood` is thus compared with its own `/k1`, the ELBO of the same images; `neg_elbo` is
that of the whole split.
"""

OUTPUT_BYTES = {"cpu": 2**22, "cuda": 2**27}
"""Most bytes of decoder output at once; more images or samples go in turns.

On a CPU a block stays in the cache: twice as fast as 2**27 on MNIST. On a GPU not measured.
"""


@dataclass(frozen=True)
class ImportanceBounds:
    """Lower bounds of log p(x), image by image.

    Attributes:
        bounds: number of samples k -> log 1/k sum_{j <= k} w_j, nats, float64, shape (S, N).
        effective_samples: (sum w)^2 / sum w^2 over all samples, float64, shape (S, N); k if all
            weights are equal (q is the exact posterior), near 1 if one sample has all the weight
            and the bound is loose.
    """

    bounds: dict[int, Tensor]
    effective_samples: Tensor


@torch.no_grad()
def importance_bounds(
    model: VAE, split: Split, variance: Tensor, samples: Sequence[int] = SAMPLES
) -> ImportanceBounds:
    """Bound log p(x) of each image with the first k of one set of posterior samples, for every k.

    Args:
        model: a stack of stochastic runs.
        split: images on the model's device, binary ones for a Bernoulli decoder.
        variance: of the Gaussian decoder, pixel^2, shape (S,); a Bernoulli decoder has none.
        samples: the numbers k.

    Returns:
        Bounds and effective sample size; sample j of an image has the noise that the run's seed
        fixes, whatever the split's length and the other runs.
    """
    shape = (len(model.configs), len(split))
    total = torch.full(shape, -torch.inf, dtype=torch.float64, device=model.device)
    squares = total
    bounds = {}
    for k, log_weight in enumerate(_log_weights(model, split, variance, max(samples)), 1):
        total = torch.logaddexp(total, log_weight)
        squares = torch.logaddexp(squares, 2 * log_weight)
        if k in samples:
            bounds[k] = total - math.log(k)
    return ImportanceBounds(bounds, (2 * total - squares).exp())


def likelihood_metrics(
    model: VAE, data: Dataset, samples: Sequence[int] = SAMPLES
) -> list[dict[str, float]]:
    """Estimate the negative log-likelihood of test images for each run of a stack.

    On the first 1,000 test images (`LIKELIHOOD_IMAGES`), binary where the run's `binarization` says
    so; the variance of a Gaussian decoder is fitted on validation data, as for `distortion`.

    Returns:
        One dict per run: `neg_log_likelihood/kK`, minus the bound of K samples, mean over images,
        nats / image; `neg_log_likelihood`, that of the most samples; `neg_log_likelihood_se`, its
        standard error over images, which says nothing of the bound's slack; `effective_samples` of
        the most samples, mean over images. Empty where there is no likelihood: a deterministic
        latent, cross-entropy of grey pixels.
    """
    if model.configs[0].latent == "deterministic" or not model.configs[0].has_likelihood:
        return [{} for _ in model.configs]
    model, data = prepared(model, data)
    noise = evaluation_noise(model, "val", len(data.val))
    variance = measure(model, data.val, noise, data.classes)["mse"]
    found = importance_bounds(model, data.test.head(LIKELIHOOD_IMAGES), variance, samples)
    values = to_arrays(_means(found))
    return [of_run(values, run) for run in range(len(model.configs))]


def _means(found: ImportanceBounds) -> Metrics:
    tightest = -found.bounds[max(found.bounds)]
    ladder = {f"neg_log_likelihood/k{k}": -bound.mean(1) for k, bound in found.bounds.items()}
    return ladder | {
        "neg_log_likelihood": tightest.mean(1),
        "neg_log_likelihood_se": tightest.std(1) / math.sqrt(tightest.shape[1]),
        "effective_samples": found.effective_samples.mean(1),
    }


def _log_weights(model: VAE, split: Split, variance: Tensor, count: int) -> Iterator[Tensor]:
    """Yield log w_j of each image, float64, shape (S, N), for j = 1 ... count."""
    found = posteriors(model, split)  # with an axis for samples
    posterior = Posterior(found.mean.unsqueeze(1), found.log_variance.unsqueeze(1))
    row = len(model.configs) * split.images.shape[1] * model.dtype.itemsize
    rows = max(1, OUTPUT_BYTES[model.device.type] // row)
    for js in torch.arange(1, count + 1).split(max(1, rows // len(split))):
        eps = torch.stack([_noise(model, len(split), j) for j in js.tolist()], 1)
        parts = [
            _block(model, split, posterior, eps, variance, slice(start, start + rows))
            for start in range(0, len(split), rows)
        ]
        yield from torch.cat(parts, -1).unbind(1)


def _noise(model: VAE, images: int, j: int) -> Tensor:
    """Return the noise of every image's sample j, shape (S, N, L)."""
    drawn = streams.noise(model.configs, "likelihood", images, j, model.latent_size)
    return drawn.to(model.device, model.dtype)


def _block(
    model: VAE, split: Split, posterior: Posterior, eps: Tensor, variance: Tensor, rows: slice
) -> Tensor:
    """Return log w of some images with noise eps (S, J, N, L), float64, shape (S, J, n)."""
    eps = eps[:, :, rows]
    q = Posterior(posterior.mean[:, :, rows], posterior.log_variance[:, :, rows])
    z = q.sample(eps)
    log_p = _log_p_image(model, split.pixels(rows, model.dtype), z, variance)
    return log_p + _log_prior_over_posterior(z, eps, q.log_variance)


def _log_p_image(model: VAE, x: Tensor, z: Tensor, variance: Tensor) -> Tensor:
    """Return log p(x|z), nats, float64.

    Gaussian decoder: -(D ln(2 pi variance) + SSE / variance) / 2; Bernoulli: -cross-entropy.

    Args:
        model: the stack.
        x: pixels, shape (n, D).
        z: latents, shape (S, J, n, L).
        variance: of the Gaussian decoder, shape (S,).

    Returns:
        Shape (S, J, n).
    """
    each = z.shape[1:3]
    if model.configs[0].likelihood == "bernoulli":
        logits = model.decoder_output(z.flatten(1, 2)).unflatten(1, each)
        return -objective.cross_entropy(x, logits).double()
    mean = model.decode(z.flatten(1, 2)).unflatten(1, each)
    error, variance = objective.squared_error(x, mean).double(), variance.view(-1, 1, 1)
    return -(x.shape[-1] * (2 * math.pi * variance).log() + error / variance) / 2


def _log_prior_over_posterior(z: Tensor, eps: Tensor, log_variance: Tensor) -> Tensor:
    """Return ln N(z; 0, I) - ln q(z|x) at z = mean + sigma eps, float64, without the axis L.

    sum_i (eps_i^2 + log_variance_i - z_i^2) / 2; a padded latent has 0 in all three.
    """
    log_variance = log_variance.double()
    return (eps.double().square() + log_variance - z.double().square()).sum(-1) / 2
