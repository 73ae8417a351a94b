"""One self-contained HTML report per study, made from nothing but the study's summary folder.

A summary folder holds `summary.json` (the fields of `Summary`), the figures, pictures and tables
that it names, and `runs.csv`, one row per run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

from analysis import markup
from harness.config import UserError

UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` answers."""

RUN_METRICS = {"neg_elbo": ".2f", "mse": ".4f", "rate": ".2f"}
"""Test metrics in the list of runs, and how they are written."""


@dataclass(frozen=True)
class Exhibit:
    """A file of the folder with its caption; `rows` names a picture's rows, top to bottom."""

    file: str
    caption: str
    rows: Sequence[str] | None = None


@dataclass(frozen=True)
class Summary:
    """What a study asked and found; blank lines separate the paragraphs of its answer."""

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


def build(folder: Path) -> Path:
    """Write `report.html` into a summary folder and return its path.

    Raises:
        UserError: a file that the summary needs or names is missing.
    """
    summary = read_summary(folder)
    first, *_ = markup.split(summary.question)
    body = [
        heading(summary),
        answer(summary),
        markup.section("Figures", images(folder, summary.figures, 1)),
        markup.section("Tables", tables(folder, summary.tables)),
        markup.section("Pictures", images(folder, summary.pictures, len(summary.figures) + 1)),
        markup.section("How it was made", [origin(summary)]),
        markup.section("Runs", [run_list(folder, summary)]),
    ]
    return _write(folder / "report.html", markup.page(f"{summary.name}: {first}", body))


def index(reports: Iterable[Path], out: Path) -> Path:
    """Write a page that leads to several reports, with each one's question and answer.

    Args:
        reports: files that `build` returned, `summary.json` beside each.
        out: the page; its links are relative to it.

    Raises:
        UserError: a report or its summary is missing.
    """
    entries = []
    for report in reports:
        summary = read_summary(_present(report).parent)
        address = quote(Path(os.path.relpath(report, out.parent)).as_posix())
        entries.append(f"<article>{heading(summary, address)}{answer(summary)}</article>")
    return _write(out, markup.page("Studies", ["<h1>Studies</h1>", *entries]))


