"""Information in the latents, and their distance from the prior, in nats.

rate = I(x; z) + KL(q(z) || p(z)), q(z) = mean_x q(z|x) being the aggregate posterior (Hoffman &
Johnson 2016). Neither part has a closed form; the functions bound both, from means and
log-variances (N, L).
"""

import math

import torch
from torch import Tensor

from harness import objective, streams
from harness.config import RunConfig
from harness.data.dataset import Split
from harness.metrics.evaluate import Metrics, posteriors
from harness.models.vae import VAE
from harness.objective import Posterior

SAMPLED_IMAGES = 2_000  # of `mutual_information_lower`, at most: it compares all pairs


def aggregate_gap(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the KL from N(0, I) of the Gaussian with the moments of the aggregate posterior q(z).

    gap = (tr C + m'm - L - ln det C) / 2, where m is the mean of the posterior means and C their
    covariance plus the mean posterior variance. It is a lower bound of KL(q(z) || p(z)), equal to
    it if q(z) is Gaussian. Nats, float64, shape (), never negative beyond rounding.
    """
    mean, variance = mean.double(), log_variance.double().exp().mean(0)
    centre = mean.mean(0)
    # A batch of one product: that of two matrices sums in another order where there are 1 or 2
    # latents, and numbers recorded before would change in their last bits.
    centred = (mean - centre).unsqueeze(0)
    covariance = (centred.mT @ centred).squeeze(0) / len(mean) + torch.diag(variance)
    spread = covariance.diagonal().sum() - torch.linalg.slogdet(covariance)[1]
    return (spread + centre.square().sum() - mean.shape[1]) / 2


def mutual_information_lower(
    mean: Tensor, log_variance: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a sampled lower bound of the latents' information on an image, and its standard error.

    I >= E[t], t = log q(z|x) - log (1/N) sum_n q(z|x_n), z drawn with noise eps (N, L) from q(z|x),
    x among the N images. It saturates at ln N, 7.6 nats of 2,000 images. Nats, float64, shape ().
    (Poole et al. 2019, 1905.06922, equation 10.)

    The error over images and noise is that of the delta method (infinitesimal jackknife): an image
    m counts in the mean and among the n, so its influence is t_m - sum_j q(z_j|x_m) / sum_n
    q(z_j|x_n), up to a constant.
    """
    mean, log_variance, eps = mean.double(), log_variance.double(), eps.double()
    z = Posterior(mean, log_variance).sample(eps)
    precision = (-log_variance).exp()
    offset = (mean.square() * precision + log_variance).sum(-1)
    itself = (eps.square() + log_variance).sum(-1, keepdim=True)
    logs, shares = [], torch.zeros_like(offset)
    for rows in torch.arange(len(mean), device=mean.device).split(100):
        # -2 ln q(z|x_n) up to a constant, for all n; that of z's image without the rounding
        far = z[rows].square() @ precision.mT - 2 * z[rows] @ (mean * precision).mT + offset
        far[torch.arange(len(rows)), rows] = itself[rows, 0]
        # The exponential of a number below -708 takes 50 times as long as that of another, and 0.
        ratios = ((itself[rows] - far) / 2).clamp_(min=-600)
        logs.append(torch.logsumexp(ratios, dim=-1))
        shares = shares + (ratios - logs[-1].unsqueeze(1)).exp().sum(0)
    spread = (torch.cat(logs) + shares).std()
    return math.log(len(mean)) - torch.cat(logs).mean(), spread / math.sqrt(len(mean))


def latent_std(mean: Tensor, variance: Tensor) -> Tensor:
    """Return the standard deviation of all latents of all images together, z drawn from q(z|x).

    sqrt(mean_nl [(mean_nl - m)^2 + variance_nl]), m = mean_nl mean_nl, of N images and L latents:
    of every number in z. Without unit, float64, shape (). Its inverse is the factor by which latent
    diffusion scales latents. (Rombach et al. 2022, 2112.10752, appendix G.)
    """
    mean = mean.double()
    return ((mean - mean.mean()).square() + variance.double()).mean().sqrt()


@torch.no_grad()
def measure_information(config: RunConfig, model: VAE, split: Split) -> Metrics:
    """Return the spread of the latents, and bounds of the information that random ones carry."""
    mean, log_variance = posteriors(model, split)
    if config.latent == "deterministic":
        return {"latent_std": latent_std(mean, torch.zeros_like(mean))}
    rate = objective.kl_per_latent(mean.double(), log_variance.double()).mean(0).sum(-1)
    gap = aggregate_gap(mean, log_variance)
    first = min(len(split), SAMPLED_IMAGES)
    eps = streams.noise(config.seed, "information", first, config.latent_size).to(mean.device)
    lower, error = mutual_information_lower(mean[:first], log_variance[:first], eps)
    std = (log_variance.double() / 2).exp()
    return {
        **{"aggregate_gap": gap, "mutual_information": rate - gap},
        **{"mutual_information_lower": lower, "mutual_information_lower_se": error},
        **{"latent_std": latent_std(mean, std.square()), "posterior_sigma": std.mean()},
    }
