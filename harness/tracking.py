"""The edge to MLflow, and the only import of it: write runs, read runs, load a model back.

Runs are written through `MlflowClient` alone, without the global active run, and metrics in one
batch per run and several epochs.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from harness.config import RunConfig, UserError
from harness.places import (
    asked_once,
    check_database,
    creation_lock,
    memory_folder,
    own_process,
    project_root,
    put,
    reason,
    signed_in,
    sqlite_file,
    tracking_address,
    unusable,
    use_write_ahead_log,
    without_password,
)

if TYPE_CHECKING:
    import numpy as np

    from harness.data import Dataset, Split
    from harness.vae import SingleVAE

BATCH = 1000
"""Metric values of one write, MLflow's largest batch."""

TRAINING_VIEW = "custom_model_development"
"""Kind of an experiment that MLflow's page opens with runs and charts instead of its GenAI view."""

for library in ("mlflow", "alembic"):
    logging.getLogger(library).setLevel(logging.ERROR)
logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # it raises what it logs


@dataclass(frozen=True)
class Store:
    """A tracking store.

    Attributes:
        client: MLflow's client of it.
        uri: its address; of a server without user and password, which MLflow knows by then.
        home: folder of the database, or the repository for a server: reports are written here.
        local: whether it is a database file, with artifacts in `mlruns` beside it.
    """

    client: MlflowClient
    uri: str = field(repr=False)
    home: Path
    local: bool


@dataclass(frozen=True)
class TrackedRun:
    """A run read back from MLflow; `metrics` are its last logged values."""

    run_id: str
    config: RunConfig
    metrics: dict[str, float]
    model: SingleVAE = field(repr=False)


def connect(uri: str | None = None) -> Store:
    """Open a tracking store, creating the database if it is not there yet.

    Args:
        uri: MLflow tracking URI; None means MLFLOW_TRACKING_URI or `mlflow.db` in the repository.

    Raises:
        UserError: the store cannot be opened or created.
    """
    uri = signed_in(tracking_address(uri))
    check_database(uri, "--tracking-uri")
    database = sqlite_file(uri)
    try:
        if database is None:
            with asked_once():
                return Store(_client(uri), uri, project_root(), local=False)
        database.parent.mkdir(parents=True, exist_ok=True)
        with creation_lock(uri):
            if not database.exists():
                put(database, _empty_database())
            use_write_ahead_log(database)
            return Store(_client(uri), uri, database.parent, local=True)
    except Exception as error:  # any driver's: SQLAlchemy's, requests', MLflow's
        raise unusable(uri, "--tracking-uri", error) from error


@cache
def _empty_database() -> bytes:
    """Return an empty database of MLflow, made in memory: 300 commits to a disk take seconds."""
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        database = Path(folder) / "mlflow.db"
        _client(f"sqlite:///{database}")
        return database.read_bytes()


def _client(uri: str) -> MlflowClient:
    client = MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


def open_experiment(store: Store, name: str, description: str) -> str:
    """Return the id of an experiment, creating it with its description if need be."""
    location = (store.home / "mlruns" / name).as_uri() if store.local else None
    tags = {"mlflow.note.content": description, "mlflow.experimentKind": TRAINING_VIEW}
    try:
        return store.client.create_experiment(name, location, tags)
    except MlflowException as error:
        found = store.client.get_experiment_by_name(name)
        if found is None:
            raise unusable(store.uri, "--tracking-uri", error) from error
        if found.lifecycle_stage == "deleted":
            raise UserError(
                f"experiment {name!r} was deleted in MLflow; restore it there, or delete it for "
                "good with `mlflow gc`"
            ) from None
        return found.experiment_id


