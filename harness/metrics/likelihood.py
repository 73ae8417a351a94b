"""Log-likelihood of held-out images by importance sampling, and posteriors fitted to each image.

The bound of k samples is log p(x) >= log 1/k sum_j w_j with w_j = p(x|z_j) p(z_j) / r(z_j|x) and
z_j from a proposal r(z|x): the ELBO at k = 1, log p(x) in the limit (Burda et al. 2015,
1509.00519). Sums are streamed, so memory does not grow with k.

q(z|x) itself misses where p(z|x) has its mass: it was trained for the decoder variance beta / 2,
and for training images. So a few steps move its means to the modes of p(z|x) (`centred`), and its
variance becomes that of a larger decoder variance (`inflated`), chosen on validation images.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness import streams
from harness.config import RunConfig
from harness.data.dataset import Dataset, Split
from harness.metrics import evaluate
from harness.metrics.evaluate import pixels, posteriors
from harness.models.stack import kernels
from harness.models.vae import VAE
from harness.objective import Posterior, kl_per_latent
from harness.processes import one_thread

SAMPLES = (1, 8, 64, 512)  # whose bounds are reported; the last gives `neg_log_likelihood`
LIKELIHOOD_IMAGES = 1000  # of the test split, at most: each costs a decoding a sample

# Factors of the decoder variance among which validation images choose: an eighth as many images
# as are scored with 32 samples each, 4 % of the decodings.
INFLATIONS = (1.0, 2.0, 4.0, 8.0, 16.0)
CHOICE_SHARE, CHOICE_SAMPLES = 8, 32
AS_GOOD = 0.01  # nats by which a larger factor, or another mean, must be better

# Below so many effective samples, mean over images, bounds of models of digits and MNIST were .4 to
# 50 nats loose, up to six times `_slack`; with more, 1.1 at most, within a factor of about two.
FEW_SAMPLES = 10
BLOCKS = 16  # of samples, whose bounds the slack is extrapolated from

# Steps of Adam to a mode and to a posterior, with pairs of antithetic samples.
MODE_STEPS, MODE_RATE = 20, 0.2
STEPS, RATE, PAIRS = 200, 0.05, 2
FRESH_SAMPLES = 64  # of each image, on which a refitted posterior is measured

# Most bytes of decoder output at once, and of those that are compared with images at once. On a CPU
# they stay in the cache: twice as fast as 2**27 on MNIST; on a GPU not measured.
OUTPUT_BYTES = {"cpu": 2**22, "cuda": 2**27}
LAYER = 256  # units that the decoder of the smallest images is taken to have in a layer
CACHED_BYTES = {"cpu": 2**19, "cuda": 2**27}


class ImportanceBounds(NamedTuple):
    """Lower bounds of log p(x), image by image: float64, shape (N,)."""

    bounds: dict[int, Tensor]  # number of samples k -> log 1/k sum_{j <= k} w_j, nats
    effective_samples: Tensor  # (sum w)^2 / sum w^2: near 1 the bound is loose
    slack: Tensor  # nats, shape (): see `_slack`


def inflated(q: Posterior, factor: float) -> Posterior:
    """Return a posterior as of a decoder whose variance is larger by a factor a, in its variance.

    1 / s'^2 = 1 + (1 / s^2 - 1) / a: near a s^2 for a narrow latent, and 1 for a collapsed one.
    """
    if factor == 1:
        return q
    precision = 1 + torch.expm1(-q.log_variance.double()) / factor
    return q._replace(log_variance=-precision.log().to(q.log_variance.dtype))


@torch.no_grad()
def importance_bounds(
    config: RunConfig,
    model: VAE,
    split: Split,
    variance: Tensor,
    samples: Sequence[int] = SAMPLES,
    proposal: Posterior | None = None,
    purpose: str = "likelihood",
) -> ImportanceBounds:
    """Bound log p(x) of each image with the first k of one set of samples, for every k.

    The proposal is q(z|x) by default. The run's seed and the purpose fix the noise of sample j of
    an image. The variance is that of a Gaussian decoder, pixel^2, shape (), or another's scale; a
    Bernoulli decoder has none.
    """
    shape, count = (BLOCKS, len(split)), max(samples)
    blocks = torch.full(shape, -torch.inf, dtype=torch.float64, device=model.device)
    sizes = torch.zeros(BLOCKS, 1, dtype=torch.float64, device=model.device)
    total = squares = blocks[0].clone()
    bounds = {}
    proposal = posteriors(model, split) if proposal is None else proposal
    stream = (config.seed, purpose, len(split), config.latent_size)
    weights = _log_weights(model, split, variance, proposal, count, stream)
    for k, log_weight in enumerate(weights, 1):
        total = torch.logaddexp(total, log_weight)
        squares = torch.logaddexp(squares, 2 * log_weight)
        block = (k - 1) * BLOCKS // count
        blocks[block] = torch.logaddexp(blocks[block], log_weight)
        sizes[block] += 1
        if k in samples:
            bounds[k] = total - math.log(k)
    return ImportanceBounds(bounds, (2 * total - squares).exp(), _slack(blocks, sizes))


def _slack(blocks: Tensor, sizes: Tensor) -> Tensor:
    # How far the mean bound of all samples is below log p(x), from those of all, of fourths and of
    # sixteenths: what fourfold samples gain is taken to shrink by the same ratio for ever. In the
    # limit of many samples that is 1/4. Sums of weights (16, N) and their number (16, 1).
    sixteenths, fourths, whole = (
        (weights.logsumexp(1) - count.sum(1).log()).mean()
        for parts in (BLOCKS, 4, 1)
        for weights, count in [(b.unflatten(0, (parts, -1)) for b in (blocks, sizes))]
    )
    gain, before = whole - fourths, fourths - sixteenths
    ratio = torch.where(before > 0, gain / before, 0.25).clamp(0.25, 0.9)
    return (gain * ratio / (1 - ratio)).clamp(min=0)


def likelihood_metrics(
    config: RunConfig, model: VAE, data: Dataset, samples: Sequence[int] = SAMPLES
) -> dict[str, float]:
    """Estimate the negative log-likelihood of the first 1,000 test images (docs/metrics.md).

    The decoder's variance, or scale, is fitted on validation data. No metrics are returned where
    there is no likelihood: for a deterministic latent, and for cross-entropy of grey pixels.
    """
    if config.latent == "deterministic" or not config.has_likelihood:
        return {}
    variance, split = _fitted(config, model, data), data.test.head(LIKELIHOOD_IMAGES)
    factor = _chosen(config, model, data.val.head(math.ceil(len(split) / CHOICE_SHARE)), variance)
    proposal = inflated(centred(model, split, variance), factor)
    found = importance_bounds(config, model, split, variance, samples, proposal)
    tightest = -found.bounds[max(found.bounds)]
    metrics = {f"neg_log_likelihood/k{k}": -bound.mean() for k, bound in found.bounds.items()}
    metrics["neg_log_likelihood"] = tightest.mean()
    metrics["neg_log_likelihood_se"] = tightest.std() / math.sqrt(len(tightest))
    metrics["neg_log_likelihood_slack"] = found.slack
    metrics["effective_samples"] = found.effective_samples.mean()
    metrics["proposal_inflation"] = torch.full_like(found.slack, factor)
    return evaluate.finite(evaluate.to_floats(metrics))


def _fitted(config: RunConfig, model: VAE, data: Dataset) -> Tensor:
    given = evaluate.conditions(config, model, "val", len(data.val))
    return evaluate.fitted_scale(evaluate.measure(config, model, data.val, 0, **given))


def _chosen(config: RunConfig, model: VAE, split: Split, variance: Tensor) -> float:
    # Noise of another purpose than that of the estimate, which so stays a lower bound.
    q, count = centred(model, split, variance), CHOICE_SAMPLES
    given = (config, model, split, variance, (count,))
    found = [
        float(importance_bounds(*given, inflated(q, a), "likelihood/choice").bounds[count].mean())
        for a in INFLATIONS
    ]
    good = [a for a, b in zip(INFLATIONS, found, strict=True) if b >= max(found) - AS_GOOD]
    return good[0] if good else math.nan


def _log_weights(
    model: VAE,
    split: Split,
    variance: Tensor,
    proposal: Posterior,
    count: int,
    stream: tuple[int, str, int, int],
) -> Iterator[Tensor]:
    row = max(split.images.shape[1], LAYER) * model.dtype.itemsize
    rows = max(1, OUTPUT_BYTES[model.device.type] // row)

    @lru_cache(maxsize=1)  # kept where one block holds all images
    def block_of(start: int) -> Tensor:
        return pixels(model, split, slice(start, start + rows))

    for js in torch.arange(1, count + 1).split(max(1, rows // len(split))):
        drawn = torch.stack([streams.noise(*stream, j) for j in js.tolist()])
        drawn = drawn.to(model.device, model.dtype)
        blocks = []
        for start in range(0, len(split), rows):
            block = slice(start, start + rows)
            q, eps = Posterior(*(values[block] for values in proposal)), drawn[:, block]
            z = q.sample(eps)
            log_p = _log_density(model, block_of(start), z, variance)
            # ln p(z) - ln q(z|x) = sum_i (eps_i^2 + log_variance_i - z_i^2) / 2
            prior = eps.double().square() + q.log_variance.double() - z.double().square()
            blocks.append(log_p + prior.sum(-1) / 2)
        yield from torch.cat(blocks, -1).unbind()


def _log_density(model: VAE, x: Tensor, z: Tensor, variance: Tensor) -> Tensor:
    # ln p(x|z) of images (B, ...) and latents (S, B, L): float64, shape (S, B).
    output = model.decoder(z.flatten(0, 1))
    x = x.expand(len(z), *x.shape).flatten(0, 1)
    rows = max(1, CACHED_BYTES[z.device.type] // (model.pixels * z.itemsize))
    parts = zip(x.split(rows), output.split(rows), strict=True)
    error = torch.cat([model.kind.error(seen, model.decoded(part)) for seen, part in parts])
    error = error.unflatten(0, z.shape[:2])
    return -torch.as_tensor(model.kind.neg_log_density(error.double(), variance, model.pixels))


def _neg_elbo(model: VAE, x: Tensor, q: Posterior, eps: Tensor, variance: Tensor) -> Tensor:
    # Of images (B, ...), with noise (S, B, L): shape (B,).
    distortion = -_log_density(model, x, q.sample(eps), variance).mean(0)
    return distortion + kl_per_latent(*(part.double() for part in q)).sum(-1)


def centred(model: VAE, split: Split, variance: Tensor) -> Posterior:
    """Return the posteriors of a split (N, L) with their means moved to the modes of p(z|x).

    By 20 steps of Adam from the encoder's means, without noise, at a decoder variance or scale,
    shape (). Means that are not improved by it stay, and so do variances.
    """
    start, found = posteriors(model, split), []
    for rows in _few_rows(split, 1):
        x, before = pixels(model, split, rows), start.mean[rows]

        def energy(_step: int, z: Tensor, x: Tensor = x) -> Tensor:
            return z.square().sum(-1) / 2 - _log_density(model, x, z.unsqueeze(0), variance)[0]

        (after,) = _minimized(energy, [before], MODE_STEPS, MODE_RATE)
        with torch.no_grad():
            is_better = energy(0, before) - energy(0, after) > AS_GOOD
        found.append(torch.where(is_better.unsqueeze(1), after, before))
    return start._replace(mean=torch.cat(found))


@one_thread()
@kernels()
def refit_posterior(model: VAE, split: Split, variance: Tensor, seed: int = 0) -> Posterior:
    """Optimise the posterior of each image for a fixed decoder: the best of a diagonal Gaussian.

    Means and log-variances minimise the negative ELBO at a decoder variance or scale, shape (), by
    200 steps of Adam from those of the encoder, with two antithetic pairs of samples each. The seed
    fixes the noise, and no image changes another's result.

    Returns:
        The posteriors of the split, shape (N, L). What they gain is measured on fresh noise, as
        `amortization_gap` does, for they are fitted to theirs.
    """
    model, count = evaluate.frozen(model), len(split)
    start, found = posteriors(model, split), []
    for rows in _few_rows(split, 2 * PAIRS):
        x = pixels(model, split, rows)

        def loss(step: int, *values: Tensor, x: Tensor = x, rows: slice = rows) -> Tensor:
            eps = _noise(model, seed, "refit", count, PAIRS, rows, step)
            return _neg_elbo(model, x, Posterior(*values), torch.cat([eps, -eps]), variance)

        found.append(_minimized(loss, [part[rows] for part in start], STEPS, RATE))
    return Posterior(*map(torch.cat, zip(*found, strict=True)))


@torch.enable_grad()
def _minimized(
    loss: Callable[..., Tensor], values: Sequence[Tensor], steps: int, rate: float
) -> list[Tensor]:
    # By Adam at a rate that falls along a cosine, of a loss of each image; the kernel is that of
    # `harness.training.optimizer`.
    found = [value.clone() for value in values]
    first, second = ([torch.zeros_like(value) for value in found] for _ in range(2))
    counts = [torch.zeros((), device=value.device) for value in found]
    same: dict[str, Any] = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0}
    same |= {"amsgrad": False, "maximize": False}
    for step in range(steps):
        leaves = [value.detach().requires_grad_() for value in found]
        gradients = torch.autograd.grad(loss(step, *leaves).sum(), leaves)
        torch._foreach_add_(counts, 1)
        lr = rate * (1 + math.cos(math.pi * step / steps)) / 2
        torch._fused_adam_(found, list(gradients), first, second, [], counts, lr=lr, **same)
    return found


def _few_rows(split: Split, samples: int) -> Iterator[slice]:
    # So few that the decoder's layers fit into memory, kept for the gradient, of so many samples.
    return evaluate.chunks(len(split), 8 * samples * split.images.shape[1])


def _noise(
    model: VAE, seed: int, purpose: str, images: int, samples: int, rows: slice, step: int = 0
) -> Tensor:
    # An image's numbers are consecutive, and so do not depend on how many images there are.
    drawn = streams.noise(seed, purpose, images, samples * model.latent_size, step)[rows]
    drawn = drawn.unflatten(1, (samples, model.latent_size)).movedim(1, 0)
    return drawn.to(model.device, model.dtype)


@one_thread()
@kernels()
@torch.no_grad()
def amortization_gap(
    config: RunConfig, model: VAE, data: Dataset, images: int = LIKELIHOOD_IMAGES
) -> dict[str, float]:
    """Return what the encoder costs in `neg_elbo`: how much lower it is with `refit_posterior`.

    Of the first test images, nats / image, at the decoder variance that is fitted on validation
    data, with the same 64 fresh samples of each image: `amortization_gap`, its standard error over
    images, and `neg_elbo_refitted`. No metrics are returned where there is no `neg_elbo`.
    """
    if config.latent == "deterministic" or not config.has_likelihood:
        return {}
    model, data = evaluate.frozen(model), data.to(model.device).drawn(config.drawing)
    variance, split = _fitted(config, model, data), data.test.head(images)
    both = posteriors(model, split), refit_posterior(model, split, variance, config.seed)
    parts = []
    for rows in _few_rows(split, FRESH_SAMPLES):
        x = pixels(model, split, rows)
        eps = _noise(model, config.seed, "refit/fresh", len(split), FRESH_SAMPLES, rows)
        each = [Posterior(*(part[rows] for part in q)) for q in both]
        parts.append(torch.stack([_neg_elbo(model, x, q, eps, variance) for q in each]))
    encoder, refitted = torch.cat(parts, -1)
    gap = encoder - refitted
    metrics = {"amortization_gap": gap.mean(), "neg_elbo_refitted": refitted.mean()}
    metrics["amortization_gap_se"] = gap.std() / math.sqrt(len(gap))
    return evaluate.finite(evaluate.to_floats(metrics))
