"""Reads two kinds of public logs as they are unpacked: RetailRocket's events, Amazon's reviews."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builders.shop.columns.categories import texts_from_column
from builders.shop.columns.column import Column
from builders.shop.columns.numbers import numbers_from_column
from builders.shop.columns.times import times_from_column
from builders.shop.imported import Asked, Imported
from builders.shop.tables import first_columns, read_table, table_files
from ensemble.errors import InvalidInput

_PROPERTIES = "item_properties_part*.csv"


def read_retailrocket(source: Path, asked: Asked) -> Imported:
    """Reads events.csv (timestamp, visitorid, event, itemid), the newest category of each item, and its
    parent."""
    if asked.like_from is not None:
        raise InvalidInput("--like-from: RetailRocket has no ratings", "leave it out")
    folder, file = _place(source, "events.csv")
    out = _log(folder, file, asked, ("user", "item", "time", "event"))
    named = set(out.interactions["event"].unique().drop_null().to_pylist())
    shown = "view" if "view" in named else None
    labels = [
        (name, event) for name, event in (("cart", "addtocart"), ("buy", "transaction")) if event in named
    ]
    if shown is None or not labels:
        raise InvalidInput(
            f"{folder / file}: events are {', '.join(map(repr, sorted(named)[:8]))}; RetailRocket's are "
            "view, addtocart and transaction",
            "peregrine shop init reads any log",
        )
    out.tasks = [{"name": name, "kind": "binary", "label": {"event": event}} for name, event in labels]
    out.history = [shown, *(event for _, event in labels)]
    out.keys = {"event": "event", "impression": shown}
    out.items, out.item_features = _properties(folder, out)
    return out


def _properties(folder: Path, out: Imported) -> tuple[pa.Table | None, list[dict[str, object]]]:
    """Reads the newest category of each item, with its parent; items of the log alone have none."""
    parts = sorted(folder.glob(_PROPERTIES))
    if not parts:
        return None, []
    found = []
    for part in parts:
        columns = read_table(folder, part.name, ["timestamp", "itemid", "property", "value"])
        at = np.nan_to_num(numbers_from_column(columns.pop("timestamp")), nan=-np.inf)  # undated: the oldest
        table = pa.table({"at": at} | {name: texts_from_column(column) for name, column in columns.items()})
        found.append(table.filter(pc.equal(table["property"], "categoryid")))
    rows = pa.concat_tables(found).sort_by("at")
    category = dict(zip(rows["itemid"].to_pylist(), rows["value"].to_pylist(), strict=True))  # the last stays
    tree = folder / "category_tree.csv"
    parent: dict[str, str] = {}
    if tree.is_file():
        pair = read_table(folder, tree.name, ["categoryid", "parentid"])
        parent = dict(zip(*(texts_from_column(pair[name]).to_pylist() for name in pair), strict=True))
    ids = sorted({*out.interactions["item_id"].to_pylist(), *category} - {None})
    kinds = [category.get(one) for one in ids]
    columns = {"item_id": pa.array(ids), "category": pa.array(kinds, pa.string())}
    columns["parent"] = pa.array([parent.get(kind) if kind else None for kind in kinds], pa.string())
    out.mapping.append((_PROPERTIES, "categoryid", "items' category, the newest of each item"))
    return pa.table(columns), [{"name": name, "kind": "category"} for name in ("category", "parent")]


def read_amazon(source: Path, asked: Asked) -> Imported:
    """Reads a file of reviews (2014's or 2023's names of columns), and meta_NAME beside it for titles, prices
    and categories."""
    folder, file, meta = _reviews(source, asked)
    there = set(first_columns(folder, meta)) if meta else set()
    if "item" not in asked.told and "parent_asin" in there:
        asked = Asked(asked.name, {**asked.told, "item": "parent_asin"}, asked.like_from)
    out = _log(folder, file, asked, ("user", "item", "time", "rating"))
    liked = asked.liked
    ratings = out.interactions["rating"].drop_null().to_numpy()
    if not len(ratings):
        raise InvalidInput(f"{file}: column {out.mapping[-1][1]!r}: no row has a rating")
    share = float(np.mean(ratings >= liked))
    out.mapping[-1] = (*out.mapping[-1][:2], f"rating; {liked:g} and more is liked, {share:.0%} of the rows")
    label = {"column": "rating", "threshold": liked}
    out.tasks = [{"name": "like", "kind": "binary", "label": label}]
    if meta:
        _add_products(folder, meta, asked, out)
    return out


def _reviews(source: Path, asked: Asked) -> tuple[Path, str, str | None]:
    """Finds the file of reviews, and that of products."""
    folder = source if source.is_dir() else source.parent
    files = [path.name for path in sorted(table_files(folder)) if path.parent == folder]
    reviews = [name for name in files if not name.lower().startswith("meta")]
    if source.is_file():
        reviews = [source.name]
    elif asked.name is not None:
        reviews = [name for name in reviews if name.partition(".")[0] == asked.name]
    if len(reviews) != 1:
        raise InvalidInput(
            f"{source}: {len(reviews)} files may hold the reviews; there are {', '.join(files) or 'none'}",
            "give the file itself, or --name",
        )
    stem = reviews[0].partition(".")[0].lower()
    wanted = (f"meta_{stem}", f"meta_{stem.removeprefix('reviews_')}", "meta")
    meta = next((name for name in files if name.partition(".")[0].lower() in wanted), None)
    return folder, reviews[0], meta


def _add_products(folder: Path, meta: str, asked: Asked, out: Imported) -> None:
    """Adds what a file of products says: title, category, store, price."""
    there = first_columns(folder, meta)
    key = asked.column("item", meta, there)
    assert key is not None
    known = {"title": "title", "category": "main_category", "store": "store", "price": "price"}
    known = {name: column for name, column in known.items() if column in there}
    columns = read_table(folder, meta, [key, *known.values()])
    table = pa.table({"item_id": texts_from_column(columns[key])})
    for name, column in known.items():
        cells = columns[column]
        table = table.append_column(name, _numbers(cells) if name == "price" else texts_from_column(cells))
        kind = {"title": "text", "price": "number"}.get(name, "category")
        feature = {"name": "words", "column": name} if name == "title" else {"name": name}
        out.item_features.append({**feature, "kind": kind})
        out.mapping.append((meta, column, f"items' {name}"))
    first = np.unique(np.array(table["item_id"].to_pylist(), object).astype(str), return_index=True)[1]
    table = table.take(np.sort(first))
    absent = set(out.interactions["item_id"].to_pylist()) - {*table["item_id"].to_pylist(), None}
    more = pa.table({"item_id": pa.array(sorted(absent), table["item_id"].type)})
    out.items = pa.concat_tables([table, more], promote_options="default")


def _place(source: Path, file: str) -> tuple[Path, str]:
    """Gives the folder and the file of a log."""
    if source.is_file():
        return source.parent, source.name
    if not (source / file).is_file():
        raise InvalidInput(f"{source / file} is missing", "SRC is the unpacked folder, or the file itself")
    return source, file


def _log(folder: Path, file: str, asked: Asked, roles: tuple[str, ...]) -> Imported:
    """Reads a log's columns by their roles, and says which they were."""
    there = first_columns(folder, file)
    column_of = {role: asked.column(role, file, there) for role in roles}
    names = {role: name for role, name in column_of.items() if name is not None}
    for role in asked.told.keys() - names.keys():
        raise InvalidInput(f"--map {role}=…: this format has no such role; it has {', '.join(roles)}")
    columns = read_table(folder, file, list(dict.fromkeys(names.values())), times=(names["time"],))
    table = {
        "user_id": texts_from_column(columns[names["user"]]),
        "item_id": texts_from_column(columns[names["item"]]),
        "time": pa.array(times_from_column(columns[names["time"]], float("inf"))),
    }
    if "event" in names:
        table["event"] = texts_from_column(columns[names["event"]])
    if "rating" in names:
        table["rating"] = _numbers(columns[names["rating"]])
    mapping = [(file, name, role) for role, name in names.items()]
    name = asked.name or file.partition(".")[0].removeprefix("reviews_")
    name = folder.resolve().name if name == "events" else name
    return Imported(name, pa.table(table), "time", [], mapping=mapping)


def _numbers(column: Column) -> pa.Array:
    return pa.array(numbers_from_column(column), from_pandas=True)
