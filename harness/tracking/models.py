"""Models in MLflow: read back a run's, and log the best one of a study with its signature."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

import mlflow
import torch

from harness.config import RunConfig
from harness.models.files import load_model
from harness.models.vae import VAE
from harness.tracking.runs import NOTE, RunLog
from harness.tracking.store import Store, connect

if TYPE_CHECKING:
    from harness.data.dataset import Split


@dataclass(frozen=True)
class TrackedRun:
    """A run read back from MLflow; `metrics` are its last logged values."""

    run_id: str
    config: RunConfig
    metrics: dict[str, float]
    model: VAE = field(repr=False)


def load_run(run_id: str, tracking_uri: str | None = None) -> TrackedRun:
    """Rebuild the model of a run from its artifacts, without pickle.

    Args:
        run_id: the run's id in MLflow, or its key.
        tracking_uri: MLflow tracking URI; None means the default store.

    Raises:
        UserError: there is no such run, or its model files are missing or broken.
    """
    store = connect(tracking_uri)
    run = store.run(run_id)
    with tempfile.TemporaryDirectory() as folder:
        config, model = load_model(store.fetch(run.run_id, "model", folder))
    return TrackedRun(run.run_id, config, run.metrics, model)


def log_best_model(
    store: Store,
    run: RunLog,
    config: RunConfig,
    model: VAE,
    examples: Split,
    metrics: Mapping[str, float],
    description: str,
) -> None:
    """Log a model from images to reconstructions in an open run, which this finishes.

    What the run is still to write is written first. The model is on the CPU; its page shows the
    examples as its input, and the metrics at its last epoch.
    """
    model = copy.deepcopy(model).float()
    for weight in model.parameters():
        weight.data = weight.data.contiguous()  # MLflow warns of others
    images = examples.pixels(slice(None), torch.float32).reshape(-1, *model.data_shape)
    with torch.no_grad():
        output = model(images).numpy()
    run.flush()  # leaving the block below finishes the run
    store.deliver([run.key])
    mlflow.set_tracking_uri(store.uri)
    run_id = store.run(run.key).run_id

    def write() -> None:
        with mlflow.start_run(run_id=run_id):
            logged = mlflow.pytorch.log_model(
                model,
                name="best_model",
                input_example=images.numpy(),
                signature=mlflow.models.infer_signature(images.numpy(), output),
                pip_requirements=[f"{name}=={version(name)}" for name in ("torch", "numpy")],
                tags={NOTE: description},
            )
            mlflow.log_metrics(dict(metrics), config.epochs, model_id=logged.model_id)

    store.ask(write)
