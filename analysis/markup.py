"""Pieces of a self-contained HTML page: text in, HTML out. Every text is escaped here."""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may do with a page: show it, run nothing, fetch nothing."""

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
    pairs = (f"<div><dt>{named(k)}</dt><dd>{escape(plain(v))}</dd></div>" for k, v in values.items())
    return f"<dl>{''.join(pairs)}</dl>"


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
    """Write an inlined image, the names of its rows, top to bottom, beside them."""
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    names = "".join(f"<li>{escape(row)}</li>" for row in rows)
    labels = f"<ul>{names}</ul>" if names else ""
    return f'<div class="image">{labels}<img src="{source}" alt="{escape(description)}"></div>'


def table(
    header: Sequence[str], body: Sequence[Sequence[str]], links: Mapping[str, str] | None = None
) -> str:
    """Write cells of text as a table that scrolls if it is wide; numbers stand right.

    Args:
        header: names of the columns.
        body: rows of cells.
        links: text of a cell -> address that it leads to.
    """
    columns = [[row[i] for row in body] for i in range(len(header))]
    kinds = [' class="number"' if all(map(NUMBER.fullmatch, c)) else "" for c in columns]
    widths = [max((len(cell.partition("± ")[2]) for cell in c), default=0) for c in columns]

    heads = "".join(f"<th{kind}>{named(h)}</th>" for kind, h in zip(kinds, header, strict=True))
    rows = [
        "".join(
            f"<td{kind}>{_cell(cell, width, links or {})}</td>"
            for kind, width, cell in zip(kinds, widths, row, strict=True)
        )
        for row in body
    ]
    lines = "\n".join(f"<tr>{row}</tr>" for row in rows)
    head, content = f"<thead><tr>{heads}</tr></thead>", f"<tbody>\n{lines}\n</tbody>"
    return f'<div class="scroll"><table>\n{head}\n{content}\n</table></div>'


def _cell(text: str, width: int, links: Mapping[str, str]) -> str:
    """Write a cell; every half width of a column takes `width` digits, so the means line up."""
    if text in links:
        return f'<a href="{escape(links[text])}">{escape(text)}</a>'
    mean, sign, half = text.partition(" ± ")
    if not sign:
        return escape(text)
    return f'{escape(mean)} <span style="min-width:{width + 2}ch">± {escape(half)}</span>'
