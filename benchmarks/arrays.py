"""Training from a file that is mapped: images per second against memory, and memory of 10 GB.

`python -m benchmarks.arrays --data-dir DIR` repeats MNIST's training images in a .npy file, trains
it in memory and mapped by turns, the first uncounted, and prints a section for
benchmarks/RESULTS.md. With `--gigabytes 10` it begins an epoch of a file of that size in a process
of its own instead, whose anonymous memory (RssAnon of /proc/self/status) a thread reads. Buffers
and metrics have their whole size; only the steps are cut.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine
from benchmarks.networks import FOREVER, harness
from harness import RunConfig, evaluate, load_dataset, train
from harness.data import array
from harness.data.mnist import read_official
from harness.linear.pca import pca
from harness.training.engine import resolve_device
from harness.training.step import PART, Drawn, Step

PAUSE = 0.05
"""Seconds between two looks at the memory."""

PARTS = 3
"""Parts of an epoch, read at once, that are trained of the file of many gigabytes."""


@machine.clear_errors()
def main() -> None:
    """Write a file, measure and print."""
    args = parse()
    if args.inside:
        train_large(args.inside, args.device)
        return
    device = resolve_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.npy"
        size = write(file, args.data_dir, args.gigabytes or args.megabytes / 1000)
        if args.gigabytes:
            command = [sys.executable, "-m", "benchmarks.arrays", "--inside", str(file)]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = f"A file of {size / 1e9:.1f} GB, blog's recipe: {child.stdout}"
            print("\n".join([*machine.hardware(device), found]))
            return
        rows = list(rates(file, device, args))
    settings = (
        f"{size / 1e6:.0f} MB of MNIST's training images, blog's recipe, {args.repeats} "
        f"interleaved turns of {args.steps} steps a run; medians, and ranges of ratios of a turn."
    )
    header = ["runs", "in memory", "mapped", "mapped / in memory", "range"]
    print("\n".join([*machine.hardware(device), settings, "", machine.table(header, rows)]))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = machine.parser("arrays", __doc__)
    parser.add_argument("--megabytes", type=float, default=200, help="of the file; default: 200")
    parser.add_argument("--gigabytes", type=float, help="of a file that is trained for its memory")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each; default: 7")
    parser.add_argument("--steps", type=int, default=2000, help="of a turn; default: 2000")
    parser.add_argument("--runs", type=int, default=4, help="of a stack; default: 4")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write(file: Path, data_dir: Path, gigabytes: float) -> int:
    """Write MNIST's training images to a .npy file, again and again; return its bytes."""
    images = read_official("mnist", data_dir, train=True)[0].numpy()
    count = int(gigabytes * 1e9 / images[0].nbytes)
    made = np.lib.format.open_memmap(file, "w+", np.uint8, (count, *images.shape[1:]))
    for start in range(0, count, len(images)):
        made[start : start + len(images)] = images[: count - start]
    made.flush()
    return file.stat().st_size


def rates(file: Path, device: torch.device, args: argparse.Namespace) -> Iterator[list[str]]:
    """Yield a row of the table for one run and for several."""
    sets = []
    for array.SHARE in (1, 0):
        data = load_dataset(f"array:{file}")
        cut = {"train": data.train.head(32 * args.steps), "val": data.val.head(100)}
        sets.append(replace(data, **cut))
    for runs in (1, args.runs):
        recipe = RunConfig.seed_recipe(epochs=FOREVER)
        configs = [recipe.replace(seed=seed) for seed in range(runs)]
        kinds = [harness(configs, data, device) for data in sets]
        turns = [[next(kind) for kind in kinds] for _ in range(args.repeats + 1)][1:]
        for kind in kinds:
            kind.close()
        each = [machine.spread(values)[0] for values in zip(*turns, strict=True)]
        ratio = machine.spread([from_file / memory for memory, from_file in turns], 2)
        yield [str(runs), *each, *ratio]


def train_large(file: Path, device: str) -> None:
    """Train the first parts of an epoch and evaluate; print seconds and most anonymous memory."""
    train_all = Step.train

    def train_first(step: Step, parts: Iterator[Drawn], epoch: int) -> None:
        train_all(step, islice(parts, PARTS), epoch)

    Step.train = train_first  # type: ignore[method-assign]
    config, rows = RunConfig.seed_recipe(epochs=1), list[list[str]]()
    array.SHARE = 0  # on a machine with more memory, too
    with stage("file read, checked and split", rows):
        data = load_dataset(f"array:{file}")
    with stage("principal components", rows):
        pca(data)
    with stage("epoch with its metrics", rows):
        (record,) = train([config], data, device)
    with stage("final metrics", rows):
        evaluate([(config, record.model(0))], data)
    trained, size = PARTS * PART / data.pixels, len(data.train)
    print(f"{size:,.0f} images of training, of which {trained:,.0f} are seen.\n")
    print(machine.table(["stage", "seconds", "anonymous memory, GB"], rows))


@contextmanager
def stage(name: str, rows: list[list[str]]) -> Iterator[None]:
    """Add a row with the seconds of a stage and the most anonymous memory meanwhile; Linux only."""
    peak, ended, start = 0, threading.Event(), time.perf_counter()

    def look() -> None:
        nonlocal peak
        while not ended.wait(PAUSE):
            lines = Path("/proc/self/status").read_text().splitlines()
            now = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            peak = max(peak, now)

    thread = threading.Thread(target=look)
    thread.start()
    yield
    ended.set()
    thread.join()
    rows.append([name, f"{time.perf_counter() - start:,.0f}", f"{peak * 1024 / 1e9:.2f}"])
    print(*rows[-1], sep=", ", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
