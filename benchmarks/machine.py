"""What benchmarks share: command line, errors, what a figure was measured on, tables."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from harness.config import UserError


def parser(name: str, about: str | None, *, device: bool = True) -> argparse.ArgumentParser:
    """Return the command line of `python -m benchmarks.NAME` with what all of them have."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--data-dir", type=Path, default=Path("data"), help="default: data")
    if device:
        made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return made


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn a user's error into a line and exit code 2, as studies do.

    Not `studies.runner.cli.clear_errors`: its imports would count in what is measured, and it takes
    Ctrl-C for trainings that go on later.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def hardware(device: torch.device, *packages: str) -> list[str]:
    """Say in two lines what was measured on, and with which versions of further packages."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU used"
    others = "".join(f", {name} {_version(name)}" for name in packages)
    return [
        f"{cpu_name()}, {os.cpu_count()} cores, {gpu}.",
        f"Python {platform.python_version()}, PyTorch {torch.__version__}{others}, "
        f"{platform.system()} {platform.release()}, {time.strftime('%Y-%m-%d')}.",
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def cpu_name() -> str:
    """Return the CPU's model as the kernel tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are numbers."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def spread(values: Sequence[float], digits: int = 0) -> tuple[str, str]:
    """Return the median, and the range as text."""
    low, high = min(values), max(values)
    return f"{median(values):,.{digits}f}", f"{low:,.{digits}f} to {high:,.{digits}f}"
