"""Log-likelihood of held-out images by importance sampling from the posterior.

The bound of k samples is log p(x) >= log 1/k sum_j w_j with w_j = p(x|z_j) p(z_j) / q(z_j|x) and
z_j ~ q(z|x): the ELBO at k = 1, log p(x) in the limit (Burda et al. 2015, 1509.00519). Sums are
streamed, so memory does not grow with k.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from harness import streams
from harness.config import RunConfig
from harness.data.dataset import Dataset, Split
from harness.metrics import evaluate
from harness.metrics.evaluate import pixels, posteriors
from harness.models.vae import VAE
from harness.objective import Posterior

SAMPLES = (1, 8, 64, 512)  # whose bounds are reported; the last gives `neg_log_likelihood`
LIKELIHOOD_IMAGES = 1000  # of the test split, at most: each costs a decoding a sample

# Most bytes of decoder output at once. On a CPU a block stays in the cache: twice as fast as 2**27
# on MNIST; on a GPU not measured.
OUTPUT_BYTES = {"cpu": 2**22, "cuda": 2**27}


class ImportanceBounds(NamedTuple):
    """Lower bounds of log p(x), image by image: float64, shape (N,)."""

    bounds: dict[int, Tensor]  # number of samples k -> log 1/k sum_{j <= k} w_j, nats
    effective_samples: Tensor  # (sum w)^2 / sum w^2: near 1 the bound is loose


@torch.no_grad()
def importance_bounds(
    config: RunConfig, model: VAE, split: Split, variance: Tensor, samples: Sequence[int] = SAMPLES
) -> ImportanceBounds:
    """Bound log p(x) of each image with the first k of one set of posterior samples, for every k.

    The run's seed fixes the noise of sample j of an image. The variance is that of a Gaussian
    decoder, pixel^2, shape (), or another's scale; a Bernoulli decoder has none.
    """
    total = torch.full((len(split),), -torch.inf, dtype=torch.float64, device=model.device)
    squares = total
    bounds = {}
    weights = _log_weights(config, model, split, variance, max(samples))
    for k, log_weight in enumerate(weights, 1):
        total = torch.logaddexp(total, log_weight)
        squares = torch.logaddexp(squares, 2 * log_weight)
        if k in samples:
            bounds[k] = total - math.log(k)
    return ImportanceBounds(bounds, (2 * total - squares).exp())


def likelihood_metrics(
    config: RunConfig, model: VAE, data: Dataset, samples: Sequence[int] = SAMPLES
) -> dict[str, float]:
    """Estimate the negative log-likelihood of the first 1,000 test images (docs/metrics.md).

    The decoder's variance, or scale, is fitted on validation data. No metrics are returned where
    there is no likelihood: for a deterministic latent, and for cross-entropy of grey pixels.
    """
    if config.latent == "deterministic" or not config.has_likelihood:
        return {}
    given = evaluate.conditions(config, model, "val", len(data.val))
    variance = evaluate.fitted_scale(evaluate.measure(config, model, data.val, 0, **given))
    split = data.test.head(LIKELIHOOD_IMAGES)
    found = importance_bounds(config, model, split, variance, samples)
    tightest = -found.bounds[max(found.bounds)]
    metrics = {f"neg_log_likelihood/k{k}": -bound.mean() for k, bound in found.bounds.items()}
    metrics["neg_log_likelihood"] = tightest.mean()
    metrics["neg_log_likelihood_se"] = tightest.std() / math.sqrt(len(tightest))
    metrics["effective_samples"] = found.effective_samples.mean()
    return evaluate.finite(evaluate.to_floats(metrics))


def _log_weights(
    config: RunConfig, model: VAE, split: Split, variance: Tensor, count: int
) -> Iterator[Tensor]:
    posterior, each = posteriors(model, split), (config.seed, "likelihood", len(split))
    row = split.images.shape[1] * model.dtype.itemsize
    rows = max(1, OUTPUT_BYTES[model.device.type] // row)
    for js in torch.arange(1, count + 1).split(max(1, rows // len(split))):
        drawn = torch.stack([streams.noise(*each, config.latent_size, j) for j in js.tolist()])
        drawn = drawn.to(model.device, model.dtype)
        blocks = []
        for start in range(0, len(split), rows):
            block = slice(start, start + rows)
            q, eps = Posterior(*(values[block] for values in posterior)), drawn[:, block]
            z = q.sample(eps)
            decoded = model.decoded(model.decoder(z.flatten(0, 1))).unflatten(0, z.shape[:2])
            error = torch.vmap(model.kind.error, (None, 0))(pixels(model, split, block), decoded)
            log_p = -model.kind.neg_log_density(error.double(), variance, model.pixels)
            # ln p(z) - ln q(z|x) = sum_i (eps_i^2 + log_variance_i - z_i^2) / 2
            prior = eps.double().square() + q.log_variance.double() - z.double().square()
            blocks.append(log_p + prior.sum(-1) / 2)
        yield from torch.cat(blocks, -1).unbind()
