"""Writes pieces of HTML: tables, numbers, and what report.md says in Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """Writes a table; cells are text, not HTML. `classes`: one for each row."""
    lines = ["<tr>" + "".join(f"<th>{escaped(cell)}</th>" for cell in head) + "</tr>"]
    for place, row in enumerate(rows):
        of = f' class="{classes[place]}"' if classes and classes[place] != "ok" else ""
        lines.append(f"<tr{of}>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def number(value: Any, digits: int = 4) -> str:
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(number(part) for part in value)
    return (
        f"{value:.{digits}f}".rstrip("0").rstrip(".")
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def escaped(value: str) -> str:
    return html.escape(str(value))


def html_of(lines: Sequence[str]) -> list[str]:
    """Writes lines of report.md as HTML: a heading, paragraphs, lists and tables, each block by itself."""
    return [piece for kind, block in _blocks(lines) for piece in _piece(kind, block)]


def _blocks(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Gives runs of lines that begin alike: by #, -, | or as a paragraph."""
    for kind, block in groupby(lines, lambda line: line[:1] if line[:1] in ("", "#", "-", "|") else "p"):
        if kind:
            yield kind, list(block)


def _piece(kind: str, block: list[str]) -> list[str]:
    if kind == "#":
        return [f"<h2>{escaped(line.lstrip('# '))}</h2>" for line in block]
    if kind == "-":
        return ["<ul>" + "".join(f"<li>{escaped(line[2:])}</li>" for line in block) + "</ul>"]
    if kind == "|":
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block)
        return [table_of(head, rows)]
    return [f"<p>{escaped(re.sub(r'[*]{2}', '', line))}</p>" for line in block]
