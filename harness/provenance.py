"""Code, versions, device and data of a run, without anything private and any absolute path."""

import hashlib
import platform
import subprocess
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import threadpoolctl
import torch

from harness.data.dataset import Dataset

UNKNOWN = "unknown"
PACKAGES = ("torch", "numpy", "scikit-learn", "mlflow", "optuna")
SOURCES = ("harness", "studies")  # packages whose code determines a run's numbers


@dataclass(frozen=True)
class Code:
    """The code of this process."""

    commit: str  # of the checkout, "unknown" where there is none
    dirty: bool | None  # whether there is a diff or an untracked file; None without a checkout
    untracked: tuple[str, ...]  # Python files that are neither tracked nor ignored
    sources: str  # SHA-256 of the packages in SOURCES
    diff: str = field(repr=False)  # of tracked files from the commit

    def record(self) -> dict[str, Any]:
        """Return all but the diff, which is stored as a file, as plain values."""
        kept = {"commit": self.commit, "dirty": self.dirty, "sources": self.sources}
        return kept | {"untracked": list(self.untracked)}


def read_code(root: Path) -> Code:
    """Return the code in a folder; the commit is that of a checkout which tracks the packages."""
    whole = hashlib.sha256()
    for path in sorted(path for package in SOURCES for path in (root / package).rglob("*.py")):
        whole.update(f"{path.relative_to(root).as_posix()}\n".encode())
        whole.update(path.read_bytes())
    sources = whole.hexdigest()
    # A project whose virtual environment holds the packages does not track them.
    tracked = _git(root, "ls-files", "--error-unmatch", "harness/__init__.py") is not None
    commit = _git(root, "rev-parse", "--verify", "HEAD") if tracked else None
    if commit is None:
        return Code(UNKNOWN, None, (), sources, "")
    plain = ("--no-ext-diff", "--no-textconv", "--no-color")
    diff = _git(root, "diff", *plain, "HEAD", "--", ".") or ""
    others = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", "*.py") or ""
    untracked = tuple(name for name in others.split("\0") if name)
    return Code(commit.strip(), bool(diff or untracked), untracked, sources, diff)


def _git(root: Path, *words: str) -> str | None:
    command = ["git", "--no-optional-locks", *words]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


@cache
def code() -> Code:
    """Return the code of this process; read once, since git is slow."""
    return read_code(Path(__file__).resolve().parents[1])


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    known = {"python": platform.python_version(), "harness": _version("vae-sweep-harness")}
    return known | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return UNKNOWN


@cache
def device(kind: str) -> dict[str, str]:
    """Return a device's kind ("cpu", "cuda") and name, and the CPU, for the linear model."""
    cpu = _cpu_name()
    name = torch.cuda.get_device_name() if kind == "cuda" else cpu
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"kind": kind, "name": name, "cpu": cpu, "instructions": instructions}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine() or UNKNOWN)


def threads() -> dict[str, int]:
    """Return the threads of PyTorch, which change no number, and of BLAS, which do."""
    pools = threadpoolctl.threadpool_info()
    blas = [pool["num_threads"] for pool in pools if pool["user_api"] == "blas"]
    return {"torch": torch.get_num_threads(), "blas": max(blas, default=1)}


def dataset(data: Dataset) -> dict[str, Any]:
    """Return the name, digest and sizes of a dataset."""
    return {
        "name": data.name,
        "digest": data.digest,
        "images": {part: len(getattr(data, part)) for part in ("train", "val", "test")},
        "image_shape": list(data.image_shape),
        **({"options": dict(data.options)} if data.options else {}),
    }


def provenance(data: Dataset, device_kind: str) -> dict[str, Any]:
    """Return the provenance of a run on a dataset and a device, as plain values."""
    return {
        "code": code().record(),
        "versions": versions(),
        "device": device(device_kind),
        "threads": threads(),
        "platform": platform.platform(),
        "dataset": dataset(data),
    }
