"""Pieces of a self-contained HTML page: text in, HTML out. Every text is escaped here."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

from PIL import Image

from harness.config import UserError

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may do with a page: show it, run nothing, fetch nothing."""

SCREEN = 96
"""Pixels of an inch on a page."""

LONG, WIDE = 24, 112
"""Characters of a value that takes a line of its own, and of a row too wide for paper."""

SENTENCE = 48
"""Characters of a cell that is broken into lines."""

NUMBER = re.compile(r"([-+]?(\d[\d.,]*(e[-+]?\d+)?|inf|nan)( ± \S+)?( %)?|–)?")
"""A cell of a column of numbers: a number, one with its interval, a dash, or nothing."""


def page(title: str, body: Iterable[str]) -> str:
    """Write a whole page from its title, a text, and parts of HTML."""
    style = resources.files("analysis").joinpath("report.css").read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{style}</style>",
    )
    lines = ("<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body><main>")
    return "\n".join([*lines, *filter(None, body), "</main></body>", "</html>", ""])


def section(title: str, parts: Sequence[str]) -> str:
    """Write parts of HTML under a heading; nothing at all without parts."""
    return "\n".join([f"<section><h2>{escape(title)}</h2>", *parts, "</section>"] if parts else [])


def split(text: str) -> list[str]:
    """Return the paragraphs of a text, which blank lines separate."""
    return re.split(r"\n\s*\n", text.strip())


def paragraphs(texts: Iterable[str]) -> str:
    """Write paragraphs."""
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def named(name: str) -> str:
    """Write a name that may be broken into lines after "_", "/" and "="."""
    return re.sub(r"([_/=])", r"\1<wbr>", escape(name))


def facts(values: Mapping[str, object]) -> str:
    """Write names and values as a list."""
    return f"<dl>{''.join(_fact(name, plain(value)) for name, value in values.items())}</dl>"


def _fact(name: str, value: str) -> str:
    kind = ' class="long"' if len(value) > LONG else ""
    return f"<div{kind}><dt>{named(name)}</dt><dd>{escape(value)}</dd></div>"


def plain(value: object) -> str:
    """Return a setting as people write it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def captioned(kind: str, number: int, caption: str, content: str) -> str:
    """Write a "Figure" or a "Table", numbered and with a caption."""
    text = f"<figcaption><b>{kind} {number}.</b> {escape(caption)}</figcaption>"
    return f'<figure class="{kind.lower()}">{text}{content}</figure>'


def image(path: Path, description: str, rows: Sequence[str] = ()) -> str:
    """Write an inlined image in its own size, the names of its rows, top to bottom, beside them."""
    try:
        with Image.open(path) as opened:
            kind, dots = opened.get_format_mimetype(), opened.info.get("dpi", (SCREEN, SCREEN))[0]
            width, ratio = opened.width * SCREEN / dots, opened.width / opened.height
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image") from error
    source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    size = f"--width:{width:.0f}px;--ratio:{ratio:.4f}"
    names = "".join(f"<li>{escape(row)}</li>" for row in rows)
    labels = f"<ul>{names}</ul>" if names else ""
    shown = f'<img src="{source}" style="{size}" alt="{escape(description)}">'
    return f'<div class="image">{labels}{shown}</div>'


def table(
    header: Sequence[str], body: Sequence[Sequence[str]], links: Mapping[str, str] | None = None
) -> str:
    """Write cells of text as a table that scrolls if it is wide; numbers stand right."""
    columns = [Column(name, [row[i] for row in body]) for i, name in enumerate(header)]
    heads = "".join(f"<th{column.kind}>{named(column.name)}</th>" for column in columns)
    rows = zip(*(column.write(links or {}) for column in columns), strict=True)
    lines = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    wide = ' class="wide"' if sum(column.width for column in columns) > WIDE else ""
    head, content = f"<thead><tr>{heads}</tr></thead>", f"<tbody>\n{lines}\n</tbody>"
    return f'<div class="scroll"><table{wide}>\n{head}\n{content}\n</table></div>'


@dataclass(frozen=True)
class Column:
    """A column of a table: its name and its cells, all text."""

    name: str
    cells: Sequence[str]

    @property
    def kind(self) -> str:
        """The attribute that puts numbers right and gives sentences room."""
        if all(map(NUMBER.fullmatch, self.cells)):
            return ' class="number"'
        return ' class="words"' if max(map(len, self.cells)) > SENTENCE else ""

    @property
    def width(self) -> int:
        """Characters of the widest line, with the gap to the next column."""
        widest = max(map(len, [*re.split(r"[_/]", self.name), *self.cells]))
        return 2 + min(widest, SENTENCE)

    def write(self, links: Mapping[str, str]) -> list[str]:
        """Write the cells; all half widths are as wide as the widest, so that means line up."""
        digits = max((len(cell.partition(" ± ")[2]) for cell in self.cells), default=0)
        return [f"<td{self.kind}>{_cell(cell, digits, links)}</td>" for cell in self.cells]


def _cell(text: str, digits: int, links: Mapping[str, str]) -> str:
    if text in links:
        return f'<a href="{escape(links[text])}">{escape(text)}</a>'
    mean, sign, half = text.partition(" ± ")
    if not sign:
        return escape(text)
    return f'{escape(mean)} <span style="min-width:{digits + 1.5}ch">± {escape(half)}</span>'
