"""Files of each known format, written small, become shops that load."""

import json
import os
import re
from pathlib import Path

import pytest
from shops import ROOT

from builders.data.stage import load_dataset
from builders.shop.imported import Asked
from builders.shop.importers import import_shop
from builders.shop.shop_toml import open_shop
from ensemble.errors import InvalidInput

SHARED = Path(os.environ.get("PEREGRINE_SHARED", ROOT.parent / "shared"))


def write(folder: Path, files: dict[str, str], encoding: str = "utf-8") -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding)
    return folder


def test_sequences_with_titles_and_attributes(tmp_path: Path) -> None:
    source = write(
        tmp_path / "seq",
        {
            "Toy.txt": "u1 3 1 2 3\nu2 2 1\n",
            "Toy_items.tsv": 'item_id\tasin\ttitle\n1\tA\tRed "Lipstick"\n2\tB\tRemover\n4\tC\tNew\n',
            "Toy_item2attributes.json": '{"1": [5, 6, 5], "2": [6]}',
            "Toy_sample.txt": "u1 9 9\n",
        },
    )
    import_shop("sequences", source, tmp_path / "shop")
    dataset = load_dataset(tmp_path / "shop")
    assert dataset.schema.shop == "Toy"
    assert dataset.item_ids.tolist() == [b"1", b"2", b"3", b"4"]
    assert dataset.item_titles.tolist() == [b"", b'Red "Lipstick"', b"Remover", b"", b"New"]
    assert dataset.histories.item_rows.tolist() == [3, 1, 2, 3, 2, 1]
    assert dataset.histories.times.tolist() == [1, 2, 3, 4, 1, 2]
    assert dataset.test.item_rows.tolist() == [3]
    assert dataset.vocabularies["items"] == {"attributes": ["6", "5"]}
    assert dataset.train_impressions is None
    assert [(t.name, t.kind) for t in dataset.schema.tasks] == [("interact", "binary")]


def test_sequences_of_a_single_file(tmp_path: Path) -> None:
    source = write(tmp_path / "seq", {"plain.txt": "1 2 3\n2 3 4 5\n\n"})
    import_shop("sequences", source / "plain.txt", tmp_path / "shop")
    assert load_dataset(tmp_path / "shop").num_items == 4


def test_recbole_s_atomic_files(tmp_path: Path) -> None:
    ratings = "".join(f"{u}\t{i}\t{(u * i) % 5 + 1}\t{u * 10 + i}\n" for u in (1, 2, 3) for i in range(1, 7))
    films = "".join(f"{i}\tTitle {i}\tA B\t{i}.5\t0.1 {i}\n" for i in range(1, 7))
    source = write(
        tmp_path / "toy",
        {
            "toy.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + ratings,
            "toy.item": "item_id:token\tmovie_title:token_seq\tclass:token_seq\tprice:float\tlook:float_seq\n"
            + films,
            "toy.user": "user_id:token\tage:token\n1\t24\n2\t\n",
        },
    )
    import_shop("recbole", source, tmp_path / "shop")
    dataset = load_dataset(tmp_path / "shop")
    assert dataset.schema.events == ("event", "like")
    assert [(f.name, f.kind) for f in dataset.schema.items.features] == [
        ("words", "text"),
        ("class", "category"),
        ("price", "number"),
        ("look", "vector"),
    ]
    assert dataset.vocabularies["items"]["class"] == ["A", "B"]
    assert dataset.vocabularies["users"] == {"age": ["24"]}
    assert [t.name for t in dataset.schema.tasks] == ["like"]
    assert dataset.item_titles[1] == b"Title 1"
    assert open_shop(tmp_path / "shop").split.kind == "time"


def test_recbole_without_labels_or_times(tmp_path: Path) -> None:
    source = write(tmp_path / "toy", {"toy.inter": "user_id:token\titem_id:token\n1\ta\n1\tb\n2\ta\n1\tc\n"})
    import_shop("recbole", source / "toy.inter", tmp_path / "shop")
    dataset = load_dataset(tmp_path / "shop")
    assert dataset.train_impressions is None
    assert dataset.histories.item_rows.tolist() == [1, 2, 3, 1]


