"""The edge to MLflow: write runs, read runs, load a model back.

Beside it only `stores` and `sending` import MLflow. Runs are written through `MlflowClient` alone,
without the global active run, and metrics in one batch per run and several epochs.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from harness import view
from harness.config import RunConfig, UserError
from harness.places import asked_once, is_server, reason, unusable, without_password
from harness.runlog import NOTE
from harness.runlog import RunLog as RunLog
from harness.stores import Store as Store
from harness.stores import answering, patient
from harness.stores import connect as connect

if TYPE_CHECKING:
    from harness.data.dataset import Split
    from harness.models.vae import VAE

TRAINING_VIEW = "custom_model_development"
"""Kind of an experiment that MLflow's page opens with runs and charts instead of its GenAI view."""


@dataclass(frozen=True)
class TrackedRun:
    """A run read back from MLflow; `metrics` are its last logged values."""

    run_id: str
    config: RunConfig
    metrics: dict[str, float]
    model: VAE = field(repr=False)


def open_experiment(store: Store, name: str, description: str) -> str:
    """Return the id of an experiment, creating it with its description if need be.

    What waits for the store, of this process and of dead ones, is delivered first.

    Raises:
        UserError: the experiment was deleted, or the store does not answer.
    """
    store.writer.settle()
    # A server knows its own place; a database would take the folder that a process stands in.
    own = is_server(store.uri)
    location = None if own else (store.home / "mlruns" / name).as_uri()
    tags = {NOTE: description, "mlflow.experimentKind": TRAINING_VIEW}
    try:
        with asked_once():
            return store.client.create_experiment(name, location, tags)
    except MlflowException as error:
        with asked_once(), answering(store):
            found = store.client.get_experiment_by_name(name)
        if found is None:
            raise unusable(store.uri, "--tracking-uri", error) from error
        if found.lifecycle_stage == "deleted":
            raise UserError(
                f"experiment {name!r} was deleted in MLflow; restore it there, or delete it for "
                "good with `mlflow gc`"
            ) from None
        return found.experiment_id


def metric_names(store: Store, run_id: str) -> dict[str, str]:
    """Return the names of a run's metrics as they are logged, by their names without "test/".

    Raises:
        UserError: the store does not answer.
    """
    with answering(store):
        logged = store.client.get_run(run_id).data.metrics
    return {name.removeprefix("test/"): name for name in logged}


def save_view(store: Store, experiment_id: str, columns: Sequence[str], run_id: str) -> None:
    """Give an experiment a view of its runs, which the page lists, unless it has one.

    Args:
        store: where the runs are.
        experiment_id: the experiment.
        columns: parameters and metrics; "mse" also finds "test/mse".
        run_id: a run that has them; sorted is by the first metric.

    Raises:
        UserError: the store does not answer.
    """
    with answering(store):
        if view.TAG in store.client.get_experiment(experiment_id).tags:
            return
        params = store.client.get_run(run_id).data.params
        known = {name: f"params.`{name}`" for name in params}
        known |= {k: f"metrics.`{name}`" for k, name in metric_names(store, run_id).items()}
        chosen = [known[name] for name in columns if name in known]
        measured = [column for column in chosen if column.startswith("metrics.")]
        order_by = next(iter(measured), "attributes.start_time")
        value = view.saved_view("Study", chosen, order_by, int(time.time() * 1000))
        store.client.set_experiment_tag(experiment_id, view.TAG, value)


def close_run(store: Store, run_id: str, status: str, reason: str) -> None:
    """End a run that another process, or an interrupted call, has left open.

    Raises:
        UserError: the store does not answer.
    """
    with answering(store):
        store.client.set_tag(run_id, "reason", reason)
        store.client.set_terminated(run_id, status)


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
    store.writer.settle()
    mlflow.set_tracking_uri(store.uri)
    with answering(store), mlflow.start_run(run_id=run.run_id):
        logged = mlflow.pytorch.log_model(
            model,
            name="best_model",
            input_example=images.numpy(),
            signature=mlflow.models.infer_signature(images.numpy(), output),
            pip_requirements=[f"{package}=={version(package)}" for package in ("torch", "numpy")],
            tags={"mlflow.note.content": description},
        )
        mlflow.log_metrics(dict(metrics), config.epochs, model_id=logged.model_id)


def read_runs(store: Store, experiment: str, filter_string: str = "") -> list[dict[str, Any]]:
    """Return the runs of an experiment as plain values, oldest first; none if it is not there.

    What waits for the store is delivered first.

    Returns:
        One dict per run: run_id, name, status, and dicts `params` (text), `metrics` (last
        values) and `tags`.

    Raises:
        UserError: the store does not answer.
    """
    store.writer.settle()
    with answering(store):
        runs = _search(store, experiment, filter_string)
    return [
        {"run_id": r.info.run_id, "name": r.info.run_name, "status": r.info.status}
        | {"params": r.data.params, "metrics": r.data.metrics, "tags": r.data.tags}
        for r in runs
    ]


def _search(store: Store, experiment: str, filter_string: str) -> list[Run]:
    found = store.client.get_experiment_by_name(experiment)
    if found is None:
        return []
    runs: list[Run] = []
    token: str | None = ""
    while token is not None:
        order = ["attributes.start_time ASC"]
        page = store.client.search_runs(
            [found.experiment_id], filter_string, order_by=order, page_token=token or None
        )
        runs += page
        token = page.token or None
    return runs


def load_run(run_id: str, tracking_uri: str | None = None) -> TrackedRun:
    """Rebuild a run's model from its artifacts, without pickle.

    Raises:
        UserError: there is no such run, or its model files are missing or broken.
    """
    from harness.models.files import load_model

    store = connect(tracking_uri)
    try:
        with tempfile.TemporaryDirectory() as folder, patient(store):
            run = store.client.get_run(run_id)
            mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path="model", dst_path=folder, tracking_uri=store.uri
            )
            config, model = load_model(Path(folder) / "model")
    except (MlflowException, OSError) as error:
        where = without_password(store.uri)
        raise UserError(f"run {run_id} of {where} cannot be loaded ({reason(error)})") from error
    return TrackedRun(run_id, config, dict(run.data.metrics), model)
