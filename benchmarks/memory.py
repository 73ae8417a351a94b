"""Memory of many MNIST runs trained in one process with its workers, and on a GPU.

`python -m benchmarks.memory --data-dir DIR` trains the blog's recipe in a process of its own and
reads the proportional set size (PSS: a page shared by n processes counts 1/n in each) of that
process and all it started, from /proc/PID/smaps_rollup, until it ends. Data and the buffers of an
epoch have their whole size; only the steps of an epoch are cut, which changes no buffer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from harness import RunConfig, load_dataset, train
from harness.training import engine
from harness.training.step import Draw, Drawn, Measured, Step

PAUSE = 0.2
"""Seconds between two looks."""

EPOCHS = 3
"""Long enough for every worker to have had every run's buffers."""

STEPS = 5
"""Steps taken of each epoch."""

MIB = 2**20

compute, train_all = engine._compute, Step.train


def main() -> None:
    """Train in a process of its own and watch it, or be that process."""
    args = parse()
    if args.inside:
        with machine.clear_errors():
            train_cut(args)
        return
    options = ["--data-dir", str(args.data_dir), "--runs", str(args.runs), "--device", args.device]
    command = [sys.executable, "-m", "benchmarks.memory", "--inside", *options]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak, processes = watch(child)
    printed, _ = child.communicate()
    if child.returncode:
        sys.exit(child.returncode)
    print("\n".join(machine.hardware(engine.resolve_device(args.device))))
    print(
        f"{args.runs} MNIST runs of the blog's recipe: {peak / MIB:,.0f} MiB at most (PSS of "
        f"{processes} processes together), {peak / 1e9:.2f} GB. {printed.strip()}"
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = machine.parser("memory", __doc__)
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def train_cut(args: argparse.Namespace) -> None:
    """Train some steps of each epoch, and say what a GPU held."""
    engine._compute = first_steps
    data = load_dataset("mnist", args.data_dir)
    configs = [RunConfig.seed_recipe(seed=seed, epochs=EPOCHS) for seed in range(args.runs)]
    for record in train(configs, data, args.device):
        print(f"epoch {record.epoch} of {EPOCHS}", file=sys.stderr)
    if engine.resolve_device(args.device).type == "cuda":
        held = torch.cuda.max_memory_allocated() / args.runs / MIB
        print(f"GPU memory per run: {held:.1f} MiB.")


def first_steps(*given: Any) -> Measured:  # noqa: ANN401 - as `engine._compute`
    """Train the first steps of an epoch; workers are sent this function, as `__main__` has it."""
    Step.train = train_first  # type: ignore[method-assign]
    return compute(*given)


def train_first(step: Step, parts: Iterable[Drawn], epoch: int) -> None:
    """Take the first steps of an epoch that is drawn whole."""
    ((images, draw),) = parts
    few = Draw(*(None if part is None else part[:STEPS] for part in draw))
    train_all(step, [(images, few)], epoch)


def watch(child: subprocess.Popen[str]) -> tuple[int, int]:
    """Return the most bytes that a process and its children held together, and how many they were.

    Linux only.
    """
    peak, most = 0, 0
    while child.poll() is None:
        held = [size for size in map(pss, family(child.pid)) if size]
        peak, most = max(peak, sum(held)), max(most, len(held))
        time.sleep(PAUSE)
    return peak, most


def family(process: int) -> list[int]:
    """Return a process and all that it started, directly or not."""
    found = [process]
    for one in found:  # grows while it is read
        try:
            tasks = list(Path(f"/proc/{one}/task").iterdir())
            found += [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
        except OSError:  # it has just ended
            continue
    return found


def pss(process: int) -> int:
    """Return a process's proportional set size in bytes, 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
