"""Errors for users."""

import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# What a terminal obeys, text of which the direction is turned, and halves of characters.
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

BROKEN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

NO_USERS = (  # folders of code that is not the user's
    *(Path(__file__).resolve().parents[1] / name for name in ("harness", "studies", "analysis")),
    Path(sysconfig.get_path("stdlib")),
)


def printable(text: str) -> str:
    """Return a text with its control characters, but for tabs and line breaks, as escapes."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def listed(texts: Iterable[str]) -> str:
    """Join texts by commas, or by semicolons if one of them has a comma."""
    texts = [*texts]
    return ("; " if any("," in text for text in texts) else ", ").join(texts)


class UserError(ValueError):
    """An input that cannot be used; command lines print the message alone, with exit code 2."""

    def _render_traceback_(self) -> list[str]:  # IPython's hook: the message alone in a notebook
        return [f"error: {self}"]


class SummaryError(UserError):
    """A figure, an answer or a metric that failed after its runs were trained; exit code 3."""


def checked_text(given: object) -> str:
    """Return a name as text; one whose bytes are no UTF-8 cannot be recorded, a `UserError`."""
    if (text := str(given)).encode(errors="ignore").decode() != text:
        raise UserError(f"{text!r} is no UTF-8 and cannot be recorded; rename it")
    return text


@contextmanager
def reading(record: str) -> Iterator[None]:
    """Name a stored record in the error by which it turns out to be broken, a UserError."""
    try:
        yield
    except BROKEN as error:  # UserError is one of them
        why = error if isinstance(error, UserError) else line_of(error)
        raise UserError(f"{record}: {why}") from error


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def line_of(error: BaseException) -> str:
    """Return an error with the line of the user's code that it comes from, in one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    if isinstance(error, SyntaxError):
        text = f"{type(error).__name__}: {error.msg}"
        return f"{text} ({Path(error.filename or '').name}, line {error.lineno})"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        is_theirs = "site-packages" in path.parts or frame.filename.startswith("<frozen")
        if not is_theirs and not any(map(path.is_relative_to, NO_USERS)):
            return f"{text} ({path.name}, line {frame.lineno}: {frame.line})"
    return text
