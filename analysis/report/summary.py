"""Summary folders: the results of a study as files, read from disk.

A summary folder holds `summary.json` (the fields of `Summary`), the figures, pictures and tables
that it names, and `runs.csv`, one row per run.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from harness.config import UserError


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
