"""Training images per second: the blog's loop, one run of the harness, stacks of runs, and peers.

`python -m benchmarks.throughput --data-dir DIR` prints a section for benchmarks/RESULTS.md. Each
contestant has processes of its own and they take turns, so that a change of the machine's load
meets all of them; a ratio is taken within a turn, and its median is shown. `--peers` adds pythae, a
JAX twin of the step and a plain PyTorch loop: `pip install -e '.[peers]'` brings what they need.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import IO

from benchmarks import machine
from harness.config import UserError
from harness.data.load import load_dataset
from harness.data.mnist import TORCHVISION
from harness.training.engine import resolve_device

STACKS = {"cpu": (1, 2, 16), "cuda": (1, 64)}
PEERS = ("pythae", "jax", "optax")


@dataclass(frozen=True)
class Entry:
    """A contestant as the table shows it.

    Attributes:
        label: its row.
        name: its name in `benchmarks.contestant`.
        runs: trained together in a process.
        each_core: whether a process a core takes part, each on one thread, their rates summed.
    """

    label: str
    name: str
    runs: int = 1
    each_core: bool = False


@machine.clear_errors()
def main() -> None:
    """Measure and print."""
    args = parse()
    device = resolve_device(args.device)
    load_dataset(args.dataset, args.data_dir)
    rates = measure(entries(device.type, peers=args.peers), args, device.type)
    versions = machine.hardware(device, *(PEERS if args.peers else ()))
    print("\n".join([*versions, *settings(args), "", table(rates)]))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = machine.parser("throughput", __doc__)
    parser.add_argument("--dataset", choices=TORCHVISION, default="mnist")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each; default: 5")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn; default: 2")
    parser.add_argument("--steps", type=int, default=300, help="of a round; default: 300")
    parser.add_argument("--peers", action="store_true", help="also pythae, JAX, plain PyTorch")
    return parser.parse_args()


def entries(device: str, *, peers: bool) -> dict[str, Entry]:
    """Return who takes part, by label; the blog's loop first.

    Raises:
        UserError: peers are asked for and not installed.
    """
    on_cpu = device == "cpu"
    listed = [Entry("the blog's loop", "blog")]
    if on_cpu:
        listed.append(Entry("the blog's loop, one a core", "blog", each_core=True))
    if peers:
        missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"--peers needs {', '.join(missing)}, not installed here; install them with "
                "pip install -e '.[peers]', or leave --peers out"
            )
        listed.append(Entry("pythae", "pythae"))
        if on_cpu:
            listed.append(Entry("pythae, one a core", "pythae", each_core=True))
        listed.append(Entry("plain loop in memory", "eager", each_core=on_cpu))
        listed.append(Entry("JAX twin", "jax", runs=1 if on_cpu else 64, each_core=on_cpu))
    for runs in STACKS[device]:
        what = "one run" if runs == 1 else f"stack of {runs}"
        listed.append(Entry(f"harness, {what}", "harness", runs))
    return {entry.label: entry for entry in listed}


class Team:
    """The processes of an entry, which take turns once they are ready; `log` keeps their words."""

    def __init__(self, entry: Entry, args: argparse.Namespace, device: str, log: IO[str]) -> None:
        self.log = log
        command = [sys.executable, "-m", "benchmarks.contestant", entry.name]
        for option in ("dataset", "data_dir", "steps", "seconds"):
            command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
        command += ["--runs", str(entry.runs), "--device", device]
        cores = len(os.sched_getaffinity(0)) if entry.each_core else 0
        pinned = [["--core", str(core)] for core in range(cores)] or [[]]
        pipe = subprocess.PIPE
        self.processes = [
            subprocess.Popen([*command, *pin], stdin=pipe, stdout=pipe, stderr=log, text=True)
            for pin in pinned
        ]

    def ready(self) -> None:
        """Wait until every process has warmed up."""
        for process in self.processes:
            self.answer(process)

    def answer(self, process: subprocess.Popen[str]) -> str:
        """Wait for a line of a process."""
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"a contestant ended before its turn:\n{self.log.read()[-2000:]}")
        return line.strip()

    def turn(self) -> float:
        """Let all processes train at once; return the sum of their images per second."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return sum(float(self.answer(process)) for process in self.processes)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.communicate()


def measure(
    listed: dict[str, Entry], args: argparse.Namespace, device: str
) -> dict[str, list[float]]:
    """Let the contestants take turns, the first uncounted; return all rates of each."""
    rates: dict[str, list[float]] = {label: [] for label in listed}
    with contextlib.ExitStack() as stack:
        teams = {}
        for label, entry in listed.items():
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            teams[label] = stack.enter_context(Team(entry, args, device, log))
        for team in teams.values():
            team.ready()
        for number in range(args.repeats + 1):
            for label, team in teams.items():
                rates[label].append(team.turn())
                latest = f"{label}: {rates[label][-1]:,.0f}/s"
                print(f"{number}/{args.repeats} {latest}", file=sys.stderr, flush=True)
    return {label: counted for label, (_, *counted) in rates.items()}


def settings(args: argparse.Namespace) -> list[str]:
    """Say what was trained, in a line."""
    return [
        f"{args.dataset}, the blog's recipe in float32, batch 32, Adam; {args.repeats} interleaved "
        f"turns of at least {args.seconds:g} s; medians, ranges and ratios within a turn."
    ]


def table(rates: dict[str, list[float]]) -> str:
    """Return a Markdown table: rates over all runs, against the first row, and the last to each."""
    first, last = next(iter(rates.values())), list(rates.values())[-1]
    rows = []
    for label, values in rates.items():
        to_blog = machine.spread([a / b for a, b in zip(values, first, strict=True)], 2)
        of_last = machine.spread([a / b for a, b in zip(last, values, strict=True)], 2)
        rows.append([label, *machine.spread(values), to_blog[0], *of_last])
    header = ["what", "images/s, all runs", "range", "times blog", "last row / this", "range"]
    return machine.table(header, rows)


if __name__ == "__main__":
    main()
