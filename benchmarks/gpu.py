"""All that is wanted of a GPU in six minutes: its tests, throughput, a step's kernels, memory.

`python -m benchmarks.gpu --data-dir DIR --out FOLDER` writes gpu.json and gpu.md, anew after every
part, and gpu.log with all that was printed. It needs PyTorch, NumPy, scikit-learn, safetensors and
pytest alone, and no network; a peer that is not installed is listed as failed. Each part is a
process, which may fail or take too long without harm to the others. `--short --device cpu` runs
every part on few images.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import machine
from harness.training import provenance

ROOT = Path(__file__).resolve().parents[1]

LIMIT = 350
"""Seconds of all parts together."""

STACKS = (1, 64, 8, 256)
"""Runs of a stack, in order of their worth: the last ones may lack time."""

SHORT_STACKS = (1, 2)

OUTCOME = re.compile(r" (PASSED|FAILED|SKIPPED|ERROR)\b")
Values = dict[str, Any]


@dataclass
class Part:
    """A part and what it gave.

    Attributes:
        name: its row.
        command: what runs it.
        limit: seconds that it may take.
        phases: phase -> values, or its error.
        seconds: that it took.
        error: why it ended, None if it ended well.
    """

    name: str
    command: list[str] = field(repr=False)
    limit: float
    phases: dict[str, Values] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every part; write the results after each."""
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.log").unlink(missing_ok=True)
    head, done = header(args.device), []
    end = time.monotonic() + LIMIT
    for part in plan(args):
        part.limit = min(part.limit, end - time.monotonic())
        run(part, args)
        done.append(part)
        write(head, done, args.out)
        print(f"{part.name}: {part.error or 'done'}, {part.seconds:.1f} s", file=sys.stderr)
    print((args.out / "gpu.md").read_text())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = machine.parser("gpu", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--short", action="store_true", help="few images and runs: seconds in all")
    args = parser.parse_args(arguments)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def plan(args: argparse.Namespace) -> list[Part]:
    """Return the parts in the order in which they run."""

    def measured(name: str, kind: str, limit: float, runs: int = 1) -> Part:
        command = [sys.executable, "-m", "benchmarks.gpu_parts", kind, "--runs", str(runs)]
        command += ["--device", args.device, "--data-dir", str(args.data_dir.resolve())]
        return Part(name, [*command, *(["--short"] if args.short else [])], limit)

    widths = SHORT_STACKS if args.short else STACKS
    stacks = [measured(f"stack of {runs}", "stack", 60 + runs / 8, runs) for runs in widths]
    peers = [
        measured("plain loop in memory, one run", "eager", 40),
        measured("the blog's loop", "blog", 40),
        measured(f"JAX twin, stack of {widths[1]}", "jax", 40, widths[1]),
    ]
    return [*stacks[:2], tests(args), *peers, *stacks[2:]]


def tests(args: argparse.Namespace) -> Part:
    """Return the tests marked `gpu`; modules that need MLflow are not imported where it lacks."""
    marked = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu\n" in p.read_text()]
    files = sorted(str(path.relative_to(ROOT)) for path in marked)
    options = ["-m", "gpu", "-v", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors", "--tb=short", "-rfE"]
    if args.short:
        options.append("--collect-only")
    return Part("tests", [sys.executable, "-m", "pytest", *options, *files], 100)


def run(part: Part, args: argparse.Namespace) -> None:
    """Run a part until it ends or its time is over; keep what it has printed."""
    if part.limit <= 0:
        part.error = "no time was left"
        return
    settings = {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "VAE_DATA_DIR": str(args.data_dir.resolve()),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    began, start = time.time(), time.monotonic()
    is_tests = part.name == "tests"
    command = part.command if is_tests else [*part.command, "--began", str(began)]
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        try:
            code = subprocess.run(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=os.environ | settings,
                timeout=part.limit,
                check=False,
            ).returncode
            part.error = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            part.error = f"stopped after {part.limit:.0f} s"
        part.seconds = time.monotonic() - start
        out.seek(0)
        text = out.read()
    with (args.out / "gpu.log").open("a") as log:
        log.write(f"==== {part.name}\n{text}\n")
    part.phases = counted(text) if is_tests else phases(text)


def phases(text: str) -> dict[str, Values]:
    """Return the phases among the lines that a part has printed."""
    found = {}
    for line in text.splitlines():
        if line.startswith('{"phase": '):
            values = json.loads(line)
            found[values.pop("phase")] = values
    return found


def counted(text: str) -> dict[str, Values]:
    """Return how many tests had each outcome, and the modules that could not be imported."""
    outcomes = [match[1].lower() for match in OUTCOME.finditer(text) if match[1] != "ERROR"]
    counts = {name: outcomes.count(name) for name in ("passed", "failed", "skipped")}
    modules = re.findall(r"^_+ ERROR collecting (\S+) _+$", text, re.MULTILINE)
    failed = re.findall(r"^FAILED (.*)$", text, re.MULTILINE)
    return {
        "counts": counts | {"not imported": len(modules)},
        "names": {"not imported": modules, "failed": failed},
    }


def header(device: str) -> Values:
    """Return what is measured on; without a context on the GPU, whose memory it would take."""
    code = provenance.read_code(ROOT)
    gpu = nvidia() if device == "cuda" else {"device": "no GPU", "driver": ""}
    return gpu | {
        "cpu": f"{machine.cpu_name()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": code.commit,
        "sources": code.sources[:12],
    }


def nvidia() -> dict[str, str]:
    """Return the GPU's name and its driver, as the driver gives them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        name, driver = line.splitlines()[0].split(", ")
    except (OSError, ValueError, IndexError, subprocess.CalledProcessError):
        return {"device": torch.cuda.get_device_name(), "driver": "unknown"}
    return {"device": name, "driver": driver}


def write(head: Values, done: Sequence[Part], out: Path) -> None:
    """Write gpu.json and gpu.md."""
    parts = {
        part.name: {"error": part.error, "seconds": part.seconds, "phases": part.phases}
        for part in done
    }
    (out / "gpu.json").write_text(json.dumps({"header": head, "parts": parts}, indent=1))
    (out / "gpu.md").write_text(markdown(head, done))


def markdown(head: Values, done: Sequence[Part]) -> str:
    """Return the results as tables; what is missing is empty, and its error is listed."""
    lines = ["# On a GPU\n", ", ".join(f"{k} {v}" for k, v in head.items()) + ".\n"]
    for part in done:
        if "counts" in part.phases:
            counts = ", ".join(f"{n} {name}" for name, n in part.phases["counts"].items())
            lines.append(f"Tests marked `gpu`: {counts}.\n")
    columns = ["what", "images/s", "range", "step, us", "range", "tf32", "float32", "evaluation, s"]
    columns += ["drawing, s", "to first step, s", "GiB allocated", "reserved"]
    rows = [row(part) for part in done if part.name != "tests"]
    lines.append(machine.table(columns, rows) + "\n")
    lines.append(
        "Images per second count drawing, not evaluation. A step's time is without both, which are "
        "seconds of an epoch; tf32 and float32 are us a step, one measured after the other.\n"
    )
    for part in done:
        if "top" in (seen := part.phases.get("profile", {})):
            lines += profiled(part.name, seen)
    errors = [f"- {part.name}: {part.error}" for part in done if part.error]
    for part in done:
        failed = {
            name: values["error"] for name, values in part.phases.items() if "error" in values
        }
        errors += [f"- {part.name}, {name}: {error}" for name, error in failed.items()]
    return "\n".join([*lines, *(["## What failed\n", *errors] if errors else [])]) + "\n"


def row(part: Part) -> list[str]:
    """Return a part's line of the table."""

    def get(phase: str, name: str) -> Any:  # noqa: ANN401 - of JSON
        return part.phases.get(phase, {}).get(name)

    def spread(values: Sequence[float] | None, scale: float = 1.0) -> tuple[str, str]:
        return machine.spread([scale * value for value in values]) if values else ("", "")

    def number(value: float | None, scale: float = 1.0) -> str:
        return "" if value is None else f"{value / scale:.2f}"

    evaluation = get("throughput", "evaluation")
    return [
        part.name,
        *spread(get("throughput", "images_per_second")),
        *spread(get("step", "seconds"), 1e6),
        spread(get("tf32", "seconds"), 1e6)[0],
        spread(get("float32", "seconds"), 1e6)[0],
        number(median(evaluation) if evaluation else None),
        number(get("throughput", "drawing")),
        number((get("start", "seconds") or {}).get("first step")),
        number(get("memory", "allocated"), 2**30),
        number(get("memory", "reserved"), 2**30),
    ]


def profiled(name: str, seen: Values) -> list[str]:
    """Return the lines of a profile."""
    about = (
        f"{1e6 * seen['seconds']:.0f} us a step, {seen['kernels']:.1f} kernels that take "
        f"{seen['busy_microseconds']:.0f} us: {100 * seen['busy']:.0f}% of the time."
    )
    rows = [
        [f"`{kernel['name']}`", f"{kernel['count']:.1f}", f"{kernel['microseconds']:.1f}"]
        for kernel in seen["top"]
    ]
    return [
        f"## A step of a {name}\n",
        about + "\n",
        machine.table(["kernel", "a step", "us"], rows) + "\n",
    ]


if __name__ == "__main__":
    main()
