"""The numbers of one tree that `benchmarks.frozen` compares, as JSON.

    PYTHONPATH=TREE python -P benchmarks/frozen_probe.py OUT.json [--data-dir DIR]

The same file runs in both trees, so it uses public names, commands and MLflow's client alone, and
imports nothing of benchmarks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness import Dataset, RunConfig, load_dataset, train_and_evaluate

IMAGES = 1500
"""Images of 28 x 28: 8 in 10 are for training, more than the 784 pixels of each."""

EPOCHS = {"digits": 3, "images": 2}
"""Epochs on each dataset."""

KINDS: dict[str, RunConfig] = {
    "mlp": RunConfig(kl_weight=0.02),
    "relu head": RunConfig.seed_recipe(kl_weight=0.1),
    "linear": RunConfig(model="linear", kl_weight=0.02),
    "conv": RunConfig(model="conv", kl_weight=0.02),
    "sigma optimal": RunConfig(sigma="optimal"),
    "sigma learned": RunConfig(sigma="learned"),
    "free bits": RunConfig(free_bits=0.2, kl_weight=0.1),
    "KL warm-up": RunConfig(kl_warmup_epochs=2, kl_weight=0.02),
    "Bernoulli": RunConfig(likelihood="bernoulli", binarization="stochastic"),
    "deterministic": RunConfig(latent="deterministic", kl_weight=0.0),
}
"""Ten kinds of runs, each the first of its stack."""

SMALL = ("--seeds", "2", "--epochs", "3")
STUDIES: dict[str, tuple[str, ...]] = {
    "mlp": ("kl_weight", "--values", "0.01", "0.1", *SMALL),
    "conv": ("kl_weight", "--values", "0.02", *SMALL, "--model", "conv"),
    "sigma learned": ("kl_weight", "--values", "0.5", "1", *SMALL, "--sigma", "learned"),
    "latent sizes": ("latent_size", "--values", "2", "8", *SMALL),
}
"""Small studies, as words of a command line."""

WALL_CLOCK = ("progress/epoch_seconds", "progress/images_per_second")
"""Metrics that no two trainings share."""

SETTINGS = (
    *("model", "hidden", "channels", "latent_size", "head", "latent", "kl_weight"),
    *("kl_normalization", "kl_warmup_epochs", "kl_cycles", "free_bits", "sigma", "likelihood"),
    *("binarization", "learning_rate", "batch_size", "epochs", "precision", "seed"),
    *("beta", "decoder_variance", "dataset", "dataset_digest"),
)
"""Parameters whose text must stay: stored runs are found by it."""

KEY = ("kl_weight", "latent_size", "seed")
"""Settings that the runs of one small study differ in."""

Numbers = dict[str, str]
"""Name -> a number, exactly (`float.hex`), or a text."""


def stack(config: RunConfig) -> list[RunConfig]:
    """Return three configurations that differ in seed and KL weight, the given one first."""
    if config.latent == "deterministic":
        return [config.replace(seed=seed) for seed in range(3)]
    weights = (config.kl_weight, 0.0, 0.5)
    return [config.replace(seed=i, kl_weight=weight) for i, weight in enumerate(weights)]


def mnist_images(folder: Path | None) -> np.ndarray | None:
    """Return the first of MNIST's training images, shape (N, 28, 28), None where they are not."""
    file = folder / "MNIST" / "raw" / "train-images-idx3-ubyte" if folder else None
    if file is None or not file.exists():
        return None
    header = 16
    values = np.fromfile(file, np.uint8, IMAGES * 28 * 28, offset=header)
    return values.reshape(IMAGES, 28, 28)


def drawn_images() -> np.ndarray:
    """Return images of three soft blobs each, from a fixed generator, shape (N, 28, 28)."""
    generator = np.random.default_rng(0)
    centers = generator.uniform(6, 22, (2, IMAGES, 3, 1, 1))
    widths = generator.uniform(1.5, 4, (IMAGES, 3, 1, 1))
    rows, columns = np.mgrid[:28, :28]
    distance = (rows - centers[0]) ** 2 + (columns - centers[1]) ** 2
    blobs = np.exp(-distance / (2 * widths**2)).sum(axis=1)
    return (255 * blobs.clip(0, 1)).round().astype(np.uint8)


