"""What was changed while it was served is in the tables of a build, as the files would have it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from builders.build import BuildOptions, build
from builders.data.stage import dataset_from_tables
from builders.presets import preset
from builders.shop.catalogue import read_changes, write_changes
from builders.shop.read import read_shop
from builders.stages import Stage, Stages
from ensemble.live.catalogue import DELETE, REPLACE, UPDATE, UPSERT, Entry
from ensemble.live.catalogue_log import CatalogueLog


class StopBuild(Exception):
    """Ends a build before its first stage."""


TOML = """\
name = "small"
[interactions]
file = "events.csv"
user = "user"
item = "item"
time = "time"
"""
ITEMS = """
[items]
file = "{file}"
id = "id"
title = "label"
features = [
  {{name = "brand", kind = "category", column = "maker"}},
  {{name = "tags", kind = "category", separator = "|", width = 3}},
  {{name = "price", kind = "number"}},
  {{name = "words", kind = "text", column = "label"}},
  {{name = "vector", kind = "vector(2)"}},
]
"""
EVENTS = "user,item,time\nu1,a,1\nu1,b,2\nu2,b,3\nu2,c,4\nu3,new,5\nu3,a,6\n"
COLUMNS = {
    "id": ["a", "b", "c"],
    "maker": ["Rouge", "Noir", None],
    "tags": ["red|matte", "blue", ""],
    "price": [1.5, None, 3.0],
    "label": ["first red", "second", "third"],
    "vector": [[1.0, 2.0], [3.0, 4.0], None],
}
CHANGES = [
    Entry(0, 0, DELETE, "c"),
    Entry(0, 0, UPDATE, "b", {"maker": "Rouge", "price": 7, "tags": ["red", "new"]}),
    Entry(0, 0, REPLACE, "a", {"label": "fresh", "vector": [9, 8]}),
    Entry(0, 0, UPSERT, "new", {"maker": "Vert", "price": "2.5", "tags": "matte|red", "title": "unused"}),
    Entry(0, 0, UPDATE, "nowhere", {"price": 1}),
    Entry(0, 0, DELETE, "neither"),
]


def shop_of(folder: Path, file: str) -> Path:
    (folder / "events.csv").write_text(EVENTS)
    (folder / "shop.toml").write_text(TOML + (ITEMS.format(file=file) if file else ""))
    if file.endswith("parquet"):
        pq.write_table(pa.table(COLUMNS), folder / file)
    elif file:
        cells = [
            [
                "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
                for value in row
            ]
            for row in zip(*COLUMNS.values(), strict=True)
        ]
        (folder / file).write_text("\n".join(",".join(line) for line in [COLUMNS, *cells]) + "\n")
    return folder


@pytest.mark.parametrize("file", ["items.parquet", "items.csv"])
def test_the_log_is_over_the_files(tmp_path, file):
    tables = read_shop(shop_of(tmp_path, file), changes={entry.item_id: entry for entry in CHANGES})
    assert tables.applied.line() == "items from the log: 1 added, 2 changed, 1 deleted"
    dataset = dataset_from_tables(tables)
    assert dataset.item_ids.tolist() == [b"a", b"b", b"new"]
    assert dataset.item_titles.tolist() == [b"", b"fresh", b"second", b""]
    brand, tags = dataset.vocabularies["items"]["brand"], dataset.vocabularies["items"]["tags"]
    assert brand == ["Rouge", "Vert"]
    codes = dataset.item_codes
    features = {feature.name: feature for feature in dataset.schema.items.features}
    offset = features["tags"].offset
    assert [[tags[code - offset - 1] for code in row if code] for row in codes[1:, 1:4]] == [
        [],
        ["red", "new"],
        ["matte", "red"],
    ]
    np.testing.assert_array_equal(dataset.item_numbers[1:, 0], [np.nan, 7, 2.5])
    assert dataset.item_values[1, features["vector"].columns].any()
    assert not dataset.item_values[3, features["vector"].columns].any(), "nothing is known of it"
    assert dataset.histories.item_rows.tolist() == [1, 2, 2, 3, 1], "events of the new item count"


def test_a_value_that_does_not_fit_leaves_the_files_and_is_counted(tmp_path):
    changes = {"a": Entry(0, 0, UPDATE, "a", {"price": "cheap", "maker": "Vert", "gone": 3})}
    tables = read_shop(shop_of(tmp_path, "items.parquet"), changes=changes)
    assert tables.applied.line() == (
        "items from the log: 0 added, 1 changed, 0 deleted; 1 values of price do not fit its column"
    )
    assert tables.items.columns["price"].values.to_pylist() == [1.5, None, 3.0]
    assert tables.items.columns["maker"].values.to_pylist() == ["Vert", "Noir", None]


def test_a_shop_without_an_items_file_has_the_logs_items(tmp_path):
    tables = read_shop(shop_of(tmp_path, ""), changes={entry.item_id: entry for entry in CHANGES})
    assert tables.items.ids.tolist() == [b"a", b"b", b"new"]
    assert tables.applied.line() == "items from the log: 0 added, 0 changed, 1 deleted"


def test_whole_numbers_as_ids_and_categories(tmp_path):
    table = pa.table({**COLUMNS, "id": [1, 2, 3], "maker": [10, 20, None]})
    shop = shop_of(tmp_path, "items.parquet")
    (shop / "events.csv").write_text("user,item,time\nu1,1,1\nu2,2,2\n")
    pq.write_table(table, shop / "items.parquet")
    changes = {"7": Entry(0, 0, UPSERT, "7", {"maker": 10}), "2": Entry(0, 0, UPDATE, "2", {"maker": "new"})}
    dataset = dataset_from_tables(read_shop(shop, changes=changes))
    assert dataset.item_ids.tolist() == [b"1", b"2", b"3", b"7"]
    assert dataset.vocabularies["items"]["brand"] == ["10", "new"]


def test_a_build_reads_the_log_as_it_was_when_it_began(tmp_path):
    assert write_changes(tmp_path, tmp_path / "stages")[0] == ("", 0)
    log = CatalogueLog(tmp_path)
    log.append([Entry(0, 0, UPSERT, "a", {"price": 1}, {"release": [1.0]}), Entry(0, 0, DELETE, "b")])
    mark, file, digest = write_changes(tmp_path, tmp_path / "stages")
    assert mark == (log.id, 2)
    log.append([Entry(0, 0, UPSERT, "a", {"price": 2})])
    assert read_changes(file)["a"] == Entry(0, 0, UPSERT, "a", {"price": 1})
    assert write_changes(tmp_path, tmp_path / "stages")[2] != digest
    log.append([Entry(0, 0, UPSERT, "a", {"price": 1})])
    mark, _, again = write_changes(tmp_path, tmp_path / "stages")
    assert (mark.sequence, again) == (4, digest), "the same items need no other stages"


def test_a_build_reads_the_log_of_the_home_that_it_is_given(tmp_path, monkeypatch):
    home, repository = tmp_path / "home", tmp_path / "repository"
    home.mkdir()
    CatalogueLog(home).append([Entry(0, 0, UPSERT, "new", {"maker": "Vert"})])
    seen = []

    def run(self: Stages, stage: Stage) -> None:
        seen.append(self.given["catalogue"])
        raise StopBuild

    monkeypatch.setattr(Stages, "run", run)
    (tmp_path / "shop").mkdir()
    for where in (home, None):
        options = BuildOptions(
            shop_of(tmp_path / "shop", "items.csv"), repository, preset("tiny"), home=where
        )
        with pytest.raises(StopBuild):
            build(options, Console(quiet=True))
    assert "new" in read_changes(seen[0][1])
    assert not read_changes(seen[1][1]), "the repository's own, which has none"
