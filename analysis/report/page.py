"""A self-contained HTML page per study, made from its summary folder alone.

A summary folder holds `summary.json`, the figures, pictures and tables that it names, and
`runs.csv`, one row per run.
"""

import base64
import csv
import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from PIL import Image

from analysis import tables
from harness.errors import UserError, printable
from harness.tracking.addresses import without_secrets

UI = "http://127.0.0.1:5000"  # address of `mlflow ui`
RUN_METRICS = ("neg_elbo", "mse", "rate")  # of the test split, in the list of runs
SCREEN = 96  # pixels of an inch on a page
WIDE, SENTENCE = 112, 48  # characters of a row too wide for paper, of a cell broken into lines
# Fields that summaries of earlier versions lack.
LATER = {"verdict": (), "warnings": (), "best_row": None}
# A cell of a column of numbers: a number, one with its interval, a dash, or nothing.
NUMBER = re.compile(r"([-+]?(\d[\d.,]*(e[-+]?\d+)?|inf|nan)( ± \S+| \(\S+ to \S+\))?( %)?|[–-])?")


def build(folder: Path) -> Path:
    """Write `report.html` into a summary folder and return its path."""
    summary = _read(folder)
    store = without_secrets(summary["tracking_uri"])
    for one in (*summary["figures"], *summary["pictures"], *summary["tables"]):
        if not (folder / one["file"]).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder}/summary.json names a file elsewhere, {one['file']}")
    server = store.rstrip("/") if store.startswith(("http://", "https://")) else ""
    runs, ids = _runs(folder)
    pages = f"{server or UI}/#/experiments/{quote(summary['experiment_id'])}/runs"
    return _write(
        folder / "report.html",
        title=f"{summary['name']}: {_paragraphs(summary['question'])[0]}",
        summary=summary,
        figures=[_image(folder, exhibit) for exhibit in summary["figures"]],
        pictures=[_image(folder, exhibit) for exhibit in summary["pictures"]],
        tables=[(t["caption"], table(*_cells(folder / t["file"]))) for t in summary["tables"]],
        runs=runs,
        links={run_id: f"{pages}/{quote(run_id)}" for run_id in ids},
        store=store,
        server=server,
        server_command=f"mlflow ui --workers 1 --backend-store-uri {shlex.quote(store)}",
    )


def index(reports: Iterable[Path], out: Path) -> Path:
    """Write a page of reports that `build` returned: their questions and verdicts, and links.

    A report without a verdict is shown with its answer.
    """
    entries = [
        (_read(report.parent), quote(Path(os.path.relpath(report, out.parent)).as_posix()))
        for report in reports
    ]
    return _write(out, title="Studies", reports=entries)


def _write(path: Path, **values: Any) -> Path:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis.report", ""),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
    )
    environment.filters |= {"paragraphs": _paragraphs, "plain": tables.plain}
    page = environment.get_template("page.html.j2").render(values)
    path.write_text(printable(page), encoding="utf-8")
    return path


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text.strip())


def _image(folder: Path, exhibit: dict[str, Any]) -> tuple[dict[str, Any], str, str]:
    """Return an exhibit with its image as an address, and its size in CSS."""
    path = folder / exhibit["file"]
    with Image.open(path) as opened:
        kind, dots = opened.get_format_mimetype(), opened.info.get("dpi", (SCREEN, SCREEN))[0]
        width, ratio = opened.width * SCREEN / dots, opened.width / opened.height
    source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return exhibit, source, f"--width:{width:.0f}px;--ratio:{ratio:.4f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Lay out cells of text: columns of numbers align right, and wide tables are small on paper."""
    columns = [_column(name, [row[i] for row in rows]) for i, name in enumerate(header)]
    wide = sum(column["width"] for column in columns) > WIDE
    return {"columns": columns, "rows": rows, "wide": wide}


def _column(name: str, cells: Sequence[str]) -> dict[str, Any]:
    """Return a column's class in CSS and its width in characters."""
    longest = max(map(len, cells), default=0)
    widest = max(longest, *map(len, re.split(r"[_/]", name)))
    kind = "words" if longest > SENTENCE else None
    kind = "number" if all(map(NUMBER.fullmatch, cells)) else kind
    return {"name": name, "kind": kind, "width": 2 + min(widest, SENTENCE)}


def _runs(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the list of runs, and their ids."""
    header, rows = _cells(folder / "runs.csv")
    runs = [dict(zip(header, row, strict=True)) for row in rows]
    best = [name.removeprefix("best/") for name in header if name.startswith("best/")]
    pairs = [("epochs" if name == "epoch" else name, f"best/{name}") for name in best]
    metrics = [*RUN_METRICS, *(name for pair in pairs for name in pair)]
    cells = [
        [run["name"], run["seed"], *(_metric(run.get(m), m) for m in metrics), run["run_id"]]
        for run in runs
    ]
    return table(["name", "seed", *metrics, "run id"], cells), [run["run_id"] for run in runs]


def _metric(value: str | None, name: str) -> str:
    decimals = 0 if "epoch" in name else tables.decimals(name)
    return f"{float(value):.{decimals}f}" if value else "–"


def _read(folder: Path) -> dict[str, Any]:
    return LATER | json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def _cells(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    return header, rows
