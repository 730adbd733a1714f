"""Makes tables for the terminal that hide nothing: where a line is too narrow, a cell goes on in the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.markdown import Markdown, TableElement
from rich.table import Table


def folded_table(*columns: str, **style: Any) -> Table:
    """Makes a table with these column titles; `style` is rich.table.Table's."""
    table = Table(**style)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


class _FoldedTable(TableElement):
    """Renders a table of a Markdown text; rich's own would cut long cells off with an ellipsis."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        for part in super().__rich_console__(console, options):
            if isinstance(part, Table):
                for column in part.columns:
                    column.overflow = "fold"
            yield part


class FoldedMarkdown(Markdown):
    """Renders a Markdown text with tables that hide nothing."""

    elements = {**Markdown.elements, "table_open": _FoldedTable}  # noqa: RUF012
