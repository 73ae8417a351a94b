"""What a run costs in a store that grows: seconds, bytes written, reading back, a small study.

`python -m benchmarks.growing_store [--runs 100 1000 10000]` trains runs of 2 epochs on digits into
one new store until it has each of these numbers, by studies of `kl_weight`. After each it reads all
runs back as a frame and runs a study of 4 runs in that store. Bytes are those that the study's
process wrote to the disk; kept are those that the store and its artifacts have grown by.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis import frames
from benchmarks import machine
from harness.training.engine import resolve_device

VALUES = ("0.001", "0.01", "0.02", "0.05", "0.1", "0.3", "1", "3", "10", "30")
HEADER = (
    *("runs", "s a run", "CPU s a run", "kB written a run", "kB kept a run"),
    *("s, read", "s, 4 runs"),
)


def main() -> None:
    """Grow the store and print."""
    parser = machine.parser("growing_store", __doc__, device=False)
    parser.add_argument("--runs", type=int, nargs="+", default=[100], help="default: 100")
    args, rows, there = parser.parse_args(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for runs in sorted(args.runs):
            seeds, before = max(1, (runs - there) // len(VALUES)), size(home)
            words = ("--values", *VALUES, "--seeds", str(seeds), "--study-name", f"to-{runs}")
            costs = measured(lambda: study(home, *words))  # noqa: B023 - called at once
            new, kept = seeds * len(VALUES), (size(home) - before) / 1000
            there += new
            seconds, cpu, written = (cost / new for cost in costs)
            read = measured(lambda: read_all(home, args.runs, runs))[0]  # noqa: B023
            words = ("--values", "0.02", "1", "--seeds", "2", "--study-name", f"at-{runs}")
            small = measured(lambda: study(home, *words))[0]  # noqa: B023
            there += 4
            row = [f"{seconds:.2f}", f"{cpu:.2f}", f"{written:,.0f}", f"{kept / new:,.0f}"]
            rows.append([f"{there:,}", *row, f"{read:.1f}", f"{small:.1f}"])
            print(" | ".join(rows[-1]), file=sys.stderr)
    print("\n".join(machine.hardware(resolve_device("cpu"), "mlflow", "optuna")))
    print("Runs of 2 epochs on digits; n = 1.\n")
    print(machine.table(HEADER, rows))


def read_all(home: Path, numbers: Sequence[int], last: int) -> None:
    """Read the runs of all large studies so far as frames."""
    for number in numbers:
        if number <= last:
            frames.load_study(f"to-{number}", tracking_uri=address(home))


def study(home: Path, *words: str) -> None:
    """Run a study of runs of 2 epochs; figures and report count too."""
    command = [sys.executable, "-m", "studies.kl_weight", "--epochs", "2", *words]
    command += ["--tracking-uri", address(home), "--storage", f"sqlite:///{home}/optuna.db"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def address(home: Path) -> str:
    """Return the tracking URI."""
    return f"sqlite:///{home}/mlflow.db"


def measured(work: Callable[[], object]) -> tuple[float, float, float]:
    """Return seconds, CPU seconds and kB written of the processes that a function waits for.

    Workers of a study are not among them.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    work()
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, (after.ru_oublock - before.ru_oublock) * 0.512


def size(folder: Path) -> int:
    """Return how many bytes the files of a folder have."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
