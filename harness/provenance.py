"""What a run was made with: code, versions, device and data; nothing private, no absolute path.

It is gathered once per process, since git answers slowly. Outside a checkout, or without git, the
commit is "unknown"; the digest of the sources says even then whether the code is the same.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import threadpoolctl
import torch

from harness.data.dataset import Dataset
from harness.data.mnist import DATASETS, TORCHVISION

UNKNOWN = "unknown"
PACKAGES = {"harness": "vae-sweep-harness"} | {
    name: name for name in ("torch", "numpy", "scikit-learn", "mlflow", "optuna")
}
"""Name in the record -> name of the distribution."""

SOURCES = ("harness", "studies")
"""Packages whose code determines a run's numbers."""


@dataclass(frozen=True)
class Code:
    """The code of this process.

    Attributes:
        commit: of the checkout, "unknown" where there is none.
        dirty: whether tracked files differ from the commit, or Python files are untracked; None
            where there is no checkout.
        untracked: Python files that git does not know and does not ignore.
        sources: SHA-256 of the packages in SOURCES.
        diff: tracked files against the commit, as text.
    """

    commit: str
    dirty: bool | None
    untracked: tuple[str, ...]
    sources: str
    diff: str = field(repr=False)

    def record(self) -> dict[str, Any]:
        """Return all but the diff, which is a file of its own, as plain values."""
        names = ("commit", "dirty", "sources")
        return {name: getattr(self, name) for name in names} | {"untracked": list(self.untracked)}


def read_code(root: Path) -> Code:
    """Ask git about the checkout at a folder; any other folder has an unknown commit.

    A checkout that merely contains the installed packages, as a project contains its virtual
    environment, does not track them and is not asked.
    """
    sources = _digest(root)
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
    """Return what git prints, None if it fails or is not there."""
    command = ["git", "--no-optional-locks", *words]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _digest(root: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(path for package in SOURCES for path in (root / package).rglob("*.py")):
        whole.update(f"{path.relative_to(root).as_posix()}\n".encode())
        whole.update(path.read_bytes())
    return whole.hexdigest()


@cache
def code() -> Code:
    """Return the code of this process, read at its first use."""
    return read_code(Path(__file__).resolve().parents[1])


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version()} | {k: _version(v) for k, v in PACKAGES.items()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return UNKNOWN


@cache
def device(kind: str) -> dict[str, str]:
    """Return what computes: kind ("cpu", "cuda"), its name, the CPU and its instruction set.

    The CPU counts on a GPU too: the exact linear model is computed on it.
    """
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
    """Return the threads of PyTorch and of NumPy's linear algebra (BLAS).

    The first change no number. BLAS sums in another order with another number of them: some of the
    exact linear model's metrics on MNIST then differ by 2e-14.
    """
    pools = threadpoolctl.threadpool_info()
    blas = [pool["num_threads"] for pool in pools if pool["user_api"] == "blas"]
    return {"torch": torch.get_num_threads(), "blas": max(blas, default=1)}


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Compute linear algebra with as many threads as `threads` returned elsewhere."""
    with threadpoolctl.threadpool_limits(count, user_api="blas"):
        yield


def dataset(data: Dataset) -> dict[str, Any]:
    """Return what a dataset is recognised by, and how it is loaded again."""
    return {
        "name": data.name,
        "digest": data.digest,
        "images": {part: len(getattr(data, part)) for part in ("train", "val", "test")},
        "image_shape": list(data.image_shape),
        "load": _loading(data),
    }


def _loading(data: Dataset) -> str:
    """Return the expression that makes the dataset; of own images without their place."""
    if data.name in DATASETS:
        root = ", root=DATA_DIR" if data.name in TORCHVISION else ""
        return f"harness.load_dataset({data.name!r}{root})"
    if data.name.startswith("folder-"):
        return f"harness.load_dataset('folder:PATH', image_size={data.image_shape[1:]})"
    return f"harness.Dataset.from_tensors({data.name!r}, ...)"


def provenance(data: Dataset, device_kind: str) -> dict[str, Any]:
    """Return all that a run on a dataset and a device is made with, as plain values."""
    return {
        "code": code().record(),
        "versions": versions(),
        "device": device(device_kind),
        "threads": threads(),
        "platform": platform.platform(),
        "dataset": dataset(data),
    }


def tags(made_with: Mapping[str, Any]) -> dict[str, str]:
    """Return the short values of a `provenance`, for a run table; MLflow shows its own commit."""
    commit, dirty = made_with["code"]["commit"], made_with["code"]["dirty"]
    known = {} if commit == UNKNOWN else {"mlflow.source.git.commit": commit}
    return known | {
        "git_commit": commit,
        "git_dirty": UNKNOWN if dirty is None else str(dirty).lower(),
        "versions": ", ".join(f"{name} {v}" for name, v in made_with["versions"].items()),
        "device_name": made_with["device"]["name"],
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name what is different between two `provenance`s; threads aside, which are set alike."""
    found = _code_differences(then["code"], now["code"])
    for part in ("versions", "device", "dataset"):
        names = dict.fromkeys([*then[part], *now[part]])
        pairs = [(name, then[part].get(name), now[part].get(name)) for name in names]
        found += [f"{part} {name}: {a} then, {b} now" for name, a, b in pairs if a != b]
    if then["platform"] != now["platform"]:
        found.append(f"platform: {then['platform']} then, {now['platform']} now")
    return found


def _code_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    if then["commit"] != now["commit"]:
        found.append(f"commit: {then['commit']} then, {now['commit']} now")
    for when, made in (("then", then), ("now", now)):
        if made["dirty"]:
            others = f", untracked {', '.join(made['untracked'])}" if made["untracked"] else ""
            found.append(f"working tree: changed since its commit {when}{others}")
    if then["sources"] != now["sources"]:
        found.append(f"sources of {' and '.join(SOURCES)}: other files now")
    elif found:
        found.append(f"sources of {' and '.join(SOURCES)}: the same files")
    return found
