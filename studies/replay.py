"""Train a finished run again and compare every value that it logged.

On the CPU of the record every value must be equal to the last bit: exit code 0 if all are, 1 if
not. On a GPU or another CPU, where training amplifies other rounding, the largest difference of
each metric is shown. Nothing is written to the store.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

import harness
from harness.config import UserError
from studies.runner import stopping
from studies.runner.cli import clear_errors, read
from studies.runner.terminal import table

if TYPE_CHECKING:
    from harness.data.dataset import Dataset
    from harness.tracking.runs import Logged, Record
    from harness.training.engine import EpochRecord
    from studies.runner.study import Study
    from studies.runner.terminal import Terminal

STOPPED = "Stopped. A replay keeps nothing; the same command starts it anew."


@dataclass(frozen=True)
class ReplayOptions:
    """Options of a replay.

    Attributes:
        run: the run's id in MLflow, as its page shows it, or its key.
        tracking_uri: where the run is (MLFLOW_TRACKING_URI, or mlflow.db in the repository).
        data_dir: folder of the MNIST family; of a run on your own images, the folder of these.
        device: auto takes the kind of the record if this machine has one, otherwise the CPU.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_ID")]
    tracking_uri: str | None = None
    data_dir: Path = Path("data")
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main(args: Sequence[str] | None = None) -> None:
    """Replay a run from the command line; exit code 0, 1, or 2 for bad input."""
    with clear_errors(args, STOPPED) as terminal:
        options = read(ReplayOptions, "replay", __doc__ or "", args)
        sys.exit(0 if execute(options, terminal) else 1)


def execute(options: ReplayOptions, terminal: Terminal) -> bool:
    """Train a run again and show how its values compare with the logged ones.

    Returns:
        False if a value should be equal and is not, or was not computed again.
    """
    # After parsing, so that --help and misspelt options answer at once.
    from harness import provenance
    from harness.tracking import addresses
    from harness.tracking.record import WALL_CLOCK
    from harness.tracking.store import connect
    from harness.training.engine import resolve_device

    uri = addresses.tracking_address(options.tracking_uri)
    if addresses.is_new(uri):
        raise UserError(f"{uri} does not exist; name the store of the run with --tracking-uri")
    record = connect(uri).record(options.run)
    then = record.made_with
    try:
        study, data = study_of(then["study"]), load(record, options.data_dir)
        as_recorded = options.device == "auto" and then["device"]["kind"] == "cpu"
        device = resolve_device("cpu" if as_recorded else options.device).type
        now, threads = provenance.provenance(data, device), then["threads"]["blas"]
        differences = provenance.differences(then, now)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"provenance.json of run {record.run_id} is not complete ({error!r}); the run cannot "
            "be repeated"
        ) from error
    epochs = record.config.epochs
    terminal.line(
        f"Training run {record.name!r} again: {epochs} epoch{'s'[: epochs > 1]} on {data.name}, "
        f"on {device}."
    )
    for line in differences:
        terminal.line(f"  {line}")
    if not differences:
        terminal.line("Code, versions, device and data are those of the record.")
    with provenance.blas_threads(threads):
        values = retrain(record, study, data, device, terminal)
    found = compare([v for v in record.values if v.metric not in WALL_CLOCK], values)
    if found.gaps:
        header = ("metric", "values that differ", "largest", "epoch", "logged", "now")
        terminal.out.print(table(header, largest(found.gaps)))
    logged = {value.metric for value in record.values}
    if new := sorted({metric for metric, _ in values} - logged):
        terminal.line(f"Computed now, but not logged then: {', '.join(new)}.")
    exact = device == "cpu" and then["device"] == now["device"]
    terminal.line(verdict(found, exact=exact))
    return not found.missing and not (exact and found.gaps)


def study_of(name: str | None) -> Study | None:
    """Return the study of a name, None for None: runs of a search or of no study."""
    from studies.all import STUDIES

    known = {study.name: study for study in STUDIES}
    if name and name not in known:
        raise UserError(
            f"the run is of study {name!r}, which is none of {', '.join(known)}; add it to STUDIES "
            "in studies/all.py"
        )
    return known.get(name or "")


