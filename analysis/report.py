"""One self-contained HTML report per study, made from nothing but its summary folder."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from analysis import markup, summaries
from analysis.summaries import Exhibit, Summary
from harness.config import UserError
from harness.tracking.addresses import without_password

UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` answers."""

RUN_METRICS = {"neg_elbo": ".2f", "mse": ".4f", "rate": ".2f"}
"""Test metrics in the list of runs, and how they are written."""


def build(folder: Path) -> Path:
    """Write `report.html` into a summary folder and return its path."""
    summary = summaries.read(folder)
    first, *_ = markup.split(summary.question)
    body = [
        heading(summary),
        answer(summary),
        markup.section("Figures", images(folder, summary.figures, 1)),
        markup.section("Numbers", tables(folder, summary.tables)),
        markup.section("Pictures", images(folder, summary.pictures, len(summary.figures) + 1)),
        markup.section("How it was made", [origin(summary)]),
        markup.section("Runs", [run_list(folder, summary)]),
    ]
    return _write(folder / "report.html", markup.page(f"{summary.name}: {first}", body))


def index(reports: Iterable[Path], out: Path) -> Path:
    """Write a page that leads to several reports, with each one's question and answer.

    The reports are files that `build` returned, `summary.json` beside each.
    """
    entries = []
    for report in reports:
        summary = summaries.read(summaries.present(report.parent, report.name).parent)
        address = quote(Path(os.path.relpath(report, out.parent)).as_posix())
        entries.append(f"<article>{heading(summary, address)}{answer(summary)}</article>")
    return _write(out, markup.page("Studies", ["<h1>Studies</h1>", *entries]))


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
    written = []
    for number, exhibit in enumerate(exhibits, first):
        path = summaries.present(folder, exhibit.file)
        image = markup.image(path, exhibit.caption, exhibit.rows or ())
        written.append(markup.captioned("Figure", number, exhibit.caption, image))
    return written


def tables(folder: Path, exhibits: Sequence[Exhibit]) -> list[str]:
    """Write tables of formatted cells."""
    written = []
    for number, exhibit in enumerate(exhibits, 1):
        table = markup.table(*summaries.read_cells(folder, exhibit.file))
        written.append(markup.captioned("Table", number, exhibit.caption, table))
    return written


def origin(summary: Summary) -> str:
    """Write what made the study: command, settings, versions, and where its runs are."""
    places = {
        "dataset digest": summary.dataset_digest,
        "MLflow experiment": f"{summary.study}-{summary.dataset} (id {summary.experiment_id})",
        "tracking store": without_password(summary.tracking_uri),
    }
    parts = {
        "Settings": summary.settings,
        "Versions": summary.versions,
        "Data and tracking": places,
    }
    lists = (f"<h3>{title}</h3>{markup.facts(values)}" for title, values in parts.items())
    return "\n".join([f"<pre>{escape(summary.command)}</pre>", *lists])


def run_list(folder: Path, summary: Summary) -> str:
    """Write the folded list of runs, the id of each leading to its page in MLflow."""
    header, rows = summaries.read_cells(folder, "runs.csv")
    runs = [dict(zip(header, row, strict=True)) for row in rows]
    best = [name.removeprefix("best/") for name in header if name.startswith("best/")]
    pairs = [("epochs" if name == "epoch" else name, f"best/{name}") for name in best]
    shown = [*RUN_METRICS, *(name for pair in pairs for name in pair)]
    cells = [
        [run["name"], run["seed"], *(metric(run, name) for name in shown), run["run_id"]]
        for run in runs
    ]
    store = without_password(summary.tracking_uri)
    server = store.rstrip("/") if store.startswith(("http://", "https://")) else ""
    pages = f"{server or UI}/#/experiments/{quote(summary.experiment_id)}/runs"
    links = {run["run_id"]: f"{pages}/{quote(run['run_id'])}" for run in runs}
    listed = markup.table(["name", "seed", *shown, "run id"], cells, links)
    command = f"mlflow ui --workers 1 --backend-store-uri {shlex.quote(store)}"
    start = f"<pre>{escape(command)}</pre>"
    note = (
        "<p>Metrics of the test split; val/ and best/ on validation data, after the last epoch and "
    )
    note += "in the best. A run id leads to its page in MLflow"
    note += ".</p>" if server else f", which this starts:</p>{start}"
    return f"<details><summary>All {len(runs)} runs</summary>{note}{listed}</details>"


def metric(run: Mapping[str, str], name: str) -> str:
    """Write a metric of a run; a dash for one that the run does not have."""
    value = run.get(name, "")
    if not value:
        return "–"
    style = ".0f" if "epoch" in name else RUN_METRICS[name.rpartition("/")[2]]
    return format(float(value), style)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all options")


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
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
        print(build(summaries.fetch(asked.study, asked.dataset, name, asked.tracking_uri)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