RATINGS = [
    (user, item, (user + item) % 5 + 1, 900_000_000 + 10 * user + item)
    for user in (1, 2, 3, 4)
    for item in range(1, 7)
]


def _movielens(folder: Path, form: str) -> Path:
    if form == "100k":
        genres = ["unknown", "Action", "Adventure", "Animation", *[f"g{g}" for g in range(4, 19)]]
        flags = "|".join("1" if g in (1, 3) else "0" for g in range(19))
        files = {
            "u.data": "".join("\t".join(map(str, row)) + "\n" for row in RATINGS),
            "u.item": "".join(f"{i}|Amélie {i} (1995)|01-Jan-1995||http://x|{flags}\n" for i in range(1, 7)),
            "u.user": "1|24|M|technician|85711\n2|53|F|other|94043\n",
            "u.genre": "".join(f"{name}|{at}\n" for at, name in enumerate(genres)),
        }
    elif form == "1m":
        files = {
            "ratings.dat": "".join("::".join(map(str, row)) + "\n" for row in RATINGS),
            "movies.dat": "".join(f"{i}::Amélie {i} (1995)::Action|Animation\n" for i in range(1, 7)),
            "users.dat": "1::M::24::10::48067\n2::F::53::16::70072\n",
        }
    else:
        files = {
            "ratings.csv": "userId,movieId,rating,timestamp\n"
            + "".join(",".join(map(str, row)) + "\n" for row in RATINGS),
            "movies.csv": "movieId,title,genres\n"
            + "".join(f'{i},"Amélie {i} (1995)",Action|Animation\n' for i in range(1, 7)),
        }
    return write(folder, files, "utf-8" if form == "latest" else "latin-1")


@pytest.mark.parametrize("form", ["100k", "1m", "latest"])
def test_movielens(tmp_path: Path, form: str) -> None:
    import_shop("movielens", _movielens(tmp_path / form, form), tmp_path / "shop", asked=Asked("ml"))
    dataset = load_dataset(tmp_path / "shop")
    assert (dataset.num_users, dataset.num_items) == (4, 6)
    assert dataset.item_titles[1].decode() == "Amélie 1 (1995)"
    assert dataset.vocabularies["items"]["genres"] == ["Action", "Animation"]
    assert dataset.train_impressions is not None
    assert dataset.train_impressions.times[0] == 900_000_011
    likes = sum(rating >= 4 for _, _, rating, _ in RATINGS)
    assert len(dataset.histories.item_rows) == len(RATINGS)
    assert (dataset.histories.kinds == 2).sum() == likes
    if form != "latest":
        assert dataset.vocabularies["users"]["gender"] == ["F", "M"]


@pytest.mark.parametrize(
    ("form", "files", "message"),
    [
        ("csv", {}, "--format 'csv' is unknown; use sequences, recbole, movielens, retailrocket, amazon"),
        (
            "sequences",
            {"a.txt": "1 2\n", "b.txt": "1 2\n"},
            "SRC: pick one file of 'user item item …' lines with --name; there are: a, b",
        ),
        (
            "sequences",
            {},
            "SRC: pick one file of 'user item item …' lines with --name; there are: no .txt file",
        ),
        (
            "sequences",
            {"a.txt": "1 2\n3\n"},
            "SRC/a.txt: line 2: wanted 'user item item …', one line per user, oldest item first",
        ),
        ("recbole", {}, "SRC: 0 files match *.inter; give the file itself or --name"),
        (
            "recbole",
            {"a.inter": "user_id\titem_id\n1\t2\n"},
            "SRC/a.inter: header 'user_id' is not name:type with type token, token_seq, float or float_seq",
        ),
        (
            "recbole",
            {"a.inter": "who:token\titem_id:token\n1\t2\n"},
            "SRC/a.inter: no token columns user_id and item_id; there are who, item_id",
        ),
        ("movielens", {}, "SRC: no u.data, ratings.dat or ratings.csv; SRC is the unpacked MovieLens folder"),
        (
            "movielens",
            {"ratings.dat": "1::1::5::1\n"},
            "SRC/movies.dat is missing; it belongs to this MovieLens set",
        ),
    ],
)
def test_what_cannot_be_imported_is_named(
    tmp_path: Path, form: str, files: dict[str, str], message: str
) -> None:
    source = write(tmp_path / "src", files)
    with pytest.raises(InvalidInput) as caught:
        import_shop(form, source, tmp_path / "shop")
    assert str(caught.value).replace(str(source), "SRC") == message
    assert not (tmp_path / "shop").exists()


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere is missing; SRC is a file or folder to import"):
        import_shop("sequences", tmp_path / "nowhere", tmp_path / "shop")


