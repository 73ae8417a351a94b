"""The columns of a CSV or Parquet file as a dataset."""

import csv
import io
import re
from bisect import bisect_left
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from harness.data.dataset import LEAST, MOST_CLASSES, Dataset
from harness.errors import UserError, one_line

FILES = r"(\.(csv|tsv|txt)(\.(gz|bz2|zst))?|\.(parquet|pq))$"  # endings of names
INDEX = "__index_level_"  # of the names under which pandas writes an index without a name
NUMBER = "give a finite number, leave out the row or the column, or name the column with --label"
LABEL = "a label is text or a whole number in every row"


def read_table(path: Path, label: str | None = None) -> Dataset:
    """Read a CSV or Parquet file; the dataset's name is "table-" and the file's.

    A CSV file is UTF-8 text, compressed or not, with a header and values that are separated by
    commas, semicolons or tabs. Every column but `label` holds finite numbers, or True and False,
    which are 1 and 0. The label is text or a whole number, and each of its values is a class.
    """
    path = path.expanduser()
    try:
        return _read(path, label)
    except (UserError, OSError, ValueError, csv.Error, pa.ArrowException) as error:
        reason = one_line(error)
        if not isinstance(error, UserError):
            reason = f"it cannot be read ({reason}); give a CSV file in UTF-8, or a Parquet file"
        raise UserError(f"table:{path}: {reason}") from None


def _read(path: Path, label: str | None) -> Dataset:
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"{found}; name a CSV or Parquet file")
    stem, endings = re.subn(FILES, "", path.name, flags=re.IGNORECASE)
    if not endings:
        raise UserError("its name has another ending than .csv, .tsv, .txt, .parquet; rename it")
    is_parquet = path.suffix.lower() in (".parquet", ".pq")
    table = pa.parquet.ParquetFile(path).read() if is_parquet else _csv(path)
    _check_names(table.column_names, label)
    if len(table) < LEAST:
        raise UserError(f"it has {len(table)} rows: give at least {LEAST}")
    columns = dict[str, np.ndarray]()
    for name in table.column_names:
        columns[name], refused = (_labels if name == label else _numbers)(table[name])
        for row in refused:
            where = f"row {row} (the first is 0)" if is_parquet else _line(path, row)
            value = table[name][row].as_py()
            found = "no value" if value in (None, "") else repr(str(value)[:40])
            remedy = LABEL if name == label else NUMBER
            raise UserError(f"column {name!r}, {where}, has {found}: {remedy}")
    name = f"table-{re.sub(r'[^A-Za-z0-9._-]+', '-', stem)[:50] or 'rows'}"
    if label is None:
        return Dataset.from_tensors(name, np.stack([*columns.values()], 1), columns=[*columns])
    classes, rows = np.unique(columns.pop(label), return_inverse=True)
    if len(classes) > min(MOST_CLASSES, len(rows) // 2):
        found = f"column {label!r} has {len(classes)} classes in {len(rows)} rows"
        raise UserError(f"{found}: a label has {MOST_CLASSES} and two rows a class, on average")
    given: dict[str, Any] = {"columns": [*columns], "class_names": [*map(str, classes)]}
    data = Dataset.from_tensors(name, np.stack([*columns.values()], 1), rows, **given)
    return replace(data, options={"label": label})


def _csv(path: Path) -> pa.Table:
    # All columns as text: Arrow infers types from the first block of the file alone.
    records = _records(path)
    names: list[str] = next(filter(None, records), [])
    if not names:
        raise UserError("it is empty; give a header and rows")
    if _floats(pa.chunked_array([names])) is not None:
        raise UserError(f"its first line is {','.join(names)[:60]!r}: give a header with names")
    table = pa.csv.read_csv(
        pa.input_stream(path, compression="detect"),
        pa.csv.ReadOptions(use_threads=False),  # else errors have no row
        pa.csv.ParseOptions(delimiter=records.dialect.delimiter),
        pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )
    columns = [pa.compute.utf8_trim_whitespace(column) for column in table.columns]
    return pa.table(columns, names=[name.strip() for name in names])


def _records(path: Path) -> Any:  # noqa: ANN401 - a reader of `csv`, whose class has no name
    def text() -> io.TextIOWrapper:
        stream = pa.input_stream(path, compression="detect")
        return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")

    header = re.sub(r'"[^"]*"', "", next(filter(str.strip, text()), ""))
    return csv.reader(text(), delimiter=next((d for d in "\t;" if d in header), ","))


def _line(path: Path, row: int) -> str:
    records = _records(path)
    next(islice(filter(None, records), row + 1, None))
    return f"line {records.line_num}"


def _check_names(names: list[str], label: str | None) -> None:
    counts = Counter(names)
    for place, name in enumerate(names, 1):
        if not name or name.startswith(INDEX):
            index = "is the index that pandas writes without index=False, or has no name"
            raise UserError(f"column {place} {index}; leave it out")
        if counts[name] > 1:
            raise UserError(f"column {name!r} is there {counts[name]} times; rename it")
    if label is not None and label not in names:
        near = get_close_matches(label, names, 1)
        meant = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names[:20])}"
        raise UserError(f"there is no column {label!r} for --label; {meant}")
    if names == [label]:
        raise UserError(f"column {label!r} is the label, and there is no other")


def _numbers(column: pa.ChunkedArray) -> tuple[np.ndarray, list[int]]:
    # The values of a column, and its first row without a finite number, if there is one.
    values = _floats(column)
    if values is not None:
        return values, np.flatnonzero(~np.isfinite(values))[:1].tolist()
    rows = range(len(column))
    return np.empty(0), [bisect_left(rows, x=True, key=lambda n: _floats(column[: n + 1]) is None)]


def _labels(column: pa.ChunkedArray) -> tuple[np.ndarray, list[int]]:
    # The labels in a column, whole numbers or text, and its first row without one.
    values = _floats(column)
    if values is None:
        texts = np.array(["" if v is None else str(v) for v in column.to_pylist()])
        return texts, np.flatnonzero(texts == "")[:1].tolist()
    whole = (values == np.floor(values)) & (np.abs(values) < 2**53)
    return np.where(whole, values, 0).astype(np.int64), np.flatnonzero(~whole)[:1].tolist()


def _floats(column: pa.ChunkedArray) -> np.ndarray | None:
    # NaN where there is no value; None if any is no number, True or False: Arrow has no question
    # whether a column can be cast, and the caller names the row that cannot.
    for kind in (pa.float64(), pa.bool_()):
        with suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return column.cast(kind, safe=False).cast(pa.float64()).to_numpy()
    return None
