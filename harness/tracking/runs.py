"""Runs of MLflow: one being written, as single writes that can wait for a server, and one read.

A write is a dictionary of plain values with the key "kind". Each can be performed twice without a
trace: a run is found again by its key, MLflow keeps one of two equal metric values, parameters,
tags and inputs, files have names of their own, and a run that ends twice has ended.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mlflow import MlflowClient
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from PIL import Image

from harness.config import RunConfig

if TYPE_CHECKING:
    import numpy as np

    from harness.data.dataset import Dataset
    from harness.models.vae import VAE

KEY = "run_key"  # tag with the key of a run, generated before the run is written
NOTE = "mlflow.note.content"  # tag with the text that the page of a run or an experiment shows
BATCH = 1000  # metric values of one write: MLflow's largest batch

# Artifacts of every run: what it was made with, and the changed files of a dirty tree.
PROVENANCE, DIFF = "provenance.json", "provenance/diff.patch"

Write = dict[str, Any]


class Run(NamedTuple):
    """A run as the run table shows it; metrics are their last values."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]

    @property
    def key(self) -> str:
        """The key that the run was planned with; "" for a run of the first edition."""
        return self.tags.get(KEY, "")


class Logged(NamedTuple):
    """A logged value; `step` is the epoch."""

    metric: str
    step: int
    value: float


class Record(NamedTuple):
    """A finished run read back whole: its settings, provenance and every logged value."""

    run_id: str
    name: str
    config: RunConfig
    made_with: dict[str, Any]
    values: list[Logged]


class Writer(Protocol):
    """Performs writes, at once or later."""

    batch: int

    def put(self, key: str, write: Write) -> None:
        """Perform or keep a write; a folder of files is read before this returns."""

    def run_id(self, key: str) -> str:
        """Return the id of a run, waiting for a server if need be."""


class Direct:
    """Performs the writes of a run at once, in a store that is always there."""

    batch = BATCH

    def __init__(self, client: MlflowClient) -> None:
        self._client, self._run_id = client, ""

    def put(self, key: str, write: Write) -> None:
        """Perform a write."""
        if write["kind"] == "create":
            self._run_id = create(self._client, key, write)
        perform(self._client, key, self._run_id, write)

    def run_id(self, key: str) -> str:
        """Return the id of the run."""
        return self._run_id


class RunLog:
    """One run being written.

    The first write, `create`, has its experiment, name, tags, params and description.
    """

    def __init__(self, writer: Writer, key: str, create: Write) -> None:
        self.key = key
        self._writer = writer
        self._metrics: list[tuple[str, float, int, int]] = []
        self._put("create", time=_now(), **create)

    @property
    def run_id(self) -> str:
        """The run's id; a server that has not given one yet is waited for."""
        return self._writer.run_id(self.key)

    def _put(self, kind: str, **values: object) -> None:
        self._writer.put(self.key, {"kind": kind, **values})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step; a file gets them once a batch is full, or by `flush`."""
        now = _now()
        self._metrics += [(name, float(value), now, step) for name, value in values.items()]
        if len(self._metrics) >= self._writer.batch:
            self.flush()

    def flush(self) -> None:
        """Write the metrics that are waiting."""
        while self._metrics:
            self._put("metrics", values=self._metrics[:BATCH])
            del self._metrics[:BATCH]

    def dataset(self, data: Dataset) -> None:
        """Log the dataset as the run's input."""
        counts = {part: len(getattr(data, part)) for part in ("train", "val", "test")}
        profile = json.dumps({"image_shape": data.image_shape, "images": counts})
        source = json.dumps({"tags": {"mlflow.source.name": "harness.load_dataset"}})
        # For the run table; the whole digest is a parameter.
        named = {"name": data.name, "digest": data.digest[:12], "profile": profile}
        self._put("input", dataset={**named, "source_type": "code", "source": source})

    def picture(self, key: str, picture: np.ndarray, step: int) -> None:
        """Log an image of a step; MLflow shows the steps of one key as a slider."""
        # As `MlflowClient.log_image` does; named here, one that is delivered twice is there once.
        name = f"{key}+step+{step}+timestamp+{_now()}+{uuid.uuid4()}"
        image = Image.fromarray(picture)
        scale = 256 / max(image.size)  # the size of MLflow's overview
        small = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        with tempfile.TemporaryDirectory() as folder:
            image.save(Path(folder) / f"{name}.png")
            small.save(Path(folder) / f"{name}+compressed.webp")
            self._put("files", folder=folder, path="images")
        self.tag("mlflow.loggedImages", "True")

    def folder(self, folder: Path) -> None:
        """Log every file of a folder as an artifact."""
        self._put("files", folder=str(folder), path=None)

    def text(self, text: str, file: str) -> None:
        """Log a text as an artifact."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            self.folder(Path(folder))

    def model(self, config: RunConfig, model: VAE) -> None:
        """Log weights and configuration, from which `load_run` rebuilds the model."""
        from harness.models.files import save_model  # loads torch

        with tempfile.TemporaryDirectory() as folder:
            save_model(config, model, Path(folder))
            self._put("files", folder=folder, path="model")

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self._put("tag", name=name, value=value)

    def describe(self, markdown: str) -> None:
        """Set the description that the run's page shows."""
        self.tag(NOTE, markdown)

    def end(self, status: str = "FINISHED", reason: str = "") -> None:
        """Write what is waiting and close the run: FINISHED, FAILED or KILLED."""
        self.flush()
        self._put("end", status=status, reason=reason, time=_now())


def create(client: MlflowClient, key: str, write: Write) -> str:
    """Create a run and return its id; its other values are logged by `perform`."""
    tags = {**write["tags"], KEY: key}
    return client.create_run(write["experiment"], write["time"], tags, write["name"]).info.run_id


def perform(client: MlflowClient, key: str, run_id: str, write: Write) -> None:
    """Make the call of a write; in a description, the key becomes the id."""
    kind = write["kind"]
    if kind == "create":
        params = [Param(*param) for param in write["params"].items()]
        note = write["description"].replace(key, run_id)
        client.log_batch(run_id, params=params, tags=[RunTag(NOTE, note)] if note else [])
    elif kind == "metrics":
        client.log_batch(run_id, metrics=[Metric(*value) for value in write["values"]])
    elif kind == "tag":
        client.set_tag(run_id, write["name"], write["value"].replace(key, run_id))
    elif kind == "input":
        entity = DatasetEntity(**write["dataset"])
        context = InputTag("mlflow.data.context", "training")
        client.log_inputs(run_id, datasets=[DatasetInput(entity, [context])])
    elif kind == "files":
        client.log_artifacts(run_id, write["folder"], write["path"])
    else:
        if write["reason"]:
            client.set_tag(run_id, "reason", write["reason"])
        client.set_terminated(run_id, write["status"], write["time"])


def origin() -> dict[str, str]:
    """Return the tags of host and process, and those of MLflow's "Source" and "Created by"."""
    script = Path(sys.argv[0])
    page = script.parent.name == "studies"  # else the name alone: folders are private
    name = f"studies/{script.name}" if page else script.name
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": name} if name else {}
    with contextlib.suppress(OSError, KeyError, ImportError):  # this system names no user
        tags["mlflow.user"] = getpass.getuser()
    return {"host": socket.gethostname(), "process": str(os.getpid()), **tags}


def _now() -> int:
    return int(time.time() * 1000)