def load(record: Record, data_dir: Path) -> Dataset:
    """Load the dataset of a record."""
    from harness import provenance

    then = record.made_with["dataset"]
    if then["name"].startswith("folder-"):
        data = harness.load_dataset(f"folder:{data_dir}", image_size=then["image_shape"][1:])
    else:
        data = harness.load_dataset(then["name"], data_dir)
    now = provenance.dataset(data)
    for part in ("digest", "images"):
        if then[part] != now[part]:
            raise UserError(
                f"{then['name']} in {data_dir} is not the dataset of run {record.run_id}: {part} "
                f"{then[part]} then, {now[part]} now; name the folder of that dataset with "
                "--data-dir"
            )
    return data


@dataclass
class Values:
    """Takes the writes of a run and keeps its metrics in memory: (metric, epoch) -> value."""

    logged: dict[tuple[str, int], float] = field(default_factory=dict)
    batch: int = 1

    def put(self, key: str, write: Mapping[str, Any]) -> None:
        """Keep the values of a write of metrics, and nothing of others."""
        if write["kind"] == "metrics":
            self.logged |= {(metric, step): value for metric, value, _, step in write["values"]}

    def run_id(self, key: str) -> str:
        """Return the key, which is the only id."""
        return key


def retrain(
    record: Record, study: Study | None, data: Dataset, device: str, terminal: Terminal
) -> dict[tuple[str, int], float]:
    """Train a run again as a study does; return its metrics: (metric, epoch) -> value."""
    from harness.tracking import Planned
    from harness.tracking import record as recording
    from harness.tracking.runs import RunLog

    values = Values()
    run = Planned(record.config, record.run_id, record.name, {}, {})
    given: dict[str, Any] = {"objective": study.objective, "extras": study.extras} if study else {}
    with terminal.progress(1, 1) as advance:

        def on_epoch(epoch: EpochRecord) -> None:
            advance(epoch)
            stopping.check()

        def start(run: Planned) -> RunLog:
            return RunLog(values.put, run.key, {})

        recording.record([run], data, device, start, on_epoch=on_epoch, pictured=False, **given)
    return values.logged


class Gap(NamedTuple):
    """A logged value and another one that was computed now."""

    metric: str
    epoch: int
    then: float
    now: float

    @property
    def size(self) -> float:
        """The difference relative to the larger magnitude."""
        size = abs(self.now - self.then) / max(abs(self.now), abs(self.then))
        return math.inf if math.isnan(size) else size


class Comparison(NamedTuple):
    """The number of compared values, those that differ, and metrics that were not computed now."""

    values: int
    gaps: list[Gap]
    missing: list[str]


def compare(logged: Sequence[Logged], now: Mapping[tuple[str, int], float]) -> Comparison:
    """Compare logged values with (metric, epoch) -> value; NaN equals NaN, and 0 equals -0."""
    both = [Gap(*v[:2], v.value, now[v[:2]]) for v in logged if v[:2] in now]
    gaps = [g for g in both if g.then != g.now and not (math.isnan(g.then) and math.isnan(g.now))]
    return Comparison(len(both), gaps, sorted({v.metric for v in logged if v[:2] not in now}))


def largest(gaps: Sequence[Gap]) -> list[tuple[str, ...]]:
    """Return the largest difference of each metric as text, the largest of all first."""
    metrics: dict[str, list[Gap]] = {}
    for gap in sorted(gaps, key=lambda gap: -gap.size):
        name = re.sub(r"/k?\d+$", "", gap.metric)  # of all latents, classes or neighbours
        metrics.setdefault(name, []).append(gap)
    return [
        (
            *(name, f"{1 + len(others):,}", f"{100 * worst.size:.2g} %", str(worst.epoch)),
            *(f"{worst.then:.6g}", f"{worst.now:.6g}"),
        )
        for name, (worst, *others) in metrics.items()
    ]


def verdict(found: Comparison, *, exact: bool) -> str:
    """Return the outcome in a sentence; exact: values must be equal to the last bit."""
    parts = []
    if found.gaps:
        worst = max(found.gaps, key=lambda gap: gap.size)
        parts.append(
            f"{len(found.gaps):,} of {found.values:,} values differ, most of all {worst.metric} in "
            f"epoch {worst.epoch}: {worst.then!r} logged, {worst.now!r} now"
        )
    if found.missing:
        parts.append(f"logged but not computed now: {', '.join(found.missing)}")
    if not parts:
        return f"Reproduced: all {found.values:,} values are equal to the last bit."
    if not exact and found.gaps:
        parts.append("equal values are promised on the CPU of the record alone")
    start = "Not reproduced" if exact or found.missing else "Compared"
    return f"{start}: {'; '.join(parts)}."


if __name__ == "__main__":
    main()
