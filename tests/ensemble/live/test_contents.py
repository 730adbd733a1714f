"""Titles and pictures of items that come later are encoded as the build encoded the others, kept with the
log, and found by the next build."""

from __future__ import annotations

import base64
import json
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from shops import private_copy
from typer.testing import CliRunner

from clients.cli.items import app
from clients.client import Client
from clients.errors import InvalidArgument
from clients.items import ItemClient
from ensemble.errors import InvalidInput
from ensemble.live.catalogue import REPLACE, Entry, log_folder
from ensemble.live.encoding import ENCODING, ItemEncoding
from ensemble.live.pictures import keep_picture, picture_path
from ensemble.live.service import ItemService
from ensemble.live.writer import ItemWriter
from ensemble.steps.served import ServedRelease, open_served

PICTURE, WORDS = "image", "title"


def shop_items(shop: Path) -> list[dict]:
    return pq.read_table(shop / "items.parquet").to_pylist()


@pytest.fixture
def release(pictured_repository: Path, tmp_path: Path) -> ServedRelease:
    return open_served(private_copy(pictured_repository, tmp_path / "repository"), "r1")


def test_a_later_item_is_encoded_as_the_build_would(release, pictured_shop):
    encoding, entries = ItemEncoding(release), []
    for item in shop_items(pictured_shop)[:40]:
        name = keep_picture(log_folder(_made(release)), (pictured_shop / item[PICTURE]).read_bytes())
        values = {key: value for key, value in item.items() if key in encoding.columns} | {PICTURE: name}
        entries.append(Entry(1, 1, REPLACE, item["item_id"], values))
    rows, _, good = encoding.rows(entries, [frozenset(entry.values) for entry in entries])
    of_build = release.items[release.item_ids.rows_from_ids(np.array([e.item_id.encode() for e in entries]))]
    assert good.all()
    np.testing.assert_allclose(rows["values"], of_build["values"], atol=1e-4)
    np.testing.assert_array_equal(rows["codes"], of_build["codes"])
    assert np.abs(rows["values"]).max() > 0.5


def _made(release: ServedRelease) -> Path:
    log_folder(release.home).mkdir(parents=True, exist_ok=True)
    return release.home


def test_an_item_without_title_or_picture_is_absent_in_both(release):
    encoding = ItemEncoding(release)
    rows, _, _ = encoding.rows([Entry(1, 1, REPLACE, "new", {}), Entry(2, 2, REPLACE, "empty", {WORDS: " "})])
    for feature in release.schema.items.features:
        if feature.kind == "embedding":
            columns = rows["values"][:, feature.columns]
            assert columns[:, -1].tolist() == [1, 1]
            assert not columns[:, :-1].any()


def test_an_update_of_the_price_keeps_title_and_picture(release):
    encoding, known = ItemEncoding(release), release.item_ids.sorted_ids[3].decode()
    entry = Entry(1, 1, "update", known, {"price": 3.5})
    rows, _, _ = encoding.rows([entry], [frozenset(["price"])])
    for feature in release.schema.items.features:
        if feature.kind == "embedding":
            np.testing.assert_array_equal(
                rows["values"][0, feature.columns], release.items["values"][4, feature.columns]
            )


def test_a_title_is_read_whatever_the_shop_calls_its_column(release, monkeypatch):
    path = release.path / ENCODING
    how = path.read_text().replace('"source": "title"', '"source": "name"')
    path.unlink()
    path.write_text(how)
    monkeypatch.setattr(type(release), "verify_data", lambda *_: None)
    encoding = ItemEncoding(release)
    assert "title" not in encoding.columns
    values = encoding.values({"item_id": "new", "title": "matte lipstick"})
    assert values == {"title": "matte lipstick", "name": "matte lipstick"}
    assert encoding.values({"item_id": "new", "title": "a", "name": "b"}) == {"title": "a", "name": "b"}


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("images/i1.png", "image: must be a picture's bytes as"),
        ({"base64": "?"}, "image: is no base64"),
        ({"base64": base64.b64encode(b"GIF89a").decode()}, "image: is no JPEG, PNG or WebP"),
        (
            {"base64": base64.b64encode(b"0" * 4_000_001).decode()},
            "image: has 4.0 MB; at most 4 MB are taken",
        ),
        ({"base64": ""}, "image: is empty"),
    ],
)
def test_a_picture_that_is_none_changes_nothing(release, picture, message):
    writer = ItemWriter(release)
    try:
        with pytest.raises(InvalidInput) as caught:
            writer.apply([{"op": "add", "item": {"item_id": "new", "image": picture}}])
        assert str(caught.value).startswith(f"item 'new': {message}")
        assert writer.sequence == 0
        assert not (log_folder(release.home) / "pictures").exists()
    finally:
        writer.close()


def test_files_are_read_by_the_client(tmp_path):
    from clients.items import _sendable

    (tmp_path / "a.png").write_bytes(b"bytes")
    change = {"op": "add", "item": {"item_id": "x", "image": tmp_path / "a.png", "title": "t"}}
    assert _sendable(change)["item"] == {"item_id": "x", "image": {"base64": "Ynl0ZXM="}, "title": "t"}
    assert _sendable({"op": "add", "item": {"item_id": "x", "image": b"bytes"}})["item"]["image"]
    with pytest.raises(InvalidArgument, match=r"item 'x': image: cannot read .*gone\.png: No such file"):
        _sendable({"op": "add", "item": {"item_id": "x", "image": tmp_path / "gone.png"}})
    with pytest.raises(InvalidArgument, match=r"image: 5\.0 MB; a picture has at most 4 MB"):
        _sendable({"op": "add", "item": {"item_id": "x", "image": bytes(5_000_000)}})


