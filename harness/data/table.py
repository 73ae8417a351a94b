"""The columns of a CSV or Parquet file as a dataset."""

import csv
import io
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
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

from harness.config import UserError
from harness.data.dataset import LEAST, MOST_CLASSES, Dataset

FILES = r"(\.(csv|tsv|txt)(\.(gz|bz2|zst))?|\.(parquet|pq))$"  # endings of names
DELIMITERS = "\t;,"  # the first that the header has outside quotes
INDEX = "__index_level_"  # of the names under which pandas writes an index without a name


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
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, UserError):
            reason = f"it cannot be read ({reason}); give a CSV file in UTF-8, or a Parquet file"
        raise UserError(f"table:{path}: {reason}") from None


def _read(path: Path, label: str | None) -> Dataset:
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"{found}; name a CSV or Parquet file")
    if not re.search(FILES, path.name, re.IGNORECASE):
        raise UserError("its name has another ending than .csv, .tsv, .txt, .parquet; rename it")
    is_parquet = path.suffix.lower() in (".parquet", ".pq")
    table = pa.parquet.ParquetFile(path).read() if is_parquet else _csv(path)
    _check_names(table.column_names, label)
    if len(table) < LEAST:
        raise UserError(f"it has {len(table)} rows: give at least {LEAST}")

    def place(row: int) -> str:
        return f"row {row} (the first is 0)" if is_parquet else _line(path, row)

    names = [name for name in table.column_names if name != label]
    values = np.stack([_numbers(name, table[name], place) for name in names], 1)
    classes, rows = (None, None) if label is None else _classes(label, table[label], place)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", re.sub(FILES, "", path.name, flags=re.IGNORECASE))
    name = f"table-{stem[:50] or 'rows'}"
    data = Dataset.from_tensors(name, values, rows, class_names=classes or (), columns=names)
    return data if label is None else replace(data, options={"label": label})


def _text(path: Path) -> Iterable[str]:
    stream = pa.input_stream(path, compression="detect")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


def _records(path: Path) -> tuple[Iterator[list[str]], Any, str]:
    # The records of a CSV file that are not empty, their reader and its delimiter.
    unquoted = re.sub(r'"[^"]*"', "", next(filter(str.strip, _text(path)), ""))
    delimiter = next((one for one in DELIMITERS if one in unquoted), ",")
    reader = csv.reader(_text(path), delimiter=delimiter)
    return filter(None, reader), reader, delimiter


def _csv(path: Path) -> pa.Table:
    # All columns as text: Arrow infers types from the first block of the file alone.
    records, _, delimiter = _records(path)
    names = next(records, [])
    if not names:
        raise UserError("it is empty; give a header and rows")
    if all(map(_is_number, names)):
        raise UserError(f"its first line is {','.join(names)[:60]!r}: give a header with names")
    table = pa.csv.read_csv(
        pa.input_stream(path, compression="detect"),
        pa.csv.ReadOptions(use_threads=False),  # else errors have no row
        pa.csv.ParseOptions(delimiter=delimiter),
        pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )
    columns = [pa.compute.utf8_trim_whitespace(column) for column in table.columns]
    return pa.table(columns, names=[name.strip() for name in names])


def _is_number(text: str) -> bool:
    with suppress(ValueError):
        float(text)
        return True
    return False


def _line(path: Path, row: int) -> str:
    records, reader, _ = _records(path)
    next(islice(records, row + 1, None))
    return f"line {reader.line_num}"


def _check_names(names: list[str], label: str | None) -> None:
    for place, name in enumerate(names, 1):
        if not name or name.startswith(INDEX):
            index = "is the index that pandas writes without index=False, or has no name"
            raise UserError(f"column {place} {index}; leave it out")
        if names.count(name) > 1:
            raise UserError(f"column {name!r} is there {names.count(name)} times; rename it")
    if label is not None and label not in names:
        near = get_close_matches(label, names, 1)
        meant = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names[:20])}"
        raise UserError(f"there is no column {label!r} for --label; {meant}")
    if names == [label]:
        raise UserError(f"column {label!r} is the label, and there is no other")


def _numbers(name: str, column: pa.ChunkedArray, place: Callable[[int], str]) -> np.ndarray:
    values = _floats(column)
    if values is None:
        row = bisect_left(
            range(len(column)), x=True, key=lambda n: _floats(column[: n + 1]) is None
        )
    elif len(bad := np.flatnonzero(~np.isfinite(values))):
        row = int(bad[0])
    else:
        return values
    remedy = "a finite number, leave out the row or the column, or name the column with --label"
    raise UserError(f"column {name!r}, {place(row)}, has {_shown(column[row])}: give {remedy}")


def _floats(column: pa.ChunkedArray) -> np.ndarray | None:
    # NaN where there is no value; None if any is no number, True or False.
    for kind in (pa.float64(), pa.bool_()):
        with suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return column.cast(kind, safe=False).cast(pa.float64()).to_numpy()
    return None


def _shown(value: pa.Scalar) -> str:
    found = value.as_py()
    return "no value" if found in (None, "") else repr(str(found)[:40])


def _classes(
    name: str, column: pa.ChunkedArray, place: Callable[[int], str]
) -> tuple[list[str], np.ndarray]:
    """Return the names of the classes, in their order, and the class of each row."""
    values = _floats(column)
    if values is None:
        values = np.array([str(v) if v is not None else "" for v in column.to_pylist()])
        is_class = values != ""
    else:
        is_class = (values == np.floor(values)) & (np.abs(values) < 2**53)
        values = np.where(is_class, values, 0).astype(np.int64)
    if not is_class.all():
        row = int(np.argmin(is_class))
        found = f"column {name!r}, {place(row)}, has {_shown(column[row])}"
        raise UserError(f"{found}: a label is text or a whole number in every row")
    names, rows = np.unique(values, return_inverse=True)
    if len(names) > min(MOST_CLASSES, len(values) // 2):
        found = f"column {name!r} has {len(names)} classes in {len(values)} rows"
        raise UserError(f"{found}: a label has {MOST_CLASSES} and two rows a class, on average")
    return [str(name) for name in names], rows
