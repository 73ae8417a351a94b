"""Stop at a safe point: the first Ctrl-C or SIGTERM is heeded after the current epoch.

An exception raised wherever a signal happens to arrive can be swallowed inside a library, or fall
between two halves of a write; a flag that is looked at after every epoch cannot.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

_received: list[int] = []


def install() -> None:
    """Heed Ctrl-C and SIGTERM from now on."""
    _received.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _note)


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
    print("\nStopping after this epoch; Ctrl-C once more stops at once.", file=sys.stderr)