class RunLog:
    """One MLflow run being written; metrics are kept and sent in large batches.

    Args:
        store: where to write.
        experiment_id: experiment of the run.
        name: shown in the run table.
        tags: added to host and process.
        params: any values; written as text.
        description: run id -> Markdown that the run's page shows.
    """

    def __init__(
        self,
        store: Store,
        experiment_id: str,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, object],
        description: Callable[[str], str] | None = None,
    ) -> None:
        self._client = store.client
        run = self._client.create_run(experiment_id, tags={**tags, **own_process()}, run_name=name)
        self.run_id: str = run.info.run_id
        written = [Param(k, str(v)) for k, v in params.items()]
        note = [RunTag("mlflow.note.content", description(self.run_id))] if description else []
        self._client.log_batch(self.run_id, params=written, tags=note)
        self._waiting: list[Metric] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Keep the metrics of a step; they are sent once a batch is full, or by `flush`."""
        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in values.items()]
        if len(self._waiting) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Send all metrics that are waiting."""
        for start in range(0, len(self._waiting), BATCH):
            self._client.log_batch(self.run_id, metrics=self._waiting[start : start + BATCH])
        self._waiting.clear()

    def dataset(self, data: Dataset) -> None:
        """Log the dataset as the run's input; MLflow keeps 36 characters of its digest."""
        counts = {part: len(getattr(data, part)) for part in ("train", "val", "test")}
        profile = json.dumps({"image_shape": data.image_shape, "images": counts})
        context = InputTag("mlflow.data.context", "training")
        source = json.dumps({"tags": {"mlflow.source.name": "harness.load_dataset"}})
        entity = DatasetEntity(data.name, data.digest[:36], "code", source, profile=profile)
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(entity, [context])])

    def picture(self, key: str, picture: np.ndarray, step: int) -> None:
        """Log an image of a step; MLflow shows the steps of one key as a slider."""
        self._client.log_image(self.run_id, picture, key=key, step=step)

    def folder(self, folder: Path) -> None:
        """Log every file of a folder as an artifact."""
        self._client.log_artifacts(self.run_id, str(folder))

    def text(self, text: str, file: str) -> None:
        """Log a text as an artifact."""
        self._client.log_text(self.run_id, text, file)

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self._client.set_tag(self.run_id, name, value)

    def describe(self, markdown: str) -> None:
        """Set the description that the run's page shows."""
        self.tag("mlflow.note.content", markdown)

    def model(self, model: SingleVAE) -> None:
        """Log weights and configuration, from which `load_run` rebuilds the model."""
        from harness.storage import save_model

        with tempfile.TemporaryDirectory() as folder:
            save_model(model, Path(folder))
            self._client.log_artifacts(self.run_id, folder, "model")

    def end(self, status: str = "FINISHED") -> None:
        """Send what is waiting and close the run: FINISHED, FAILED or KILLED."""
        self.flush()
        self._client.set_terminated(self.run_id, status)


def log_best_model(store: Store, run: RunLog, model: SingleVAE, examples: Split) -> None:
    """Log a model from images to reconstructions in an open run, with signature and example."""
    import torch

    images = examples.pixels(slice(None), torch.float32).reshape(-1, *model.image_shape)
    with torch.no_grad():
        output = model.float()(images).numpy()
    run.flush()  # leaving the block below finishes the run
    mlflow.set_tracking_uri(store.uri)
    with mlflow.start_run(run_id=run.run_id):
        mlflow.pytorch.log_model(
            model,
            name="best_model",
            input_example=images.numpy(),
            signature=mlflow.models.infer_signature(images.numpy(), output),
            pip_requirements=[f"{package}=={version(package)}" for package in ("torch", "numpy")],
        )


def read_runs(store: Store, experiment: str, filter_string: str = "") -> list[dict[str, Any]]:
    """Return the runs of an experiment as plain values, oldest first; none if it is not there.

    Returns:
        One dict per run: run_id, name, status, and dicts `params` (text), `metrics` (last), `tags`.
    """
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
    return [
        {"run_id": r.info.run_id, "name": r.info.run_name, "status": r.info.status}
        | {"params": r.data.params, "metrics": r.data.metrics, "tags": r.data.tags}
        for r in runs
    ]


def load_run(run_id: str, tracking_uri: str | None = None) -> TrackedRun:
    """Rebuild a run's model from its artifacts, without pickle.

    Raises:
        UserError: there is no such run, or its model files are missing or broken.
    """
    from harness.storage import load_model

    store = connect(tracking_uri)
    try:
        run = store.client.get_run(run_id)
        with tempfile.TemporaryDirectory() as folder:
            mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path="model", dst_path=folder, tracking_uri=store.uri
            )
            model = load_model(Path(folder) / "model")
    except (MlflowException, OSError) as error:
        said = f"{without_password(store.uri)} cannot be loaded ({reason(error)})"
        raise UserError(f"run {run_id} of {said}") from error
    return TrackedRun(run_id, model.config, dict(run.data.metrics), model)