@pytest.mark.skipif(
    not (SHARED / "data/seq_s3rec/Beauty.txt").is_file(),
    reason="data/seq_s3rec is not here (PEREGRINE_SHARED names its folder)",
)
def test_beauty_has_the_published_counts(tmp_path: Path) -> None:
    import_shop("sequences", SHARED / "data/seq_s3rec", tmp_path / "shop", asked=Asked("Beauty"))
    dataset = load_dataset(tmp_path / "shop")
    assert (dataset.num_users, dataset.num_items, len(dataset.histories.item_rows)) == (
        22_363,
        12_101,
        198_502,
    )
    assert len(dataset.test.user_rows) == len(dataset.validation.user_rows) == 22_363
    assert (dataset.item_titles[1:] != b"").sum() == 12_094


# --- logs as they are unpacked, columns by header


def test_retailrocket_s_events_with_the_newest_category_of_each_item(tmp_path: Path) -> None:
    ms = 1_433_221_332_000
    names = ("view", "view", "addtocart", "transaction")
    events = "".join(f"{ms + at * 60_000},{at % 5},{names[at // 10 % 4]},{at % 10},\n" for at in range(80))
    source = write(
        tmp_path / "rr",
        {
            "events.csv": "timestamp,visitorid,event,itemid,transactionid\n" + events,
            "item_properties_part1.csv": "timestamp,itemid,property,value\n"
            f"{ms + 5},1,categoryid,20\n{ms},3,888,n1 n2\n",
            "item_properties_part2.csv": f"timestamp,itemid,property,value\n{ms},1,categoryid,10\n",
            "category_tree.csv": "categoryid,parentid\n20,7\n10,8\n",
        },
    )
    mapping = import_shop("retailrocket", source, tmp_path / "shop")
    assert [pair[1:] for pair in mapping[:4]] == [
        ("visitorid", "user"),
        ("itemid", "item"),
        ("timestamp", "time"),
        ("event", "event"),
    ]
    dataset = load_dataset(tmp_path / "shop")
    assert dataset.schema.shop == "rr"
    assert [task.name for task in dataset.schema.tasks] == ["cart", "buy"]
    assert dataset.vocabularies["items"] == {"category": ["20"], "parent": ["7"]}
    assert dataset.schema.events == ("view", "addtocart", "transaction")
    assert int(dataset.histories.times.min()) == ms // 1000


EVENTS = "timestamp,visitorid,event,itemid,transactionid\n" + "".join(
    f"{at},{at % 5},{('view', 'addtocart')[at % 2]},{at % 7},\n" for at in range(1, 60)
)


@pytest.mark.parametrize(
    ("form", "files", "said"),
    [
        (
            "retailrocket",
            {
                "events.csv": EVENTS,
                "item_properties_part1.csv": "timestamp,itemid,property,value\nx,1,categoryid,2\n",
            },
            "item_properties_part1.csv: column 'timestamp', row 1: 'x' is no number",
        ),
        (
            "amazon",
            {"r.jsonl": '{"user_id": "a", "asin": "b", "timestamp": 1, "rating": null}\n'},
            "r.jsonl: column 'rating': no row has a rating",
        ),
    ],
)
def test_a_log_s_mistake_is_named(tmp_path: Path, form: str, files: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(said)):
        import_shop(form, write(tmp_path / "src", files), tmp_path / "shop")


def test_an_undated_category_is_the_oldest(tmp_path: Path) -> None:
    source = write(
        tmp_path / "rr",
        {
            "events.csv": EVENTS,
            "item_properties_part1.csv": "timestamp,itemid,property,value\n"
            "5,1,categoryid,20\n,1,categoryid,10\n",
        },
    )
    import_shop("retailrocket", source, tmp_path / "shop")
    assert load_dataset(tmp_path / "shop").vocabularies["items"]["category"] == ["20"]


