"""Train a finished run again and compare every value that it logged.

On the CPU of the record every value must be equal to the last bit: exit code 0 if all are, 1 if
not. On a GPU or another CPU, where training amplifies other rounding, the largest difference is
shown. Nothing is written to the store.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import harness
from harness.config import UserError
from harness.errors import reading
from studies.runner import stopping
from studies.runner.cli import clear_errors, read
from studies.runner.terminal import Terminal, counted

if TYPE_CHECKING:
    from harness.data.dataset import Dataset
    from harness.tracking.runs import Logged, Record
    from harness.training.engine import EpochRecord

STOPPED = "Stopped. A replay keeps nothing; the same command starts it anew."


@dataclass(frozen=True)
class ReplayOptions:
    """Options of a replay.

    Attributes:
        run: the run's id in MLflow, as its page shows it, or its key.
        tracking_uri: where the run is (MLFLOW_TRACKING_URI, or mlflow.db in the repository).
        data_dir: folder of the MNIST family; of a run on your own images, the folder of these.
        device: auto takes the kind of the record if this machine has one, otherwise the CPU.
        trust: execute the networks, terms and metrics of the user that the record holds as code;
            without it a terminal is asked.
        json: print the outcome as one JSON object, and all else on standard error.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_ID")]
    tracking_uri: str | None = None
    data_dir: Path = Path("data")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust: bool = False
    json: bool = False


def main(args: Sequence[str] | None = None) -> None:
    """Replay a run from the command line; exit code 0, 1, or 2 for bad input."""
    with clear_errors(args, STOPPED) as terminal:
        options = read(ReplayOptions, "replay", __doc__ or "", args)
        sys.exit(0 if _replayed(options, terminal) else 1)


def replay(run: str, data: Dataset | None = None, **options: Any) -> bool:
    """Replay a run from Python and return whether it comes out again: `replay("RUN_ID", data)`.

    `options` are those of the command line by name; `data` is the dataset of a run on tensors.
    """
    terminal = Terminal()
    with terminal.shown():
        return _replayed(ReplayOptions(run, **options), terminal, data)


def _replayed(options: ReplayOptions, terminal: Terminal, data: Dataset | None = None) -> bool:
    import threadpoolctl

    from harness import provenance  # --help answers without PyTorch
    from harness.tracking.record import WALL_CLOCK
    from harness.tracking.store import connect
    from harness.training.engine import resolve_device

    store = connect(options.tracking_uri, write=False)
    record = store.record(options.run, trust=options.trust or None)
    then = record.made_with
    data = load(record, options.data_dir, data)
    as_recorded = options.device == "auto" and then["device"]["kind"] == "cpu"
    device = resolve_device("cpu" if as_recorded else options.device).type
    now = provenance.provenance(data, device)
    changed = differences(then, now)
    epochs = counted(record.config.epochs, "epoch")
    run = f"{record.name!r} again: {epochs} on {data.name}, on {device}"
    terminal.line(f"Training run {run}.")
    for line in changed or ["Code, versions, device and data are those of the record."]:
        terminal.line(f"  {' '.join(line.split())}")
    with threadpoolctl.threadpool_limits(then["threads"]["blas"], user_api="blas"):
        values = retrain(record, data, device, terminal)
    logged = [value for value in record.values if value.metric not in WALL_CLOCK]
    exact = device == "cpu" and then["device"] == now["device"]
    passed, sentence = compare(logged, values, exact=exact)
    terminal.line(sentence)
    terminal.document |= {"run_id": record.run_id, "reproduced": passed, "answer": sentence}
    terminal.document["differences"] = changed
    return passed


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each difference of two `provenance`s but in threads, which replays set."""
    parts = ("code", "versions", "device", "dataset")
    pairs = [(f"{p} {name}", then[p].get(name), now[p][name]) for p in parts for name in now[p]]
    pairs.append(("platform", then["platform"], now["platform"]))
    return [f"{what}: {old} then, {new} now" for what, old, new in pairs if old != new]


def load(record: Record, data_dir: Path, own: Dataset | None = None) -> Dataset:
    """Load the dataset of a record, or return the given one if it is the record's."""
    then = record.made_with["dataset"]
    from harness.data.load import OWN, is_named

    if own is not None:
        if own.digest != then["digest"]:
            raise UserError(
                f"data= is not the dataset of run {record.run_id}: digest {then['digest']} then, "
                f"{own.digest} now; give the tensors and rows that it was trained on"
            )
        return own
    if not is_named(then["name"]):
        raise UserError(
            f"run {record.run_id} was trained on tensors, dataset {then['name']!r}; repeat it from "
            f"Python: studies.replay.replay({record.run_id!r}, DATA), with that dataset as DATA"
        )
    kind, dash, name = then["name"].partition("-")
    if dash and kind in OWN:
        place = name if kind == "torchvision" else data_dir
        with reading(f"dataset of run {record.run_id}, --data-dir {data_dir}"):
            given = dict(then.get("options", {}))
            if kind == "array" and "label" in given:
                given["label"] = Path(given["label"]).name  # a record chooses no folder
            data = harness.load_dataset(f"{kind}:{place}", data_dir, **given)
    else:
        data = harness.load_dataset(then["name"], data_dir)
    if then["digest"] != data.digest:
        raise UserError(
            f"{then['name']} in {data_dir} is not the dataset of run {record.run_id}: digest "
            f"{then['digest']} then, {data.digest} now; name its folder or file with --data-dir"
        )
    return data


