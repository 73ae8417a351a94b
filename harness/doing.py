"""What is being done where it takes long, said through `logging` for whoever shows it.

A program that shows nothing hears nothing: without a handler these messages are dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SAID = logging.getLogger(__name__)
_SAID.addHandler(logging.NullHandler())
_SAID.propagate = False

Show = Callable[[str, bool], None]
"""(what is being done, whether that is only how far it is) -> None."""


def say(what: str) -> None:
    """Say what is done from now on; "" says that it is over."""
    _SAID.info(what, extra={"further": False})


def count(what: str, done: int, of: int) -> None:
    """Say how far it is, e.g. "measuring finished runs: 3 of 15"."""
    _SAID.info("%s: %d of %d", what, done, of, extra={"further": True})


class _Handler(logging.Handler):
    def __init__(self, show: Show) -> None:
        super().__init__(logging.INFO)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage(), record.__dict__["further"])


@contextmanager
def heard(show: Show) -> Iterator[None]:
    """Hand all that is said to `show` for a while, instead of to those who heard it before."""
    before, level = _SAID.handlers, _SAID.level
    _SAID.handlers = [_Handler(show)]
    _SAID.setLevel(logging.INFO)
    try:
        yield
    finally:
        _SAID.handlers = before
        _SAID.setLevel(level)