def test_amazon_s_reviews_by_header_by_map_and_from_a_rating(tmp_path: Path) -> None:
    reviews = "".join(
        json.dumps({"rating": at % 5 + 1.0, "title": "Good", "asin": f"B{at % 11}",
                    "parent_asin": f"P{at % 6}", "user_id": f"A{at % 8}",
                    "timestamp": 1_433_221_332_000 + at}) + "\n"
        for at in range(90)
    )  # fmt: skip
    meta = "".join(
        json.dumps({"main_category": "Beauty", "title": f"Lipstick no. {at}", "price": [None, 3.5][at % 2],
                    "store": None, "parent_asin": f"P{at}"}) + "\n"
        for at in range(5)
    )  # fmt: skip
    source = write(tmp_path / "amazon", {"All_Beauty.jsonl": reviews, "meta_All_Beauty.jsonl": meta})
    mapping = import_shop("amazon", source, tmp_path / "shop", asked=Asked(like_from=5))
    assert ("All_Beauty.jsonl", "parent_asin", "item") in mapping
    assert ("All_Beauty.jsonl", "rating", "rating; 5 and more is liked, 20% of the rows") in mapping
    dataset = load_dataset(tmp_path / "shop")
    assert (dataset.schema.shop, dataset.num_items) == ("All_Beauty", 6), "P5 has reviews and no product"
    assert dataset.item_titles[1] == b"Lipstick no. 0"
    assert dataset.train_impressions is not None
    assert open_shop(tmp_path / "shop").tasks[0].label.threshold == 5
    assert dataset.schema.events == ("event", "like")

    (source / "meta_All_Beauty.jsonl").unlink()
    again = import_shop("amazon", source, tmp_path / "other", asked=Asked(told={"item": "asin"}))
    assert ("All_Beauty.jsonl", "asin", "item") in again
    assert load_dataset(tmp_path / "other").num_items == 11


def test_recbole_s_files_of_one_split_are_the_shop_s_split(tmp_path: Path) -> None:
    def rows(first: int, last: int) -> str:
        lines = "".join(f"{u}\t{i}\t{i}\n" for u in range(9) for i in range(first, last))
        return "who_id:token\titem_id:token\ttimestamp:float\n" + lines

    source = write(
        tmp_path / "toy",
        {"toy.train.inter": rows(1, 7), "toy.valid.inter": rows(7, 8), "toy.test.inter": rows(8, 9)},
    )
    mapping = import_shop("recbole", source, tmp_path / "shop", asked=Asked(told={"user": "who_id"}))
    assert ("toy.test.inter", "all rows", "test") in mapping
    assert ("toy.train.inter", "who_id", "user") in mapping
    dataset = load_dataset(tmp_path / "shop")
    assert set(dataset.item_ids[dataset.test.item_rows - 1].tolist()) == {b"8"}
    assert set(dataset.item_ids[dataset.validation.item_rows - 1].tolist()) == {b"7"}


@pytest.mark.parametrize(
    ("form", "asked", "message"),
    [
        ("sequences", Asked(told={"item": "x"}), "--map: lines of 'user item item …' have no columns"),
        ("amazon", Asked(told={"item": "sku"}), "log.jsonl: no column 'sku'; there are user_id, "),
        ("amazon", Asked(), "log.jsonl: no column is called like a time; there are user_id, "),
        ("amazon", Asked(told={"label": "x", "time": "when"}), "--map label=…: this format has no such role"),
        ("retailrocket", Asked(like_from=4), "--like-from: RetailRocket has no ratings"),
        ("movielens", Asked(told={"item": "x"}), "--map: MovieLens' columns are known"),
    ],
)
def test_what_a_format_cannot_take_is_named(tmp_path: Path, form: str, asked: Asked, message: str) -> None:
    line = json.dumps({"user_id": "u", "asin": "i", "overall": 5, "when": 1_433_221_332, "title": "t"})
    source = write(tmp_path / "log", {"log.jsonl": f"{line}\n" * 3})
    with pytest.raises(InvalidInput) as caught:
        import_shop(form, source, tmp_path / "shop", asked=asked)
    assert message in str(caught.value)
    assert not (tmp_path / "shop").exists()
