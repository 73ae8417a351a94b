"""Numbers that must not change: how they are computed and how far another processor may be off.

`values.json` holds those of commit 593445c; `write.py` wrote it. Bits differ between processors:
`benchmarks.frozen` compares them on one machine.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from mlflow import MlflowClient

from harness import RunConfig, load_dataset, load_run, train_and_evaluate

FILE = Path(__file__).with_name("values.json")

RELATIVE = 5e-3
"""How far another processor may be off.

Other instruction sets (ATEN_CPU_CAPABILITY, MKL_CBWR, ONEDNN_MAX_CPU_ISA, OPENBLAS_CORETYPE) move
these numbers by 3e-6 at most; another processor moved those of 3 to 6 epochs by up to 4.9e-3, most
at weight 0, which is left out here. Another seed moves them by per cents.
"""

KINDS = ("mlp", "relu head", "linear", "conv", "sigma learned", "Bernoulli")
METRICS = ("mse", "loss", "neg_elbo", "rate", "val/neg_elbo", "val/kl/3")
OF_RELU = ("loss",)
"""With sigma behind a ReLU, rounding decides which latents die: it moves all else by per cents."""

WEIGHTS = ("0.02", "1.0")
FINAL = ("test/mse", "test/neg_elbo", "test/rate", "linear/neg_elbo")
"""Of a study's runs, read back from MLflow; seconds and features of a classifier are left out, and
what `benchmarks.frozen.EXCEPTED` names."""


def trained(kinds: Mapping[str, RunConfig]) -> dict[str, dict[str, float]]:
    """Return metrics of runs of several kinds after an epoch on digits, by kind."""
    configs = [kinds[kind].replace(epochs=1) for kind in KINDS]
    runs = train_and_evaluate(configs, load_dataset("digits"), device="cpu")
    return {
        kind: {name: run.metrics[name] for name in (OF_RELU if "relu" in kind else METRICS)}
        for kind, run in zip(KINDS, runs, strict=True)
    }


def studied(uri: str) -> dict[str, dict[str, float]]:
    """Return metrics of a finished KL-weight study, by "WEIGHT SEED"."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("kl_weight-digits")
    runs = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'")
    return {
        f"{run.data.params['kl_weight']} {run.data.params['seed']}": {
            name: run.data.metrics[name] for name in FINAL
        }
        for run in runs
        if run.data.params.get("kl_weight") in WEIGHTS
    }


def images() -> torch.Tensor:
    """Return two images with the grey levels of digits, shape (2, 1, 8, 8)."""
    levels = np.arange(2 * 64) * 7 % 17 / 16
    return torch.from_numpy(levels.astype(np.float32)).reshape(2, 1, 8, 8)


def reconstructed(uri: str) -> dict[str, list[float]]:
    """Return the reconstructions of these images by each run of the first edition's store."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("kl_weight-digits")
    ids = [run.info.run_id for run in client.search_runs([experiment.experiment_id])
           if "seed" in run.data.params]  # fmt: skip
    with torch.no_grad():
        found = {run_id: load_run(run_id, uri).model(images()).numpy() for run_id in sorted(ids)}
    return {
        run_id: output.ravel().astype(float).round(7).tolist() for run_id, output in found.items()
    }
