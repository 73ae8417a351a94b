"""Seconds from the start of a study's process to the end of its first training step.

`python -m benchmarks.start_up --data-dir DIR` starts `studies.kl_weight` on MNIST in fresh
processes, stops each at its first step and prints median and range: the first study in a folder,
which creates MLflow's and Optuna's databases, and the next one. What users wait for is in it:
imports, options, reading the data, starting the runs, the exact linear model.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import machine
from harness.config import UserError
from harness.training.engine import resolve_device

STUDY = """
import sys
from studies import kl_weight
from studies.runner import cli

execute_plan = cli.execute_plan

def train_epoch(*given):
    import time
    from harness.training.step import Step

    take = Step._take

    def first(self, *inputs):
        take(self, *inputs)
        with open({file!r}, "a") as out:
            out.write(f"{{time.monotonic()}}\\n")
        time.sleep(60)

    Step._take = first
    return trained(*given)

def watched(*given):
    global trained
    from harness.training import engine
    trained, engine._compute = engine._compute, train_epoch
    return execute_plan(*given)

cli.execute_plan = watched
cli.main(kl_weight.STUDY, sys.argv[1:])
"""
"""A study whose first step, in a worker, writes down when it is done."""


@machine.clear_errors()
def main() -> None:
    """Measure and print."""
    args = parse()
    taken: dict[str, list[float]] = {"first study": [], "next study": []}
    for turn in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for which, every in taken.items():
                every.append(seconds(args, folder, which))
                print(f"{turn + 1}/{args.repeats}, {which}: {every[-1]:.2f} s", file=sys.stderr)
    print("\n".join(machine.hardware(resolve_device("cpu"))))
    print(f"studies.kl_weight on {args.dataset}, process start to the end of the first step:")
    for which, every in taken.items():
        middle, limits = machine.spread(every, 2)
        print(f"{which} in a folder: median {middle} s, {limits} s, n = {args.repeats}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = machine.parser("start_up", __doc__, device=False)
    parser.add_argument("--dataset", choices=("digits", "mnist"), default="mnist")
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    return parser.parse_args()


def seconds(args: argparse.Namespace, folder: str, name: str) -> float:
    """Start a study, wait for its first step, kill it; return the seconds in between."""
    done = Path(folder) / "done"
    done.unlink(missing_ok=True)
    options = ["--dataset", args.dataset, "--data-dir", str(args.data_dir), "--device", "cpu"]
    options += ["--storage", f"sqlite:///{folder}/optuna.db", "--study-name", name.split()[0]]
    options += ["--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    start = time.monotonic()
    study = subprocess.Popen(
        [sys.executable, "-c", STUDY.format(file=str(done)), *options],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    while study.poll() is None and not (done.exists() and done.read_text()):
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(study.pid, signal.SIGKILL)
    study.wait()
    if not done.exists():
        raise UserError("the study ended before its first step; what it printed stands above")
    return float(done.read_text().split()[0]) - start


if __name__ == "__main__":
    main()
