"""Who this process is among those that share a study: its name, its number, its heartbeat."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from harness import places
from harness.config import UserError

NUMBER = "VAE_SWEEP_WORKER"
"""Variable that tells a worker of `--workers` its number and how many there are: "2/4"."""

BEAT = "VAE_SWEEP_BEAT"
"""Variable with the seconds between heartbeats (20); the same for all that share a study."""

SILENT = 6
"""Heartbeats that a process may miss until it counts as dead and others take its trials."""

_token = uuid.uuid4().hex[:8]


class Crowd(NamedTuple):
    """A worker's place among those that `--workers` started: its number, and how many."""

    number: int
    workers: int


def crowd(environment: Mapping[str, str] = os.environ) -> Crowd | None:
    """Return the place of a worker of `--workers`, None for any other process."""
    said = environment.get(NUMBER)
    return Crowd(*map(int, said.split("/"))) if said else None


def beat(environment: Mapping[str, str] = os.environ) -> int:
    """Return the seconds between heartbeats.

    Raises:
        UserError: the variable is no whole number above 0.
    """
    said = environment.get(BEAT, "20")
    if not said.isdecimal() or int(said) < 1:
        raise UserError(f"{BEAT}={said!r}: give a whole number of seconds >= 1")
    return int(said)


def name(process: int | None = None) -> str:
    """Name a process of this machine, by default this one: "HOST:PROCESS:TOKEN".

    The token tells this process from earlier ones of its number.
    """
    return f"{_host()}:{process or os.getpid()}:{_token}"


def start_words(name: str) -> list[str]:
    """Return how Python runs a study: as a page of `studies`, or as the user's own script."""
    page = Path(__file__).with_name(f"{name}.py")
    if page.exists() and '__name__ == "__main__"' in page.read_text(encoding="utf-8"):
        return ["-m", f"studies.{name}"]
    return [sys.argv[0]]


def program(name: str) -> str:
    """Return how a study is started: as a page of `studies`, or as the user's own file."""
    return shlex.join(["python", *start_words(name)])


def is_here(owner: str) -> bool:
    """Say whether a process is one that this one can look for: same machine, same container."""
    return owner.rsplit(":", 2)[0] == _host()


def process_of(owner: str) -> int:
    """Return the process id in a name."""
    return int(owner.rsplit(":", 2)[1])


def is_gone(owner: str) -> bool:
    """Say whether a process is known to have ended; of another machine that is never known."""
    return is_here(owner) and not places.alive(process_of(owner))


def _host() -> str:
    """Name the machine and, in a container, its own numbering of processes."""
    space, machine = Path("/proc/self/ns/pid"), socket.gethostname()
    return f"{machine}/{space.stat().st_ino}" if space.exists() else machine
