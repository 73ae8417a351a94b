"""Runs of MLflow: one being written, as single writes that can wait for a server, and one read.

A write is a dictionary of plain values with the key "kind". Each can be performed twice without a
trace: MLflow keeps one of two equal values, and files have unique names.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlflow import MlflowClient
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from PIL import Image

from harness.config import RunConfig

if TYPE_CHECKING:
    import numpy as np

    from harness.data.dataset import Dataset
    from harness.models.vae import VAE

KEY = "run_key"  # tag with the key of a run, generated before the run is written
NOTE = "mlflow.note.content"  # tag with the text that the page of a run or an experiment shows
BATCH = 1000  # metric values of one request: MLflow's largest batch

# Metrics of each latent and of each class: many, and read at the end of a run.
EACH = re.compile(r"(train|val)/(kl|mse_class)/\d+")

PICTURED = {"mlflow.loggedImages": "True"}  # tag of a run with pictures, which MLflow shows then

# Artifacts of every run: its provenance, and the changed files of a dirty tree.
PROVENANCE, DIFF = "provenance.json", "provenance/diff.patch"

# Fields of a provenance that are read again, and their kinds.
FIELDS = {
    **dict.fromkeys(("code", "versions", "device", "threads", "dataset"), dict),
    **dict.fromkeys(("platform", "device kind", "dataset name", "dataset digest"), str),
    "threads blas": int,
}

Write = dict[str, Any]


class Run(NamedTuple):
    """A run as the run table shows it: metrics are last values, `artifacts` is a place."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    artifacts: str = ""

    @property
    def key(self) -> str:
        """The key that the run was planned with; "" for a run of the first edition."""
        return self.tags.get(KEY, "")


class Logged(NamedTuple):
    """A logged value; `step` is the epoch."""

    metric: str
    step: int
    value: float


class Epoch(NamedTuple):
    """The value of a metric in one epoch of a run: a row of a frame of histories."""

    run_id: str
    epoch: int
    value: float


class Record(NamedTuple):
    """A finished run read back whole: its settings, provenance and every logged value."""

    run_id: str
    name: str
    config: RunConfig
    made_with: dict[str, Any]
    values: list[Logged]
    threads_per_run: int


