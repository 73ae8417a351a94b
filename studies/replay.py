"""Does a finished run come out again?

Trains one run again from its record in MLflow and compares every value of every metric that it
logged, epoch by epoch: to the last bit on the same kind of device, within a stated tolerance on
another. Exit code 0 if it reproduces, 1 if it does not. Nothing is written to the store.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import rich.box
import tyro
from rich.table import Table

from harness.config import UserError
from studies import companions
from studies.runner import stopping
from studies.runner.cli import clear_errors, read

if TYPE_CHECKING:
    from harness.data.dataset import Dataset
    from harness.records import Record
    from studies.agreement import Agreement
    from studies.companions import Companions
    from studies.runner.terminal import Terminal
    from studies.study import Study

STOPPED = "Stopped. A replay keeps nothing; the same command starts it anew."


@dataclass(frozen=True)
class ReplayOptions:
    """What a user can set on the command line of a replay.

    Attributes:
        run_id: the run's id in MLflow, as its page shows it.
        tracking_uri: where the run is (MLFLOW_TRACKING_URI, or mlflow.db in the repository).
        data_dir: folder of the MNIST family; of a run on own images, the folder of these.
        device: auto takes the kind of the record where there is one, otherwise the CPU.
    """

    run_id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_ID")]
    tracking_uri: str | None = None
    data_dir: Path = Path("data")
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main(args: Sequence[str] | None = None) -> None:
    """Replay a run from the command line; exit code 0, 1, or 2 for bad input."""
    with clear_errors(args, STOPPED) as console:
        options = read(ReplayOptions, "replay", __doc__ or "", args)
        sys.exit(0 if execute(options, console) else 1)


def execute(options: ReplayOptions, console: Terminal) -> bool:
    """Train a run again and show how it agrees with its record.

    Returns:
        Whether it reproduces.

    Raises:
        UserError: there is no such run, it cannot be trained again, or its data are other ones.
    """
    # After parsing, so that --help and misspelt options answer at once.
    import harness
    from studies import agreement
    from studies.measures import WALL_CLOCK

    store = harness.records.open_existing(options.tracking_uri)
    record = harness.records.read_record(store, options.run_id)
    then = record.made_with
    study, data = study_of(record), load(record, options.data_dir)
    device = device_for(then["device"]["kind"], options.device)
    replay = Replay(*companions.read(store, record, device), study, data, device)
    now = harness.provenance.provenance(replay.data, replay.device)
    introduce(console, record, replay, harness.provenance.differences(then, now))
    with harness.provenance.blas_threads(then["threads"]["blas"]):
        values = retrain(replay, console)
    steps = then["dataset"]["images"]["train"] // record.config.batch_size
    same_device = then["device"] == now["device"]
    rule = agreement.exact if same_device else agreement.rounding(steps)
    found = agreement.compare(record.values, values, rule, WALL_CLOCK)
    console.out.print(table(found))
    if found.new:
        console.out.print(f"Computed now, but not logged then: {', '.join(found.new)}.")
    console.out.print(agreement.verdict(found), soft_wrap=True)
    return found.reproduces


@dataclass(frozen=True)
class Replay:
    """What is trained again, and where.

    Attributes:
        stack: the runs that it is trained with, itself among them.
        own: its place among them.
        study: whose point it is, None for a search's run.
        data: its dataset.
        device: "cpu" or "cuda".
    """

    stack: Companions
    own: int
    study: Study | None
    data: Dataset
    device: str


def study_of(record: Record) -> Study | None:
    """Return the study whose point a run is, None for a search's run.

    Raises:
        UserError: no study of that name is known here.
    """
    from studies.all import STUDIES

    name = record.made_with["study"]
    known = {study.name: study for study in STUDIES}
    if name is not None and name not in known:
        raise UserError(
            f"run {record.run_id} is of study {name!r}, which is none of {', '.join(known)}; add "
            "it to STUDIES in studies/all.py"
        )
    return known.get(name)


def load(record: Record, data_dir: Path) -> Dataset:
    """Load the dataset of a record.

    Raises:
        UserError: it cannot be loaded, or is not the one that the run was trained on.
    """
    import harness

    then = record.made_with["dataset"]
    if then["name"].startswith("folder-"):
        data = harness.load_dataset(f"folder:{data_dir}", image_size=then["image_shape"][1:])
    else:
        data = harness.load_dataset(then["name"], data_dir)
    now = harness.provenance.dataset(data)
    for part in ("digest", "images"):
        if then[part] != now[part]:
            raise UserError(
                f"{then['name']} in {data_dir} is not the dataset of run {record.run_id}: {part} "
                f"{then[part]} then, {now[part]} now; name the folder of that dataset with "
                "--data-dir"
            )
    return data


def device_for(recorded: str, asked: str) -> str:
    """Return the kind of device to train on: as asked, else as recorded if there is one here."""
    from harness.training.engine import resolve_device

    wanted = asked if asked != "auto" else recorded if recorded == "cpu" else "auto"
    return resolve_device(wanted).type


def retrain(replay: Replay, console: Terminal) -> dict[tuple[str, int], float]:
    """Train a run again as a study does.

    Returns:
        All that a study would log of it: (metric, epoch) -> value.
    """
    import harness
    from studies.measures import course_value, epoch_metrics, final_metrics, finals
    from studies.question import Trained

    stack, study = replay.stack, replay.study
    values: dict[tuple[str, int], float] = {}
    course: list[float] = []
    epochs = stack.configs[replay.own].epochs
    with console.progress(len(stack.configs), len(stack.configs), epochs) as on_epoch:
        for record in harness.train(stack.configs, replay.data, replay.device):
            row = record.rows.index(replay.own)
            metrics = epoch_metrics(record, row)
            values |= {(name, record.epoch): value for name, value in metrics.items()}
            course.append(course_value(metrics, study))
            stack.drop(record)
            on_epoch(record)
            stopping.check()
    ends = dict(finals(record, replay.data))[row]
    run = Trained(record.configs[row], record.model(row))
    final = final_metrics(run, ends, course, replay.data, study)
    return values | {(name, epochs): value for name, value in final.items()}


def introduce(
    console: Terminal, record: Record, replay: Replay, differences: Sequence[str]
) -> None:
    """Say what will be trained, and what is not as it was."""
    width, epochs = len(replay.stack.configs), record.config.epochs
    company = f" in its stack of {width}" if width > 1 else ""
    console.out.print(
        f"Training run {record.name!r} again: {epochs} epoch{'s'[: epochs > 1]} on "
        f"{replay.data.name}{company}, on {replay.device}.",
        soft_wrap=True,
    )
    if not differences:
        console.out.print("Code, versions, device and data are those of the record.")
    for line in differences:
        console.out.print(f"  {line}", soft_wrap=True)


def table(found: Agreement) -> Table:
    """Lay out the agreement of each part of the metrics: train, val, test, ..."""
    shown = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("metrics")
    for name in ("values", "equal"):
        shown.add_column(name, justify="right")
    for name in ("worst difference", "of its scale", "where"):
        shown.add_column(name)
    for name, part in found.parts().items():
        shown.add_row(f"{name}/...", f"{len(part.gaps):,}", f"{part.equal:,}", *_largest(part))
    return shown


def _largest(part: Agreement) -> tuple[str, str, str]:
    from studies.agreement import percent

    (metric, epoch, then), now, share, _ = part.worst
    if share == 0:
        return "none", "", ""
    return f"{now - then:.3g}", percent(share), f"{metric}, epoch {epoch}"


if __name__ == "__main__":
    main()
