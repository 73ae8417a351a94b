"""What a figure was measured on, said the same way by every benchmark."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch


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
