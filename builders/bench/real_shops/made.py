"""Holds a shop that is not yet written, and reads the files that shops are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv

from ensemble.arrays import Array
from ensemble.errors import InvalidInput

QUANTILE = 0.9  # of the clock: what comes later tests


@dataclass(frozen=True)
class Made:
    """Holds a shop that is not yet written."""

    toml: str
    interactions: pa.Table
    others: dict[str, pa.Table] = field(default_factory=dict)  # items, users, where there are any


def share_behind(times: Array, cut: int) -> float:
    """Gives the `test` of a split by time whose test period begins exactly at `cut`. times [n] int64."""
    return 1 - ((times < cut).sum() - 0.5) / (len(times) - 1)


def read(
    path: Path,
    separator: str = ",",
    *,
    texts: tuple[str, ...] = (),
    names: list[str] | None = None,
) -> pa.Table:
    """Reads a CSV, gzipped or not. With `names` it has no header and its cells are text, trimmed."""
    if not path.is_file():
        raise InvalidInput(f"{path} is missing; DATA_DIR is the folder that holds {path.parent.name}")
    table = csv.read_csv(
        path,
        read_options=csv.ReadOptions(column_names=names, use_threads=False),
        parse_options=csv.ParseOptions(delimiter=separator, quote_char=False if separator == "\t" else '"'),
        convert_options=csv.ConvertOptions(
            column_types={name: pa.string() for name in (*texts, *(names or ()))}
        ),
    )
    if names is None:
        return table
    return pa.table({name: pc.utf8_trim_whitespace(table[name]) for name in table.column_names})
