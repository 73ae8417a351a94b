"""Models in MLflow: one read back from its run, and a study's best with signature and example."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow

from harness.config import RunConfig
from harness.errors import UserError
from harness.tracking.addresses import reason, without_password
from harness.tracking.runs import RunLog
from harness.tracking.store import Store, connect

if TYPE_CHECKING:
    from harness.data.dataset import Split
    from harness.models.vae import VAE


@dataclass(frozen=True)
class TrackedRun:
    """A run read back from MLflow; `metrics` are its last logged values."""

    run_id: str
    config: RunConfig
    metrics: dict[str, float]
    model: VAE = field(repr=False)


def load_run(run: str, tracking_uri: str | None = None) -> TrackedRun:
    """Rebuild a run's model from its artifacts, without pickle.

    Args:
        run: id or key of the run.
        tracking_uri: MLflow tracking URI; None means the default store.

    Raises:
        UserError: there is no such run, or its model files are missing or broken.
    """
    from harness.models.files import load_model

    store = connect(tracking_uri)
    found = store.run(run)
    try:
        with tempfile.TemporaryDirectory() as folder:
            store.client.download_artifacts(found.run_id, "model", folder)
            config, model = load_model(Path(folder) / "model")
    except Exception as error:  # the file system's, a server's, MLflow's
        where = without_password(store.uri)
        raise UserError(f"run {run} of {where} cannot be loaded ({reason(error)})") from error
    return TrackedRun(found.run_id, config, found.metrics, model)


def log_best_model(
    store: Store,
    run: RunLog,
    config: RunConfig,
    model: VAE,
    examples: Split,
    metrics: Mapping[str, float],
    description: str,
) -> None:
    """Log a model from images to reconstructions in an open run, with signature and example.

    MLflow ends the run as it does so; `RunLog.end` must still follow.

    Args:
        store: where the run is.
        run: the open run; what it is still to write is written first.
        config: settings of the model.
        model: a trained model on the CPU.
        examples: images that the page shows as the model's input.
        metrics: of the model, logged for the run and the model at its last epoch.
        description: Markdown on the model's page.

    Raises:
        UserError: the store does not answer.
    """
    import torch

    model = copy.deepcopy(model).float()
    for weight in model.parameters():
        weight.data = weight.data.contiguous()  # MLflow warns of others
    images = examples.pixels(slice(None), torch.float32).reshape(-1, *model.data_shape)
    with torch.no_grad():
        output = model(images).numpy()
    run.flush()  # leaving the block below finishes the run
    store.deliver([run.key])

    def log() -> None:
        with mlflow.start_run(run_id=run.run_id):
            logged = mlflow.pytorch.log_model(
                model,
                name="best_model",
                input_example=images.numpy(),
                signature=mlflow.models.infer_signature(images.numpy(), output),
                pip_requirements=[f"{name}=={version(name)}" for name in ("torch", "numpy")],
                tags={"mlflow.note.content": description},
            )
            mlflow.log_metrics(dict(metrics), config.epochs, model_id=logged.model_id)

    mlflow.set_tracking_uri(store.uri)
    store.ask(log)
