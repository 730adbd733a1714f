"""`peregrine items`: what it lists and shows is what was written, and what it drops nobody misses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from shops import ROOT, private_copy
from typer.testing import CliRunner

from clients.cli.items import app
from clients.items import parts_of
from ensemble.errors import PeregrineError
from ensemble.live.catalogue import open_catalogue
from ensemble.live.writer import ItemWriter
from ensemble.steps.served import open_served


@pytest.fixture
def changed(tiny_repository: Path, tmp_path: Path) -> Path:
    """A repository with a few changes, one of them twice."""
    repository = private_copy(tiny_repository, tmp_path / "repository")
    writer = ItemWriter(open_served(repository, "r1"))
    first, second = (name.decode() for name in writer.release.item_ids.sorted_ids[:2])
    for item in (
        {"item_id": "a new one", "brand": "brand-2", "price": 12.5, "title": "Lipstick"},
        {"item_id": second, "price": 3},
    ):
        writer.apply([{"op": "upsert", "item": item}])
    writer.apply([{"op": "upsert", "item": {"item_id": "a new one", "brand": "Neverseen"}}])
    writer.apply([{"op": "delete", "item": {"item_id": first}}])
    writer.close()
    return repository


def run(repository: Path, *arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--repository", str(repository)])
    if isinstance(done.exception, PeregrineError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_a_page_follows_the_other(changed):
    release = open_served(changed, "r1")
    names = [name.decode() for name in release.item_ids.sorted_ids]
    pages: list[dict] = []
    while page := json.loads(
        run(changed, "list", "-n", "90", "--json", "--after", pages[-1]["item_id"] if pages else "")
    ):
        pages += page
    assert [one["item_id"] for one in pages] == sorted(["a new one", *names[1:]])
    by_id = {one["item_id"]: one for one in pages}
    assert (by_id["a new one"]["source"], by_id["a new one"]["sequence"]) == ("log", 3)
    assert (by_id[names[1]]["source"], by_id[names[5]]["source"]) == ("files+log", "files")
    only = json.loads(run(changed, "list", "--changed", "--json"))
    assert [(one["item_id"], one["is_here"]) for one in only] == sorted(
        [("a new one", True), (names[0], False), (names[1], True)]
    )
    text = run(changed, "list", "-n", "1")
    assert "Lipstick" in text
    assert "the next page: --after 'a new one'" in text


def test_an_item_is_shown_as_it_was_written(changed, tiny_shop):
    names = [name.decode() for name in open_served(changed, "r1").item_ids.sorted_ids]
    rows = {str(row["item_id"]): row for row in pq.read_table(tiny_shop / "items.parquet").to_pylist()}
    for name in names[5:25]:
        shown = json.loads(run(changed, "show", name, "--json"))["values"]
        for column in ("brand", "price"):
            wanted = rows[name][column]
            assert shown.get(column) == (wanted if isinstance(wanted, str | None) else pytest.approx(wanted))
    new = json.loads(run(changed, "show", "a new one", "--json"))
    assert new["values"] == {"brand": "Neverseen", "price": 12.5, "title": "Lipstick"}
    assert new["title"] == "Lipstick"
    mixed = json.loads(run(changed, "show", names[1], "--json"))
    assert (mixed["from_log"], mixed["values"]["price"]) == (["price"], 3)
    assert "is deleted" in run(changed, "show", names[0])
    with pytest.raises(PeregrineError, match=r"^item 'nobody' is in no file .* was never changed; "):
        run(changed, "show", "nobody")


def test_compacting_leaves_the_last_line_of_each_item(changed):
    release = open_served(changed, "r1")
    rows = np.arange(1, release.live.view.num_rows)
    before = [release.live.view.gather(rows, field) for field in ("embedding", "features", "values")]
    assert json.loads(run(changed, "compact", "--json"))["dropped"] == 1
    reader = open_catalogue(changed)
    assert [(entry.item_id, entry.sequence, entry.born) for _, entry in reader.read()][1:2] == [
        ("a new one", 3, 1)
    ]
    again = ItemWriter(open_served(changed, "r1"))
    assert again.apply([{"op": "update", "item": {"item_id": "a new one", "price": 1}}]) == 5
    again.close()
    for path in release.live_folder.iterdir():
        path.rename(changed / path.name)  # the overlay is made again from the compacted log
    writer = ItemWriter(open_served(changed, "r1"))
    writer.apply([{"op": "update", "item": {"item_id": "a new one", "price": 12.5}}])
    after = [writer.live.view.gather(rows, field) for field in ("embedding", "features", "values")]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_without_a_log_or_a_writer_each_says_what_to_do(tiny_repository, tmp_path):
    repository = private_copy(tiny_repository, tmp_path / "repository")
    for command in ("status", "compact"):
        with pytest.raises(PeregrineError, match="start `peregrine serve`, or `peregrine items serve`"):
            run(repository, command)
    done = subprocess.run(
        [sys.executable, "-m", "peregrine", "items", "show", "x", "-r", str(repository)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), "one line, no traceback"


def test_changes_are_sent_in_parts_that_the_writer_takes():
    small, picture = (
        {"op": "add", "item": {"item_id": "x"}},
        {"op": "add", "item": {"image": "x" * 5_000_000}},
    )
    assert parts_of([]) == [(0, 0)]
    assert parts_of([small] * 2001) == [(0, 1000), (1000, 2000), (2000, 2001)]
    assert parts_of([small, *[picture] * 7]) == [(0, 4), (4, 7), (7, 8)]