def datasets(folder: Path | None) -> dict[str, Dataset]:
    """Return digits, and images of 28 x 28 given as tensors."""
    given = mnist_images(folder)
    images = drawn_images() if given is None else given
    labels = np.arange(IMAGES) % 10  # some metrics need classes, which must exist in every part
    return {"digits": load_dataset("digits"), "images": Dataset.from_tensors("own", images, labels)}


def exact(values: Mapping[str, float]) -> Numbers:
    """Return numbers as texts that hold all their bits."""
    return {name: float(value).hex() for name, value in values.items()}


def result(run: Any) -> Numbers:  # noqa: ANN401 - a RunResult of either tree
    """Return the digest of a run's weights, and all its metrics.

    The digests of parameters are sorted, so that neither their names nor their order counts.
    """
    tensors = [p.detach().contiguous().numpy() for p in run.model.parameters()]
    digests = sorted(hashlib.sha256(tensor.tobytes()).hexdigest() for tensor in tensors)
    found = {"weights": hashlib.sha256("".join(digests).encode()).hexdigest()}
    for epoch, metrics in enumerate(run.history, start=1):
        found |= {f"{name} @{epoch}": value for name, value in exact(metrics).items()}
    return found | exact(run.metrics)


def trained(folder: Path | None) -> dict[str, dict[str, Numbers]]:
    """Train every kind on every dataset, alone and in a stack.

    Returns:
        "KIND, DATASET" -> "alone", "stack 1", "stack 2" and "stack 3" -> numbers.
    """
    found = {}
    for dataset, data in datasets(folder).items():
        for kind, base in KINDS.items():
            configs = stack(base.replace(epochs=EPOCHS[dataset]))
            (alone,) = train_and_evaluate(configs[:1], data, device="cpu")
            together = train_and_evaluate(configs, data, device="cpu")
            runs = {f"stack {i}": result(run) for i, run in enumerate(together, start=1)}
            found[f"{kind}, {dataset}"] = {"alone": result(alone), **runs}
    return found


def studied(words: tuple[str, ...], folder: Path) -> dict[str, Numbers]:
    """Run a study by its command and read all its runs through MLflow's client.

    Returns:
        "kl_weight=... latent_size=... seed=...", or "summary" -> numbers.
    """
    uri = f"sqlite:///{folder}/mlflow.db"
    places = ["--tracking-uri", uri, "--storage", f"sqlite:///{folder}/optuna.db"]
    command = [sys.executable, "-m", f"studies.{words[0]}", *words[1:], "--study-name", "frozen"]
    done = subprocess.run([*command, "--device", "cpu", *places], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return read(uri)


def read(uri: str) -> dict[str, Numbers]:
    """Return settings and metrics, epoch by epoch, of all finished runs of a store."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found: dict[str, Numbers] = {}
    for run in client.search_runs(experiments, "attributes.status = 'FINISHED'"):
        params = run.data.params
        numbers = {name: params[name] for name in SETTINGS if name in params}
        for name in sorted(run.data.metrics):
            if name not in WALL_CLOCK:
                history = client.get_metric_history(run.info.run_id, name)
                numbers |= {f"{name} @{m.step}": float(m.value).hex() for m in history}
        key = " ".join(f"{n}={params[n]}" for n in KEY) if "seed" in params else "summary"
        if key in found:
            sys.exit(f"two finished runs are {key}")
        found[key] = numbers
    return found


def main() -> None:
    """Write the numbers of the tree on PYTHONPATH."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-dir", type=Path)
    given = parser.parse_args()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    found = trained(given.data_dir)
    for name, words in STUDIES.items():
        with tempfile.TemporaryDirectory() as folder:
            found[f"study: {name}"] = studied(words, Path(folder))
    given.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
