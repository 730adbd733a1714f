"""A folder of files, as shops and public data sets have them, becomes a shop that checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders.data.check import check_shop
from builders.shop.first_toml import init_shop
from builders.shop.read import read_shop
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
    assert init_shop(folder, force=True).text == first.text, "the only column of moments is the time"
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


def test_orders_of_a_till_that_writes_days_and_letters_in_its_own_way(tmp_path: Path):
    folder = tmp_path / "till"
    folder.mkdir()
    rows = "".join(
        f"k{i % 9}@müller.de;Ä-{i % 7};{i % 28 + 1:02}.{i % 12 + 1:02}.2023;1.{i:03},50\n" for i in range(80)
    )
    (folder / "orders.csv").write_bytes(("client;sku;order_date;sum\n" + rows).encode("cp1252"))
    first = init_shop(folder)
    assert ("orders.csv", "order_date", "time, written %d.%m.%Y") in first.mapping
    assert ("orders.csv", "encoding", "cp1252, since it is no UTF-8") in first.mapping
    report = check_shop(folder)
    assert report.columns[0]["high"] == "k8@müller.de"
    assert report.sections["interactions"]["from"] == "2023-01-01"


@pytest.mark.parametrize(("second", "others"), [("05/06/2023", True), ("05/28/2023", False)])
def test_days_that_two_ways_of_writing_fit_are_told(tmp_path: Path, second: str, others: bool):
    rows = "".join(f"u{i % 3},i{i % 4},{second if i % 2 else '05/04/2023'}\n" for i in range(12))
    first = init_shop(written(tmp_path / "days", {"log.csv": "user,item,day\n" + rows}))
    role = next(role for _, column, role in first.mapping if column == "day")
    assert role == ('time, written %d/%m/%Y; or "%m/%d/%Y"' if others else "time, written %m/%d/%Y")


def test_several_columns_of_times_are_not_guessed_among(tmp_path: Path):
    rows = "".join(f"u{i % 3},i{i % 4},2023-05-0{i % 9 + 1},2023-06-01\n" for i in range(12))
    folder = written(tmp_path / "two", {"log.csv": "user,item,order_date,delivery_date\n" + rows})
    with pytest.raises(
        InvalidInput, match=r"order_date, delivery_date; say which tells .* --map time=COLUMN"
    ):
        init_shop(folder)
    assert init_shop(folder, told={"time": "order_date"}).mapping[2] == ("log.csv", "order_date", "time")


def test_ids_that_are_numbers_are_categories(tmp_path: Path):
    rows = "".join(f"p{i},{i * 7 % 50 + 1000},{i * 3 % 40},{i * 1.5}\n" for i in range(60))
    log = "".join(f"u{i % 5},p{i % 60},{1_600_000_000 + i}\n" for i in range(99))
    first = init_shop(
        written(tmp_path / "codes", {
            "log.csv": "household_id,product_id,transaction_timestamp\n" + log,
            "products.csv": "product_id,manufacturer_id,shelfCode,price\n" + rows,
        })
    )  # fmt: skip
    kinds = {column: role for file, column, role in first.mapping if file == "products.csv"}
    assert kinds["manufacturer_id"] == kinds["shelfCode"] == 'feature, "category"'
    assert kinds["price"] == 'feature, "number"'


@pytest.mark.parametrize("is_sorted", [False, True])
def test_a_log_without_times_is_ordered_by_its_rows(tmp_path: Path, is_sorted: bool):
    pairs = [(u, (u * 7 + n * 5) % 23) for u in range(12) for n in range(8)]
    pairs = sorted(pairs) if is_sorted else pairs
    text = "user\tmovie\tscore\n" + "".join(f"{u}\t{i}\t{(u + i) % 5 + 1}\n" for u, i in pairs)
    folder = written(tmp_path / "untimed", {"ratings.tsv": text})
    first = init_shop(folder)
    assert ("ratings.tsv", "(none)", "time; --map time=COLUMN if there is one") in first.mapping
    tables = read_shop(folder)
    last = tables.interactions.times.reshape(12, 8).argmax(axis=1)
    assert (last == 7).all() != is_sorted, "of a sorted file the last rows would be those of the last ids"
    notes = [note for column in check_shop(folder).columns for note in column["notes"]]
    assert any("a random order stands for times" in note for note in notes) == is_sorted
    assert check_shop(folder).sections["histories"]["test users"] == 12


def test_a_log_that_tells_of_its_items_is_their_table_too(tmp_path: Path):
    rows = "".join(
        f"u{i % 7},m{i % 60:02},{1_600_000_000 + i * 60},Film no. {i % 60}{' (slip)' * (i == 70)},"
        f"{['drama', 'comedy'][i % 60 % 2]},{i // 13 % 4},town {i % 7 % 2}\n"
        for i in range(800)
    )
    folder = written(tmp_path / "one", {"log.csv": "user,movie,time,title,genre,mood,town\n" + rows})
    first = init_shop(folder)
    shop = open_shop(folder)
    assert (shop.items.file, shop.items.title) == ("log.csv", "title")
    assert [f.name for f in shop.items.features] == ["title", "genre"]
    assert [f.name for f in shop.users.features] == ["town"]
    assert "# not used: mood" in first.text
    tables = read_shop(folder)
    assert tables.items.ids.tolist() == [b"m%02d" % i for i in range(60)]
    assert tables.items.columns["genre"].values.to_pylist() == ["drama", "comedy"] * 30
    assert len(tables.interactions) == 800, "the log's rows are all there"
    assert check_shop(folder).sections["catalogue"]["items without title"] == 0


LOG = "".join(f"u{i % 3};i{i % 4};0{i % 9 + 1}/28/2023 0{i % 9 + 1}:26 PM\n" for i in range(40))


def test_a_spreadsheet_says_its_separator_above_the_names(tmp_path: Path):
    folder = written(tmp_path / "sheet", {"log.csv": "sep=;\nuser;item;date\n" + LOG})
    assert init_shop(folder).mapping[2] == ("log.csv", "date", "time, written %m/%d/%Y %I:%M %p")
    report = check_shop(folder)
    assert report.sections["interactions"]["rows"] == 40
    assert report.sections["interactions"]["from"] == "2023-01-28"


def test_times_that_nobody_can_read_do_not_keep_shop_toml_from_being_written(tmp_path: Path):
    folder = written(tmp_path / "odd", {"log.csv": "user;item;date\n" + LOG.replace("/28/2023", " d'été")})
    init_shop(folder)
    with pytest.raises(InvalidInput, match=r"column 'date', row 1: .* is no time; .*time_format"):
        check_shop(folder)
    text = (folder / "shop.toml").read_text()
    (folder / "shop.toml").write_text(
        text.replace('# time_format = "%d/%m/%Y %H:%M"', 'time_format = "%m d\'été %I:%M %p"')
    )
    assert check_shop(folder).sections["interactions"]["rows"] == 40


def test_files_that_are_no_tables_are_named_with_a_cure(tmp_path: Path):
    with pytest.raises(InvalidInput, match=r"only orders\.xlsx; save what they hold as CSV"):
        init_shop(written(tmp_path / "sheet", {"orders.xlsx": "PK"}))
