"""Summary folders: the results of a study as files, read from disk or fetched from MLflow.

A summary folder holds `summary.json` (the fields of `Summary`), the figures, pictures and tables
that it names, and `runs.csv`, one row per run.
"""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from harness.config import UserError, checked_name
from harness.tracking.addresses import reason, without_password


@dataclass(frozen=True)
class Exhibit:
    """A file of the folder with its caption; `rows` names a picture's rows, top to bottom."""

    file: str
    caption: str
    rows: Sequence[str] = ()


@dataclass(frozen=True)
class Summary:
    """The question and the results of a study; blank lines separate paragraphs."""

    study: str
    name: str
    dataset: str
    question: str
    answer: str
    command: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    dataset_digest: str
    experiment_id: str
    tracking_uri: str
    figures: Sequence[Exhibit]
    pictures: Sequence[Exhibit]
    tables: Sequence[Exhibit]


def read(folder: Path) -> Summary:
    """Read the `summary.json` of a folder."""
    path = present(folder, "summary.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values = {field.name: values[field.name] for field in fields(Summary)}
        texts = [values[field.name] for field in fields(Summary) if field.type == "str"]
        for kind in ("figures", "pictures", "tables"):
            values[kind] = [Exhibit(**exhibit) for exhibit in values[kind]]
            texts += [text for shown in values[kind] for text in (shown.file, shown.caption)]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a text is of another type")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the summary of a study ({error!r})") from error
    return Summary(**values)


def read_cells(folder: Path, name: str) -> tuple[list[str], list[list[str]]]:
    """Read the header and the rows of a folder's CSV file as text."""
    with present(folder, name).open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    return header, rows


def present(folder: Path, name: str) -> Path:
    """Return the path of a folder's file."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{name!r} lies outside {folder}: a summary names files of its folder only")
    if not path.is_file():
        raise UserError(f"{path} is missing: a report cannot be made without it")
    return path


def fetch(study: str, dataset: str, name: str, tracking_uri: str | None = None) -> Path:
    """Download the summary folder of a study into the `reports` folder of its store."""
    experiment, name = checked_name(f"{study}-{dataset}"), checked_name(name)

    from harness import tracking  # MLflow, which --help does not wait for

    store = tracking.connect(tracking_uri)
    runs = store.runs(experiment, study=name, role="summary")
    finished = [run.run_id for run in runs if run.status == "FINISHED"]
    command = f"python -m studies.{study} --dataset {dataset}"
    command += "" if name == experiment else f" --study-name {shlex.quote(name)}"
    if tracking_uri:
        command += f" --tracking-uri {shlex.quote(without_password(tracking_uri))}"
    if not finished:
        where = without_password(store.uri)
        raise UserError(f"{where} has no finished summary of {name!r}; first run: {command}")
    folder = store.home / "reports" / name
    with tempfile.TemporaryDirectory() as fresh:
        try:
            store.client.download_artifacts(finished[-1], "", fresh)
        except Exception as error:  # of any store: the file system's, a server's, MLflow's
            message = f"summary run {finished[-1]} cannot be downloaded ({reason(error)})"
            raise UserError(message) from error
        if not Path(fresh, "summary.json").is_file():
            raise UserError(
                f"run {finished[-1]} holds no summary.json; run anew: {command} --fresh"
            )
        shutil.copytree(fresh, folder, dirs_exist_ok=True)
    return folder
