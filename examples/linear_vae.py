"""The exact linear VAE as a model like any other, for instance to test a metric on."""

import numpy as np
import torch

from harness import VAE, Dataset, RunConfig, UserError, evaluate, load_dataset
from harness.linear.pca import pca
from harness.linear.vae import LinearOptimum
from harness.models.vae import build
from harness.objective import decoder_variance


def linear_vae(config: RunConfig, data: Dataset) -> VAE:
    """Return the linear VAE that minimises a run's loss on the training split, in float64.

    Latent i lies along principal component i; a collapsed latent has weights 0.
    """
    variance = decoder_variance(config, data.pixels)
    linear = config.model == "linear" and config.head == "gaussian" and config.free_bits == 0
    if not linear or not variance > 0 or config.latent_size > data.pixels:  # NaN too
        raise UserError(
            "the exact optimum needs model='linear', head='gaussian', likelihood='gaussian', "
            f"sigma='fixed', free_bits=0, kl_weight > 0 and at most {data.pixels} latents"
        )
    known, size = pca(data), config.latent_size
    best = LinearOptimum(known, size, variance)
    scale = np.where(best.active, known.variances, 1.0)[:size]
    posterior = np.where(best.active[:size], variance / scale, 1.0)  # of the latents
    basis = known.components[:, :size]
    basis = np.pad(basis, [(0, 0), (0, size - basis.shape[1])])  # further latents collapse
    columns = basis * np.sqrt(known.variances[:size] * (1 - posterior))
    rows = (columns / scale).T
    model = build(config, data.image_shape, data.train.largest, data.columns).double()
    weights = {
        "encoder.1.weight": np.concatenate([rows, np.zeros_like(rows)]),
        "encoder.1.bias": np.concatenate([-rows @ known.mean, np.log(posterior)]),
        "decoder.0.weight": columns,
        "decoder.0.bias": known.mean,
    }
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    return model.eval()


if __name__ == "__main__":
    data = load_dataset("digits")
    config = RunConfig(model="linear", latent_size=5, kl_weight=0.05)
    (metrics,) = evaluate([(config, linear_vae(config, data))], data)
    print(metrics["test/neg_elbo"], "nats / image")
