"""One run being written: what is logged of it, as single writes that can wait for a server."""

from __future__ import annotations

import contextlib
import getpass
import json
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from harness.journal import Write
from harness.places import own_process

if TYPE_CHECKING:
    import numpy as np

    from harness.config import RunConfig
    from harness.data.dataset import Dataset
    from harness.models.vae import VAE
    from harness.stores import Store

BATCH = 1000
"""Metric values of one write, MLflow's largest batch."""

SHOWN = 12
"""Characters of a dataset's digest in MLflow's run table; the whole is a parameter."""

NOTE = "mlflow.note.content"
"""Tag with the description that the page of a run or an experiment shows."""


class RunLog:
    """One MLflow run being written; metrics are kept and sent in large batches.

    Args:
        store: where to write. Where that is a server which does not answer, all waits on disk.
        experiment_id: experiment of the run.
        name: shown in the run table.
        tags: added to host, process, user and the name of the script.
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
        self._writer, self._experiment, self._key = store.writer, experiment_id, uuid.uuid4().hex
        self._waiting: list[tuple[str, float, int, int]] = []
        made_by = {**own_process(), **_source()}
        self._put("create", name=name, tags={**made_by, **tags}, time=_now())
        # The key stands for an id that the server has not given yet.
        note = {NOTE: description(self._writer.known(self._key))} if description else {}
        written = {name: str(value) for name, value in params.items()}
        self._put("batch", metrics=[], params=written, tags=note)

    @property
    def run_id(self) -> str:
        """The run's id.

        Raises:
            UserError: a server that was away has not given one.
        """
        return self._writer.run_id(self._key)

    def _put(self, kind: str, folder: Path | None = None, **values: object) -> None:
        self._writer.put(Write(self._key, self._experiment, kind, values, folder))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Keep the metrics of a step; they are sent once a batch is full, or by `flush`."""
        now = _now()
        self._waiting += [(name, float(value), now, step) for name, value in values.items()]
        if len(self._waiting) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Send all metrics that are waiting."""
        while self._waiting:
            self._put("batch", metrics=self._waiting[:BATCH], params={}, tags={})
            del self._waiting[:BATCH]

    def dataset(self, data: Dataset) -> None:
        """Log the dataset as the run's input; MLflow shows so much of its digest."""
        counts = {part: len(getattr(data, part)) for part in ("train", "val", "test")}
        profile = json.dumps({"image_shape": data.image_shape, "images": counts})
        source = json.dumps({"tags": {"mlflow.source.name": "harness.load_dataset"}})
        digest = data.digest[:SHOWN]
        self._put(
            "input",
            name=data.name,
            digest=digest,
            source_type="code",
            source=source,
            profile=profile,
        )

    def picture(self, key: str, picture: np.ndarray, step: int) -> None:
        """Log an image of a step; MLflow shows the steps of one key as a slider.

        Its files are named here as `MlflowClient.log_image` names them, so that one which is
        delivered twice is there once.
        """
        name = f"{key}+step+{step}+timestamp+{_now()}+{uuid.uuid4()}"
        image = Image.fromarray(picture)
        with tempfile.TemporaryDirectory() as folder:
            image.save(Path(folder) / f"{name}.png")
            _scaled(image).save(Path(folder) / f"{name}+compressed.webp")
            self._put("files", Path(folder), path="images")
        self.tag("mlflow.loggedImages", "True")

    def folder(self, folder: Path) -> None:
        """Log every file of a folder as an artifact."""
        self._put("files", folder, path=None)

    def text(self, text: str, file: str) -> None:
        """Log a text as an artifact."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            self.folder(Path(folder))

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self._put("tag", name=name, value=value)

    def describe(self, markdown: str) -> None:
        """Set the description that the run's page shows."""
        self.tag(NOTE, markdown)

    def model(self, config: RunConfig, model: VAE) -> None:
        """Log weights and configuration, from which `load_run` rebuilds the model."""
        from harness.models.files import save_model

        with tempfile.TemporaryDirectory() as folder:
            save_model(config, model, Path(folder))
            self._put("files", Path(folder), path="model")

    def end(self, status: str = "FINISHED") -> None:
        """Send what is waiting and close the run: FINISHED, FAILED or KILLED."""
        self.flush()
        self._put("end", status=status, time=_now())


def _source() -> dict[str, str]:
    """Return the tags of which MLflow makes its columns "Source" and "Created by"."""
    script = Path(sys.argv[0])
    page = script.parent.name == "studies"  # else by name alone: a folder is nobody's business
    named = f"studies/{script.name}" if page else script.name
    source = {"mlflow.source.type": "LOCAL", "mlflow.source.name": named} if named else {}
    with contextlib.suppress(OSError, KeyError, ImportError):  # this system names no user
        source["mlflow.user"] = getpass.getuser()
    return source


def _scaled(image: Image.Image) -> Image.Image:
    """Scale an image to the size of MLflow's overview, 256 pixels at its longer side."""
    scale = 256 / max(image.size)
    return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))


def _now() -> int:
    return int(time.time() * 1000)
