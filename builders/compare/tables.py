"""Writes the tables that `peregrine compare` prints, and the words below them."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

from builders.compare.losses import LossRow, LossTable, mean_and_error
from builders.compare.precisions import PrecisionsPoint, PrecisionsTable


def show(table: Table, words: list[str]) -> None:
    """Prints a table, and a line of text for each of `words`."""
    console = Console(width=None if os.isatty(1) else 120)
    console.print(table)
    for line in words:
        console.print(line, highlight=False, markup=False)


def loss_table(found: LossTable) -> Table:
    """Makes the table of `peregrine compare losses`: a row for each choice of losses."""
    title = (
        f"{found.model} of {found.shop}: students of {found.parameters:,} parameters "
        f"(teacher: {found.teacher_parameters:,})"
    )
    table = Table("loss", title=title)
    for column in ("parameters", "NDCG@10, % of the teacher's", "overlap@10, %", "training, CPU s"):
        table.add_column(column, justify="right")
    for row in found.rows:
        table.add_row(
            row.name, f"{found.parameters:,}", _percent(row.ndcg), _percent(row.overlap), _seconds(row)
        )
    return table


def _percent(values: tuple[float, ...]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.2%}".rstrip("%") + ("" if error is None else f" ± {100 * error:.2f}")


def _seconds(row: LossRow) -> str:
    return f"{sum(row.train_s) / len(row.train_s):.1f}" if row.weights else "-"


def loss_words(found: LossTable) -> list[str]:
    """Says how the students were made, and how to read the table."""
    noise = max(row.user_error for row in found.rows if row.weights)
    sizes = ", ".join(
        f"{name} {list(size) if isinstance(size, tuple) else size}" for name, size in found.student.items()
    )
    return [
        f"student: {sizes}; {found.steps} steps, {len(found.seeds)} seeds; judged by {found.users:,} "
        "held-out users, the teacher's NDCG@10 there is "
        f"{found.teacher_ndcg:.4f}",
        "± is the standard error over seeds; that over users, which all rows share, is up to "
        f"{100 * noise:.2f} points of NDCG@10",
    ]


def precisions_table(found: PrecisionsTable) -> Table:
    """Makes the table of `peregrine compare plans`: a row for each engine."""
    title = f"{found.model} of {found.shop} on {found.runtime}: {found.bytes / 1e6:.2f} MB at fp32"
    table = Table("asked size, %", "engine", title=title)
    for column in ("size, %", "time, %", "changed, %", "NDCG@10 lost, %", "low blocks"):
        table.add_column(column, justify="right")
    for point in found.points:
        table.add_row(*_precisions_cells(point, found.blocks))
    return table


def _precisions_cells(point: PrecisionsPoint, blocks: int) -> tuple[str, ...]:
    target = "-" if point.target is None else f"{100 * point.target:g}"
    time = "-" if point.latency is None else f"{100 * point.latency:.0f}"
    name = {"uncompressed": "fp32", "planner": "planner", "global": "global 8 bits"}[point.family]
    lost = f"{100 * point.loss:+.2f} ± {100 * point.loss_error:.2f}"
    return (
        target,
        name,
        f"{100 * point.size:.1f}",
        time,
        f"{100 * point.changed:.2f}",
        lost,
        f"{point.low} of {blocks}",
    )


def precisions_words(found: PrecisionsTable) -> list[str]:
    """Says what the table shows, and how to read it."""
    pairs = found.pairs()
    fewer = sum(planner.changed < plain.changed for planner, plain in pairs)
    return [
        f"{found.users:,} held-out users judge; size and time (of 8 users) are shares of fp32's, ± is the "
        "standard error over users",
        f"the planner changes fewer of the shown items at {fewer} of {len(pairs)} sizes; NDCG@10 is "
        "noisier: read it with its error",
        *found.notes,
    ]