def test_the_next_build_reads_the_pictures_of_the_log(release, pictured_shop, tmp_path):
    from builders.content.features import encode_contents
    from builders.shop.catalogue import read_changes, write_changes
    from builders.shop.read import read_shop

    data = (pictured_shop / "images" / "i7.png").read_bytes()
    writer = ItemWriter(release)
    writer.apply(
        [{"op": "add", "item": {"item_id": "new", "image": {"base64": base64.b64encode(data).decode()}}}]
    )
    name = writer.catalogue.entry("new").values[PICTURE]
    writer.close()
    assert picture_path(log_folder(release.home), name).read_bytes() == data
    _, file, _ = write_changes(release.home, tmp_path / "stages")
    tables = read_shop(pictured_shop, changes=read_changes(file))
    contents = encode_contents(
        tables.shop.items.features, tables.items.columns, shop=pictured_shop, catalogue=file, threads=1,
        cache=release_cache_of(pictured_shop), progress=lambda share, text: None,
    )  # fmt: skip
    values, ids = contents.by_feature[PICTURE].values, tables.items.ids[tables.items.index]
    np.testing.assert_array_equal(values[ids == b"new"], values[ids == b"i7"])
    assert contents.lines[1] == "image: 121 of 121 items encoded"


def release_cache_of(shop: Path) -> Path:
    return shop.parent / "repository" / ".build" / "shop" / "encoded"


@pytest.mark.triton
@pytest.mark.timeout(300)
def test_a_new_item_is_recommended_at_once_to_those_who_like_what_it_looks_like(release, pictured_shop):
    from ensemble.server.options import ServeOptions
    from ensemble.server.supervisor import serve

    service = ItemService(release.home, lambda line: None)
    thread = threading.Thread(target=service.run, daemon=True)
    user = release.user_ids.sorted_ids[5].decode()
    with (
        serve(release.home, ServeOptions(port=0, metrics_port=None)) as server,
        Client(server.url) as client,
    ):
        thread.start()
        while not (release.home / ".live" / "writer.json").exists():
            time.sleep(0.01)
        try:
            with ItemClient(release.home, wait_s=10) as items:
                first = client.recommend(user, top_k=1).items[0].item_id
                twin = next(item for item in shop_items(pictured_shop) if item["item_id"] == first)
                picture = pictured_shop / twin.pop(PICTURE)
                items.add({"item_id": "warm up", "title": "soft mask", "image": picture})
                start = time.monotonic()
                done = items.add({**twin, "item_id": "its twin", "image": picture})
                took_s = time.monotonic() - start
                assert done.done
                assert took_s < 5, "one title and one picture, encoded and told to every instance"
                found = [item.item_id for item in client.recommend(user, top_k=50).items]
                assert "its twin" in found
        finally:
            service.stop()
            thread.join()


def test_the_command_line_adds_titles_and_pictures_and_shows_them(release, pictured_shop):
    service = ItemService(release.home, lambda line: None)
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    while not (release.home / ".live" / "writer.json").exists():
        time.sleep(0.01)
    options = ["--repository", str(release.home)]
    try:
        picture = str(pictured_shop / "images" / "i7.png")
        said = ["--title", "gloss berry", "--image", picture, "--wait-s", "0"]
        done = CliRunner().invoke(app, ["add", "new", *said, *options])
        assert done.exit_code == 0, done.output
        refused = CliRunner().invoke(
            app, ["add", "n2", "--image", str(pictured_shop / "shop.toml"), *options]
        )
        assert "item 'n2': image: is no JPEG, PNG or WebP" in str(refused.exception)
        both = CliRunner().invoke(app, ["add", "--file", picture, "--image", picture, *options])
        assert "--set, --title and --image are of one item" in str(both.exception)
    finally:
        service.stop()
        thread.join()
    new, known = (
        json.loads(CliRunner().invoke(app, ["show", i, "--json", *options]).output) for i in ("new", "i7")
    )
    assert (new["title"], new["values"]["image"][:7], new["from_log"]) == (
        "gloss berry",
        "sha256:",
        ["title", "image"],
    )
    assert known["source"] == "files"
    assert "image" not in known["values"], "a release keeps no pictures"


def test_a_picture_that_was_lost_is_absent_and_nothing_else_is(release, pictured_shop):
    data = (pictured_shop / "images" / "i7.png").read_bytes()
    name = keep_picture(log_folder(_made(release)), data)
    picture_path(log_folder(release.home), name).unlink()
    entries = [Entry(1, 1, REPLACE, "new", {PICTURE: name, WORDS: "soft mask"})]
    rows, _, good = ItemEncoding(release).rows(entries)
    flags = {
        f.name: rows["values"][0, f.columns.stop - 1] for f in release.schema.items.features if f.encoder
    }
    assert flags == {"words": 0, "image": 1}
    assert good.all()
