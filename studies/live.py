"""What a study is doing, shown while it does it: a moving line, or lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from studies import worker

LOGGERS = ("harness", "studies")
"""Names of the loggers whose messages are shown, from level INFO on."""

Show = Callable[[str, bool], None]
"""(message, whether it is only how far something is) -> None; the message "" ends the display."""

EVERY = 15.0
"""Seconds after which a log without a terminal gets a line though nothing new began."""

INDENT = " " * 7
"""Of lines in a log, as wide as a percentage."""


class _Handler(logging.Handler):
    """Show messages; those with `extra={"progress": True}` are how far something is."""

    def __init__(self, show: Show) -> None:
        super().__init__(logging.INFO)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:  # goes where it would go without this handler
            logging.getLogger().callHandlers(record)
        else:
            self.show(record.getMessage(), getattr(record, "progress", False))


@contextmanager
def heard(show: Show) -> Iterator[None]:
    """Show messages for a while; a display around this one is ended first, and not used."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        around = [handler for handler in logger.handlers if isinstance(handler, _Handler)]
        for handler in around:
            handler.show("", False)  # noqa: FBT003 - of type `Show`
        others = [handler for handler in logger.handlers if handler not in around]
        logger.handlers = [*others, _Handler(show)]
        logger.propagate = False  # the root has a handler too, once MLflow has made a database
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


@cache
def terminal() -> rich.console.Console:
    """Return where everything is shown; one object, since a moving line must know what passes."""
    if worker.crowd():  # its parent does the talking
        return rich.console.Console(quiet=True)
    width = None if sys.stdout.isatty() else 100
    return rich.console.Console(highlight=False, width=width)


class Lines:
    """Lines of a log: one for all that begins, and one now and then for how far it is."""

    def __init__(self, out: rich.console.Console) -> None:
        self._out, self._last = out, time.monotonic()

    def add(self, line: str) -> None:
        """Write a line."""
        self._last = time.monotonic()
        self._out.print(line, soft_wrap=True, markup=False)

    def is_due(self) -> bool:
        """Say whether the last line is old."""
        return time.monotonic() - self._last >= EVERY

    def show(self, what: str, further: bool) -> None:  # noqa: FBT001 - of type `Show`
        """Write what begins, and of what goes on a line now and then."""
        if what and (not further or self.is_due()):
            self.add(INDENT + what)


@contextmanager
def shown() -> Iterator[None]:
    """Show all that is being done, but where a `bar` shows it."""
    out = terminal()
    if not out.is_terminal:
        with heard(Lines(out).show):
            yield
        return
    status = out.status("")

    def show(what: str, further: bool) -> None:  # noqa: FBT001 - of type `Show`
        status.update(what)
        (status.start if what else status.stop)()

    try:
        with heard(show):
            yield
    finally:
        status.stop()


@contextmanager
def bar(out: rich.console.Console, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show how much of a total is done, and what is being done meanwhile.

    Yields:
        (how much more, what is happening) -> None.
    """
    progress = Progress(
        TextColumn("{task.percentage:3.0f} %"),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[now]}"),
        TimeRemainingColumn(),
        console=out,
        disable=not out.is_terminal or total == 0,
    )
    task, lines = progress.add_task("training", total=total, now="starting"), Lines(out)

    def advance(steps: int, now: str) -> None:
        before = progress.tasks[0].percentage
        progress.update(task, advance=steps, now=now)
        after = progress.tasks[0].percentage
        if not out.is_terminal and (after // 10 > before // 10 or lines.is_due()):
            lines.add(f"{after:3.0f} %  {now}")

    def show(what: str, further: bool) -> None:  # noqa: FBT001 - of type `Show`
        if out.is_terminal:
            progress.update(task, now=what)
        else:
            lines.show(what, further)

    with heard(show), progress:
        yield advance
