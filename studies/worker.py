"""Who this process is among those that share a study: its name, its number, its heartbeat."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path

from harness import places
from harness.config import UserError

BEAT = "VAE_SWEEP_BEAT"
"""Variable with the seconds between heartbeats (20); the same for all that share a study."""

SILENT = 6
"""Heartbeats that a process may miss until it counts as dead and others take its trials."""

_token = uuid.uuid4().hex[:8]


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
