"""Ctrl-C and SIGTERM: the first one stops training after the current epoch.

The handler sets a flag, which is read after every epoch: an exception at any moment could be lost
in a library or interrupt a write.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
"""Exit codes after a signal; 75 is EX_TEMPFAIL: repeat the command."""

_received: list[int] = []


def end_at_once() -> None:
    """Let Ctrl-C and SIGTERM end the process without a traceback: nothing has been begun."""
    for number, code in CODES.items():
        signal.signal(number, lambda *_, code=code: os._exit(code))


@contextmanager
def handled() -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM, and restore the former handlers at the end."""
    _received.clear()
    before = {number: signal.signal(number, _note) for number in CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def check() -> None:
    """Raise KeyboardInterrupt with the signal's name if one has arrived."""
    if _received:
        raise KeyboardInterrupt(f"stopped by {signal.Signals(_received[0]).name}")


def exit_code() -> int | None:
    """Return the exit code of the signal that has arrived, None without one."""
    return CODES[signal.Signals(_received[0])] if _received else None


def _note(number: int, frame: FrameType | None) -> None:
    if _received:
        raise KeyboardInterrupt("stopped by a second signal")
    _received.append(number)
    with suppress(OSError):  # not print: a signal may arrive within one
        os.write(2, b"\nStopping at the next safe point; Ctrl-C once more stops at once.\n")