class RunLog:
    """A run being written: `put` performs or keeps each write of the run with a key.

    `create` are experiment, name, tags and params of the run; `batch` metric values are one write.
    """

    def __init__(
        self, put: Callable[[str, Write], None], key: str, create: Write, batch: int = 1
    ) -> None:
        self.key, self._put, self._batch = key, put, batch
        self._metrics: list[tuple[str, float, int, int]] = []
        self._epoch, self._left_out = 0, dict[str, float]()
        self._write("create", time=time.time_ns() // 10**6, **create)

    def _write(self, kind: str, **values: object) -> None:
        self._put(self.key, {"kind": kind, **values})

    def epoch(self, values: Mapping[str, float], epoch: int) -> None:
        """Log the metrics of an epoch, those `EACH` at epochs 1, 2, 4, 8, ... and the last alone.

        Whichever epoch is the last: what it left out is written by `end`.
        """
        is_due = epoch & (epoch - 1) == 0
        left_out = {} if is_due else {k: v for k, v in values.items() if EACH.fullmatch(k)}
        self._epoch, self._left_out = epoch, left_out
        self.metrics({k: v for k, v in values.items() if k not in left_out}, epoch)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step; they are written once a batch is full."""
        now = time.time_ns() // 10**6
        self._metrics += [(name, float(value), now, step) for name, value in values.items()]
        self._flush(self._batch)

    def _flush(self, least: int = 1) -> None:
        if len(self._metrics) >= least:
            self._write("metrics", values=self._metrics)
            self._metrics = []

    def dataset(self, data: Dataset) -> None:
        """Log the dataset as the run's input."""
        counts = {part: len(getattr(data, part)) for part in ("train", "val", "test")}
        profile = json.dumps({"image_shape": data.image_shape, "images": counts})
        source = json.dumps({"tags": {"mlflow.source.name": "harness.load_dataset"}})
        # For the run table; the whole digest is a parameter.
        named = {"name": data.name, "digest": data.digest[:12], "profile": profile}
        self._write("input", dataset={**named, "source_type": "code", "source": source})

    def picture(self, key: str, picture: np.ndarray, step: int) -> None:
        """Log an image of a step of a run with the tags `PICTURED`; MLflow shows a slider."""
        # As `MlflowClient.log_image` does, which would name it anew at each delivery.
        name = f"{key}+step+{step}+timestamp+{time.time_ns() // 10**6}+{uuid.uuid4()}"
        image = Image.fromarray(picture)
        scale = 256 / max(image.size)  # the size of MLflow's overview
        small = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        with tempfile.TemporaryDirectory() as folder:
            image.save(Path(folder) / f"{name}.png")
            small.save(Path(folder) / f"{name}+compressed.webp", method=0)  # the fastest
            self.folder(Path(folder), "images")

    def folder(self, folder: Path, path: str | None = None) -> None:
        """Log every file of a folder as an artifact, below a path."""
        self._write("files", folder=str(folder), path=path)

    def text(self, text: str, file: str) -> None:
        """Log a text as an artifact."""
        self._write("text", text=text, file=file)

    def model(self, config: RunConfig, model: VAE) -> None:
        """Log weights and configuration, from which `load_run` rebuilds the model."""
        from harness.models.files import save_model  # loads torch

        with tempfile.TemporaryDirectory() as folder:
            save_model(config, model, Path(folder))
            self.folder(Path(folder), "model")

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self._write("tag", name=name, value=value)

    def end(self, status: str = "FINISHED", reason: str = "") -> None:
        """Write the metrics that are left and close the run: FINISHED, FAILED or KILLED."""
        left_out, self._left_out = self._left_out, {}  # once, if this fails and is repeated
        self.metrics(left_out, self._epoch)
        self._flush()
        self._write("end", status=status, reason=reason, time=time.time_ns() // 10**6)


def part_file(part: str) -> str:
    """Return the artifact with the source of a run's part, such as "network NAME"."""
    return f"parts/{part.replace(' ', '-')}.py"


def create(client: MlflowClient, key: str, write: Write) -> str:
    """Create a run and return its id; `perform` logs its parameters."""
    tags = {**write["tags"], KEY: key}
    return client.create_run(write["experiment"], write["time"], tags, write["name"]).info.run_id


def perform(client: MlflowClient, run_id: str, write: Write) -> None:
    """Make the requests of a write; the run exists."""
    kind = write["kind"]
    if kind == "create":
        client.log_batch(run_id, params=[Param(*param) for param in write["params"].items()])
    elif kind == "metrics":
        metrics = [Metric(*value) for value in write["values"]]
        for start in range(0, len(metrics), BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + BATCH])
    elif kind == "text":
        client.log_text(run_id, write["text"], write["file"])
    elif kind == "tag":
        client.set_tag(run_id, write["name"], write["value"])
    elif kind == "input":
        context = InputTag("mlflow.data.context", "training")
        dataset = DatasetInput(DatasetEntity(**write["dataset"]), [context])
        client.log_inputs(run_id, datasets=[dataset])
    elif kind == "files":
        client.log_artifacts(run_id, write["folder"], write["path"])
    else:
        if write["reason"]:
            client.set_tag(run_id, "reason", write["reason"])
        client.set_terminated(run_id, write["status"], write["time"])


def is_deleted(client: MlflowClient, run_id: str) -> bool:
    """Return whether a run was deleted in MLflow."""
    try:
        return client.get_run(run_id).info.lifecycle_stage == "deleted"
    except MlflowException as error:
        return error.error_code == "RESOURCE_DOES_NOT_EXIST"  # for good


def origin() -> dict[str, str]:
    """Return the tags of host, process, and MLflow's "Source" and "Created by"."""
    name = Path(sys.argv[0]).name  # folders are private
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": name} if name else {}
    with contextlib.suppress(OSError, KeyError, ImportError):  # this system names no user
        tags["mlflow.user"] = getpass.getuser()
    return {"host": socket.gethostname(), "process": str(os.getpid()), **tags}