def read_summary(folder: Path) -> Summary:
    """Read the `summary.json` of a folder.

    Raises:
        UserError: it is missing, or is not what a summary is.
    """
    path = _present(folder / "summary.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values = {field.name: values[field.name] for field in fields(Summary)}
        for kind in ("figures", "pictures", "tables"):
            values[kind] = [Exhibit(**exhibit) for exhibit in values[kind]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the summary of a study ({error!r})") from error
    return Summary(**values)


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    with _present(path).open(encoding="utf-8", newline="") as file:
        header, *body = csv.reader(file)
    return header, body


def _present(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} is missing: a report cannot be made without it")
    return path


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def heading(summary: Summary, address: str | None = None) -> str:
    """Write a study's name above its question; with an address, as an entry that leads there."""
    names = [f"Study {summary.study}", f"dataset {summary.dataset}"]
    if summary.name != f"{summary.study}-{summary.dataset}":
        names.append(summary.name)
    question, *more = markup.split(summary.question)
    title = f"<h1>{escape(question)}</h1>"
    if address is not None:
        title = f'<h2><a href="{escape(address)}">{escape(question)}</a></h2>'
    above = f'<p class="names">{escape(" · ".join(names))}</p>'
    return f"<header>{above}{title}{markup.paragraphs(more)}</header>"


def answer(summary: Summary) -> str:
    """Write a study's answer."""
    return f'<div class="answer">{markup.paragraphs(markup.split(summary.answer))}</div>'


def images(folder: Path, exhibits: Sequence[Exhibit], first: int) -> list[str]:
    """Write figures or pictures, numbered from `first`."""
    return [
        markup.captioned(
            "Figure", n, e.caption, markup.image(_present(folder / e.file), e.caption, e.rows or ())
        )
        for n, e in enumerate(exhibits, first)
    ]


def tables(folder: Path, exhibits: Sequence[Exhibit]) -> list[str]:
    """Write tables of formatted cells."""
    return [
        markup.captioned("Table", n, e.caption, markup.table(*_read_csv(folder / e.file)))
        for n, e in enumerate(exhibits, 1)
    ]


def origin(summary: Summary) -> str:
    """Write what made the study: command, settings, versions, and where its runs are."""
    places = {
        "dataset digest": summary.dataset_digest,
        "MLflow experiment": f"{summary.study}-{summary.dataset} (id {summary.experiment_id})",
        "tracking store": without_password(summary.tracking_uri),
    }
    parts = {"Settings": summary.settings, "Versions": summary.versions, "Places": places}
    lists = (f"<h3>{title}</h3>{markup.facts(values)}" for title, values in parts.items())
    return "\n".join([f"<pre>{escape(summary.command)}</pre>", *lists])


def run_list(folder: Path, summary: Summary) -> str:
    """Write the folded list of runs, the id of each leading to its page in MLflow."""
    header, body = _read_csv(folder / "runs.csv")
    runs = [dict(zip(header, row, strict=True)) for row in body]
    cells = [
        [run["name"], run["seed"], *(metric(run, name) for name in RUN_METRICS), run["run_id"]]
        for run in runs
    ]
    store = without_password(summary.tracking_uri)
    server = store.rstrip("/") if store.startswith(("http://", "https://")) else ""
    pages = f"{server or UI}/#/experiments/{quote(summary.experiment_id)}/runs"
    links = {run["run_id"]: f"{pages}/{quote(run['run_id'])}" for run in runs}
    listed = markup.table(["name", "seed", *RUN_METRICS, "run id"], cells, links)
    start = f"<pre>.venv/bin/mlflow ui --backend-store-uri {escape(shlex.quote(store))}</pre>"
    note = "<p>Metrics of the test split. A run id leads to its page in MLflow"
    note += ".</p>" if server else f", which this starts:</p>{start}"
    return f"<details><summary>All {len(runs)} runs</summary>{note}{listed}</details>"


def metric(run: Mapping[str, str], name: str) -> str:
    """Write a metric of a run; a dash for one that the run does not have."""
    value = run.get(name, "")
    return format(float(value), RUN_METRICS[name]) if value else "–"


def without_password(uri: str) -> str:
    """Return an address without the user and password that it may hold."""
    place = urlsplit(uri).netloc
    return uri.replace(place, place.rpartition("@")[2], 1) if "@" in place else uri


def fetch(study: str, dataset: str, name: str, tracking_uri: str | None = None) -> Path:
    """Download a study's summary folder into the `reports` folder of its store.

    Args:
        study: such as "kl_weight".
        dataset: the one it ran on.
        name: the study's name, as tagged.
        tracking_uri: MLflow tracking URI; None means the default store.

    Raises:
        UserError: there is no finished summary, or its files cannot be downloaded.
    """
    from harness import tracking  # loads mlflow, for which --help need not wait

    store = tracking.connect(tracking_uri)
    done = "tags.role = 'summary' and attributes.status = 'FINISHED'"
    runs = tracking.read_runs(store, f"{study}-{dataset}", done)
    mine = [run["run_id"] for run in runs if run["tags"].get("study") == name]
    if not mine:
        command = f"python -m studies.{study} --dataset {dataset}"
        command += "" if name == f"{study}-{dataset}" else f" --study-name {shlex.quote(name)}"
        where = without_password(store.uri)
        raise UserError(f"{where} has no finished summary of {name!r}; first run: {command}")
    folder = store.home / "reports" / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        store.client.download_artifacts(mine[-1], "", str(folder))
    except Exception as error:  # any store's: the file system's, a server's, MLflow's
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"summary run {mine[-1]} cannot be downloaded ({reason})") from error
    return folder


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all options")


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: an argument is missing or unknown.
    """
    parser = _Parser(prog="python -m analysis.report", description="Write a study's report.")
    parser.add_argument("study", metavar="STUDY", help="such as kl_weight")
    parser.add_argument("--dataset", default="digits", help="the one it ran on (digits)")
    parser.add_argument("--study-name", metavar="NAME", help="its name (STUDY-DATASET)")
    parser.add_argument("--tracking-uri", metavar="URI", help="where MLflow keeps its runs")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> None:
    """Write a report from the command line; bad input ends it with one line and exit code 2."""
    try:
        asked = parse(args)
        name = asked.study_name or f"{asked.study}-{asked.dataset}"
        print(build(fetch(asked.study, asked.dataset, name, asked.tracking_uri)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
