"""Stop at a safe point: the first Ctrl-C or SIGTERM is heeded after the current epoch.

An exception raised wherever a signal happens to arrive can be swallowed inside a library, or fall
between two halves of a write; a flag that is looked at after every epoch cannot.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received: list[int] = []


@contextmanager
def heeded() -> Iterator[None]:
    """Heed Ctrl-C and SIGTERM meanwhile; afterwards they do what they did before."""
    _received.clear()
    before = {n: signal.signal(n, _note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def check() -> None:
    """Stop here if a signal has come.

    Raises:
        KeyboardInterrupt: it has; its text names the signal.
    """
    if _received:
        raise KeyboardInterrupt(f"stopped by {signal.Signals(_received[0]).name}")


def exit_code() -> int:
    """Return the customary code of a process that a signal stopped: 130 for Ctrl-C, 143."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def _note(number: int, frame: FrameType | None) -> None:
    if _received:
        raise KeyboardInterrupt("stopped by a second signal")
    _received.append(number)
    # Not print: a signal may arrive within one.
    os.write(2, b"\nStopping at the next safe point; Ctrl-C once more stops at once.\n")
