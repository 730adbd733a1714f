"""A folder of files, as shops and public data sets have them, becomes a shop that checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders.data.check import check_shop
from builders.shop.first_toml import init_shop
from builders.shop.shop_toml import open_shop
from ensemble.errors import InvalidInput

MS = 1_433_221_332_000
RETAILROCKET = {
    "events.csv": "timestamp,visitorid,event,itemid,transactionid\n"
    + "".join(f"{MS + i * 60_000},{i % 9},{'view' if i % 3 else 'addtocart'},{i % 5},\n" for i in range(60)),
    "item_properties_part1.csv": "timestamp,itemid,property,value\n"
    + "".join(f"{MS},{i % 5},{i},n{i}\n" for i in range(20)),
    "category_tree.csv": "categoryid,parentid\n1016,213\n809,169\n",
}
AMAZON = {
    "reviews.jsonl": "".join(
        json.dumps({"rating": i % 5 + 1.0, "title": f"Good {i}", "asin": f"B{i % 11}",
                    "parent_asin": f"P{i % 6}",
                    "user_id": f"A{i % 8}", "timestamp": MS + i, "verified": True, "images": []}) + "\n"
        for i in range(60)),
    "meta.jsonl": "".join(
        json.dumps({"main_category": "Beauty", "title": f"Lipstick no. {i}", "price": [None, 3.5][i % 2],
                    "features": ["red", "matte"], "details": {"a": 1}, "parent_asin": f"P{i}"}) + "\n"
        for i in range(6)),
}  # fmt: skip
PLAIN = {
    "sales.tsv": "when\tsku\tcustomer_id\tstars\n"
    + "".join(f"2024-01-{i % 28 + 1:02}T10:00:00Z\ts{i % 6}\tc{i % 7}\t{i % 10 + 1}\n" for i in range(70)),
    "products.csv": "sku;name;price;tags;empty\n"
    + "".join(f"s{i};Thing {i};{i},50;x|y{i % 2};\n" for i in range(6)),
    "people.csv": "customer_id,city\n" + "".join(f"c{i},town {i % 3}\n" for i in range(7)),
}


def written(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_retailrocket_as_it_is_unpacked(tmp_path: Path):
    folder = written(tmp_path / "retailrocket", RETAILROCKET)
    first = init_shop(folder)
    assert [(column, role) for _, column, role in first.mapping] == [
        ("visitorid", "user"), ("itemid", "item"), ("timestamp", "time"), ("event", "event"),
    ]  # fmt: skip
    report = check_shop(folder)
    assert report.sections["interactions"]["rows"] == 60
    assert "Unix milliseconds" in first.text
    assert "# not used: category_tree.csv" in first.text


def test_amazon_reviews_and_their_catalogue(tmp_path: Path):
    folder = written(tmp_path / "amazon", AMAZON)
    first = init_shop(folder, like_from=3)
    assert ("reviews.jsonl", "parent_asin", "item") in first.mapping, "which the catalogue has, too"
    assert ("reviews.jsonl", "rating", "rating; 3 and more is liked, 60% of the first rows") in first.mapping
    shop = open_shop(folder)
    assert shop.interactions.history == "all", "what was rated badly was taken all the same"
    assert (shop.items.title, [f.name for f in shop.items.features][:1]) == ("title", ["main_category"])
    assert check_shop(folder).sections["catalogue"]["items"] == 6


def test_any_folder_with_roles_that_are_told(tmp_path: Path):
    folder = written(tmp_path / "mine", PLAIN)
    with pytest.raises(
        InvalidInput, match="no column that is called like a time; name it: --map time=COLUMN"
    ):
        init_shop(folder)
    assert not (folder / "shop.toml").exists()
    first = init_shop(folder, told={"time": "when"})
    shop = open_shop(folder)
    assert (shop.interactions.user, shop.interactions.item, shop.split.kind) == ("customer_id", "sku", "time")
    assert shop.tasks[0].label.threshold == 7
    assert {f.name: f.kind for f in shop.items.features}["tags"] == "category"
    assert {f.name: f.kind for f in shop.items.features}["price"] == "number"
    assert "# empty: empty" in first.text
    assert shop.users.id == "customer_id"
    report = check_shop(folder)
    assert report.sections["ids that join"]["users of people.csv"].startswith("7 of 7 (100.0%)")
    with pytest.raises(InvalidInput, match="is there already; --force"):
        init_shop(folder)
    assert init_shop(folder, told={"time": "when", "item": "sku"}, force=True).text == first.text


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"thing": "sku"}, "no such role; there are user, item"),
        ({"item": "nothing"}, "no file has that column; there are people.csv: customer_id city"),
        ({"items": "nothing.csv"}, "no such file; there are people.csv, products.csv"),
    ],
)
def test_what_is_told_wrongly_is_named(tmp_path: Path, told: dict[str, str], message: str):
    with pytest.raises(InvalidInput, match=message):
        init_shop(written(tmp_path / "mine", PLAIN), told=told)