def retrain(
    record: Record, data: Dataset, device: str, terminal: Terminal
) -> dict[tuple[str, int], float]:
    """Train a run again as a study does; return its metrics: (metric, epoch) -> value."""
    from harness.tracking import Planned
    from harness.tracking import record as recording
    from harness.tracking.runs import RunLog

    values = dict[tuple[str, int], float]()

    def put(key: str, write: Mapping[str, Any]) -> None:
        if write["kind"] == "metrics":
            values.update({(name, step): value for name, value, _, step in write["values"]})

    def start(run: Planned) -> RunLog:
        return RunLog(put, run.key, {})

    run = Planned(record.config, record.run_id, record.name, {}, {})
    best = (
        v.metric.removeprefix("best/") for v in record.values if v.metric.startswith("best/val/")
    )
    objective = next(best, "val/neg_elbo")
    advance = terminal.progress(1, 1)

    def on_epoch(epoch: EpochRecord) -> None:
        advance(epoch)
        stopping.check()

    more: dict[str, Any] = {"objective": objective, "on_epoch": on_epoch, "pictured": False}
    more["threads_per_run"] = record.threads_per_run if device == "cpu" else 1
    (result,) = recording.record([run], data, device, start, **more)
    for number, metrics in enumerate(result.history, 1):  # whole, as earlier versions logged it
        values |= {(name, number): value for name, value in metrics.items()}
    return values


def compare(
    logged: Sequence[Logged], now: Mapping[tuple[str, int], float], *, exact: bool
) -> tuple[bool, str]:
    """Return whether logged values are those of (metric, epoch) -> value, and the outcome in words.

    NaN equals NaN, and 0 equals -0. Values may differ unless they must be `exact`.
    """
    if missing := sorted({value.metric for value in logged if value[:2] not in now}):
        return False, f"Not reproduced: logged but not computed now: {', '.join(missing)}."
    sizes = [difference(value.value, now[value[:2]]) for value in logged]
    differing = len(sizes) - sizes.count(0.0)
    if not differing:
        return True, f"Reproduced: all {len(logged):,} values are equal to the last bit."
    worst = logged[sizes.index(max(sizes))]
    return not exact, (
        f"{'Not reproduced' if exact else 'Compared'}: {differing:,} of {len(logged):,} values "
        f"differ, most of all {worst.metric} in epoch {worst.step}: {worst.value!r} logged, "
        f"{now[worst[:2]]!r} now."
    )


def difference(then: float, now: float) -> float:
    """Return the difference of two values relative to the larger magnitude, inf for one NaN."""
    if then == now or (math.isnan(then) and math.isnan(now)):
        return 0.0
    size = abs(now - then) / max(abs(now), abs(then))
    return math.inf if math.isnan(size) else size


if __name__ == "__main__":
    main()
