"""Good shops, broken at random: whatever a file holds, `check` says what is wrong in one line, or reads
it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builders.data.check import check_shop
from ensemble.errors import InvalidInput

NOW_S = 1_800_000_000.0
SHOP = """\
name = "fuzz"
split = "time"
[interactions]
file = "{log}"
event = "event"
position = "place"
history = "all"
[items]
file = "{items}"
id = "item_id"
title = "title"
features = [{{name = "brand", kind = "category"}}, {{name = "tags", kind = "category", separator = "|"}},
            {{name = "price", kind = "number"}}, {{name = "look", kind = "vector(2)"}}]
[[tasks]]
name = "like"
label = {{column = "liked"}}
"""
LOG = {
    "user_id": [f"u{i % 7}" for i in range(40)],
    "item_id": [f"i{i % 5}" for i in range(40)],
    "time": [1_700_000_000 + i for i in range(40)],
    "event": ["view", "buy"] * 20,
    "place": [i % 3 + 1 for i in range(40)],
    "liked": [i % 2 for i in range(40)],
}
ITEMS = {
    "item_id": [f"i{i}" for i in range(5)],
    "title": [f"Item {i}" for i in range(5)],
    "brand": ["a", "b", "a", "c", ""],
    "tags": ["x|y", "x", "", "y", "z"],
    "price": [1.5, 2, 3, 4, 5],
    "look": ["1 2", "3 4", "", "5 6", "7 8"],
}
CELLS = [
    "",
    "nan",
    "NULL",
    "-1",
    "0",
    "1e999",
    "yes",
    "1,100",
    "$5",
    "[1, 2]",
    "['a']",
    "2023-12-04",
    "soon",
    "x|y",
    "\0",
    "ü" * 70,
    '"',
    "'",
    "\u202e",
    " ",
    "9" * 30,
    "1.0",
    "20231204",
    "9999-12-31",
    "True",
    "\ud7ff",
    "a\nb",
]
TYPES = [
    *(pa.int8(), pa.uint64(), pa.float32(), pa.bool_(), pa.date32(), pa.timestamp("us"), pa.time64("us")),
    *(pa.duration("s"), pa.decimal128(20, 3), pa.large_binary(), pa.binary(3), pa.string_view(), pa.null()),
    *(pa.list_(pa.int32()), pa.list_(pa.string()), pa.struct([("a", pa.int32())])),
    *(pa.map_(pa.string(), pa.int32()), pa.dictionary(pa.int8(), pa.int64())),
    *(pa.dictionary(pa.int8(), pa.string()), pa.uuid(), pa.json_(), pa.bool8(), pa.decimal32(9, 2)),
    *(pa.float16(), pa.decimal256(60, 2), pa.date64()),
]


def csv_of(table: dict[str, list], sign: str = ",") -> bytes:
    rows = [list(table), *zip(*table.values(), strict=True)]
    quoted = (
        '"' + str(cell).replace('"', '""') + '"' if any(c in str(cell) for c in '",\n') else str(cell)
        for row in rows
        for cell in row
    )
    cells = list(quoted)
    width = len(table)
    return "".join(sign.join(cells[at : at + width]) + "\n" for at in range(0, len(cells), width)).encode(
        "utf-8", "replace"
    )


def odd_cells(rng: random.Random, table: dict[str, list]) -> bytes:
    for _ in range(rng.choice([1, 2, 30])):
        name = rng.choice(list(table))
        table[name][rng.randrange(len(table[name]))] = rng.choice(CELLS)
    return csv_of(table)


def odd_column(rng: random.Random, table: dict[str, list]) -> bytes:
    name, cell = rng.choice(list(table)), rng.choice(CELLS)
    table[name] = [cell] * len(table[name])
    return csv_of(table)


def odd_bytes(rng: random.Random, table: dict[str, list]) -> bytes:
    data = bytearray(csv_of(table))
    for _ in range(rng.choice([1, 5, 50])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def cut(rng: random.Random, table: dict[str, list]) -> bytes:
    data = csv_of(table)
    return data[: rng.randrange(len(data))]


def odd_encoding(rng: random.Random, table: dict[str, list]) -> bytes:
    table[rng.choice(list(table))][0] = "ü"
    return (
        csv_of(table).decode().encode(rng.choice(["latin-1", "utf-16", "utf-16-le", "utf-32", "utf-8-sig"]))
    )


def odd_columns(rng: random.Random, table: dict[str, list]) -> bytes:
    names = list(table)
    rng.shuffle(names)
    drop = rng.random() < 0.3
    sign = rng.choice([",", ";", "\t", "|", "~", " ", "\x01", "¦"])
    return csv_of({name: table[name] for name in names[drop:]}, sign).replace(
        b"user_id", rng.choice([b"user_id", b'"user_id"', b" user_id "]), 1
    )


CHANGES: list[Callable[[random.Random, dict[str, list]], bytes]] = [
    odd_cells, odd_cells, odd_column, odd_bytes, cut, odd_encoding, odd_columns,
]  # fmt: skip


def odd_parquet(rng: random.Random, table: dict[str, list]) -> bytes:
    """A column of any type, by whatever cast Arrow knows, or of that type's nothings; at times cut or
    bitten."""
    columns = {name: pa.array(cells) for name, cells in table.items()}
    name, kind = rng.choice(list(columns)), rng.choice(TYPES)
    try:
        columns[name] = columns[name].cast(kind, safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        columns[name] = pa.nulls(len(columns[name]), kind)
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(pa.table(columns), sink)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return csv_of(table)
    data = bytearray(sink.getvalue().to_pybytes())
    if rng.random() < 0.3:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


def broken_shop(folder: Path, seed: int) -> None:
    """Writes a good shop with one thing, or several, changed."""
    rng = random.Random(seed)
    tables = {"log": {k: list(v) for k, v in LOG.items()}, "items": {k: list(v) for k, v in ITEMS.items()}}
    which = rng.choice(list(tables))
    names = {"log": "log.csv", "items": "items.csv"}
    if rng.random() < 0.35:
        names[which] = f"{which}.parquet"
        data = odd_parquet(rng, tables[which])
    else:
        data = rng.choice(CHANGES)(rng, tables[which])
    for name, file in names.items():
        (folder / file).write_bytes(data if name == which else csv_of(tables[name]))
    (folder / "shop.toml").write_text(SHOP.format(**names))


def check_many(folder: Path, seconds: float, first: int) -> tuple[int, int]:
    """Checks broken shops for so long; counts those refused and those read."""
    read, said, seed, until = 0, [], first, time.monotonic() + seconds
    while time.monotonic() < until:
        for old in folder.iterdir():
            old.unlink()
        broken_shop(folder, seed)
        try:
            check_shop(folder, now_s=NOW_S)
            read += 1
        except InvalidInput as error:
            said.append((seed, str(error)))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        seed += 1
    assert [one for one in said if not one[1] or "\n" in one[1]] == []
    return len(said), read


def test_whatever_a_file_holds_is_read_or_named(tmp_path: Path):
    refused, read = check_many(tmp_path, 8, 0)
    assert refused > 5
    assert read > 5


@pytest.mark.long
def test_whatever_a_file_holds_is_read_or_named_for_longer(tmp_path: Path):
    check_many(tmp_path, float(os.environ.get("PEREGRINE_FUZZ_S", "240")), 1_000_000)
