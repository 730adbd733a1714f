"""One small table in every format, and what is said of files that are not what they should be."""

from __future__ import annotations

import bz2
import gzip
import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shops import ROOT

from builders.shop.columns.column import Reading
from builders.shop.columns.ids import known_ids
from builders.shop.tables import read_table
from ensemble.errors import InvalidInput

ROWS = [("u1", "007", 10), ("ü2", "b", 20), ("u1", "b", 30)]
TABLE = pa.table({name: [row[at] for row in ROWS] for at, name in enumerate(("user", "item", "time"))})
COLUMNS = ["user", "time", "item"]


def text_of(sign: str, quote: str = "") -> str:
    lines = [("user", "item", "time"), *ROWS]
    return "".join(sign.join(f"{quote}{cell}{quote}" for cell in line) + "\n" for line in lines)


def packed(data: bytes, codec: str) -> bytes:
    with pa.BufferOutputStream() as sink:
        with pa.CompressedOutputStream(sink, codec) as out:
            out.write(data)
        return sink.getvalue().to_pybytes()


def arrow(form) -> bytes:
    sink = pa.BufferOutputStream()
    with form(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue().to_pybytes()


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink)
    return sink.getvalue().to_pybytes()


JSON = "".join(f'{{"user": "{u}", "item": "{i}", "time": {t}, "x": {{}}}}\n' for u, i, t in ROWS)
FILES = {
    "comma.csv": text_of(",").encode(),
    "semicolon.csv": text_of(";").encode(),
    "tabs.tsv": text_of("\t").encode(),
    "bar.txt": text_of("|").encode(),
    "odd.csv": text_of("~").encode(),
    "bar.csv": text_of("¦", '"').encode(),
    "LARGE.CSV.GZ": gzip.compress(text_of(",").encode()),
    "quoted.csv": text_of(",", '"').encode(),
    "mark.csv": b"\xef\xbb\xbf" + text_of(",").encode(),
    "wide.csv": text_of(",").encode("utf-16"),
    "dos.csv": text_of(",").replace("\n", "\r\n").encode(),
    "a.csv.gz": gzip.compress(text_of(",").encode()),
    "a.csv.bz2": bz2.compress(text_of(",").encode()),
    "a.tsv.zst": packed(text_of("\t").encode(), "zstd"),
    "a.jsonl": JSON.encode(),
    "mixed.jsonl": (JSON + '{"x": 1}\n')
    .replace('{"x": 1}\n', "")
    .replace('"x": {}', '"x": [1, "a"]')
    .encode(),
    "a.ndjson.gz": gzip.compress(JSON.rstrip().encode()),
    "a.parquet": parquet(),
    "a.arrow": arrow(pa.ipc.new_file),
    "stream.arrow": arrow(pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_cells(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(FILES[name])
    table = read_table(tmp_path, name, COLUMNS)
    assert list(table) == COLUMNS
    assert [tuple(table[c].values[row].as_py() for c in ("user", "item")) for row in range(3)] == [
        row[:2] for row in ROWS
    ]
    assert table["time"].values.to_pylist() == [10, 20, 30]
    if name == "odd.csv":
        assert table["user"].said.notes == ["columns separated by '~'"]


def test_encodings_and_separators_may_be_said(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(text_of("x").encode("latin-1"))
    table = read_table(tmp_path, "a.csv", COLUMNS, Reading(separator="x", encoding="latin-1"))
    assert table["user"].values.to_pylist() == ["u1", "ü2", "u1"]


def test_a_separator_beyond_ascii_may_stand_inside_a_cell(tmp_path: Path, monkeypatch):
    from builders.shop.formats import delimited

    monkeypatch.setattr(delimited, "BLOCK_BYTES", 61)  # some blocks end within a sign
    rows = [(f"{'u' * (at % 5)}¦1", "é", at) for at in range(50)]
    (tmp_path / "a.csv").write_text(
        "user¦item¦time\n" + "".join(f'"{user}"¦{item}¦{at}\n' for user, item, at in rows)
    )
    table = read_table(tmp_path, "a.csv", ["user", "item", "time"])
    assert list(zip(*(column.values.to_pylist() for column in table.values()), strict=True)) == rows


def test_types_that_an_extension_stores_are_read(tmp_path: Path):
    uuids = [uuid.UUID(int=7), None, uuid.UUID(int=2**128 - 9)]
    cells = {
        "user": pa.array([one and one.bytes for one in [None, *uuids]], pa.uuid()).slice(1),
        "item": pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array(["a", "b", None])),
        "time": pa.array([1, 2, 3], pa.decimal32(5, 0)),
        "half": pa.array([1, 2, None], pa.float16()),
    }
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.table(cells).schema) as writer:
        writer.write_table(pa.table(cells))
    table = read_table(tmp_path, "a.arrow", list(cells))
    assert table["user"].values.to_pylist() == [one and str(one) for one in uuids]
    assert table["item"].values.to_pylist() == ["a", "b", None]
    assert known_ids(table["user"])[1].tolist() == [0, -1, 1]
    assert known_ids(table["time"])[0].tolist() == [b"1", b"2", b"3"]
    assert known_ids(table["half"])[0].tolist() == [b"1", b"2"]


def test_a_folder_of_partitions_is_one_table(tmp_path: Path):
    for day, rows in (("2026-01-01", TABLE.slice(0, 1)), ("2026-01-02", TABLE.slice(1))):
        (tmp_path / "log" / f"day={day}").mkdir(parents=True)
        pq.write_table(rows, tmp_path / "log" / f"day={day}" / "part-0.parquet")
    (tmp_path / "log" / "_SUCCESS").write_bytes(b"")
    table = read_table(tmp_path, "log", [*COLUMNS, "day"])
    assert table["day"].values.to_pylist() == ["2026-01-01", "2026-01-02", "2026-01-02"]
    assert table["time"].values.to_pylist() == [10, 20, 30]
    assert (
        str(table["item"].error(2, "is odd"))
        == "log/day=2026-01-02/part-0.parquet: column 'item', row 2: 'b' is odd"
    )
    (tmp_path / "log" / "more.csv").write_text(text_of(","))
    with pytest.raises(InvalidInput, match="several formats: csv, parquet; keep one"):
        read_table(tmp_path, "log", COLUMNS)


WRONG = {
    "latin.csv": (text_of(",").encode("latin-1"), r'line 3 is no UTF-8 \(byte 0xfc\).*encoding = "latin-1"'),
    "cut.csv.gz": (gzip.compress(text_of(",").encode())[:-9], "is the file whole"),
    "cut.parquet": (parquet()[:-20], "is the file whole"),
    "cut.arrow": (arrow(pa.ipc.new_file)[:-30], "is the file whole"),
    "ragged.csv": ((text_of(",") + "u1,a\n").encode(), "row 4 has 2 cells, its header 3"),
    "cut.jsonl": (JSON.encode()[:-20], "line 3 is no JSON object"),
    "list.jsonl": (b"[1, 2]\n", "line 1 is no JSON object"),
    "kinds.jsonl": ((JSON + '{"user": 7, "item": "a", "time": 1}\n').encode(), "column 'user', row "
    "4: 7 is of another"),
    "empty.jsonl": (b"", "has no column 'user'"),
    "empty.csv": (b"\n\n", "has no first line"),
    "no.csv": (b"\0\1\2,\n", "is no text"),
    "twice.csv": (b"user,user,item,time\n", "has 2 columns 'user'"),
    "packed.parquet.gz": (b"", "compressed inside"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_file_is_one_line_with_a_cure(tmp_path: Path, name: str):
    data, message = WRONG[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidInput, match=message) as caught:
        read_table(tmp_path, name, COLUMNS)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_batches_of_several_kinds_become_one_column(tmp_path: Path, monkeypatch):
    """Ids that are whole numbers in one batch and text in another stay what they were."""
    from builders.shop.formats import delimited

    monkeypatch.setattr(delimited, "BLOCK_BYTES", 1 << 12)
    rng = np.random.default_rng(0)
    users = [*rng.integers(0, 99, 3000).astype(str), *(f"u{i}" for i in rng.integers(0, 99, 3000)), "007"]
    (tmp_path / "a.csv").write_text(
        "user,time\n" + "".join(f"{user},{at}\n" for at, user in enumerate(users))
    )
    table = read_table(tmp_path, "a.csv", ["user", "time"])
    assert table["user"].values.to_pylist() == users
    assert table["time"].values.to_pylist() == list(range(len(users)))


def test_a_wrong_row_ends_a_process_cleanly(tmp_path: Path):
    """Arrow's threads are gone when Python ends, however busy the machine is."""
    (tmp_path / "a.csv").write_text(text_of(",") * 20_000 + "u1\n")
    code = "from builders.shop.tables import read_table; from pathlib import Path; "
    code += f"read_table(Path({str(tmp_path)!r}), 'a.csv', ['user'])"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, env={**os.environ})
        for _ in range(4)
    ]
    ends = [run.communicate()[1].decode().splitlines()[-1] for run in runs]
    assert {run.returncode for run in runs} == {1}, ends
    assert all("cells, its header 3" in end for end in ends)
