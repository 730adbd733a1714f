"""Turns known data formats into a shop's folder: each reader gives tables and the shop.toml for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from builders.folders import new_folder
from builders.shop.imported import Asked, Imported
from builders.shop.log_formats import read_amazon, read_retailrocket
from builders.shop.plain_files import delimited, numbers_of, only_file, text_of
from builders.shop.shop_toml import SHOP_FILE
from ensemble.errors import InvalidInput

MAX_ATTRIBUTES = 32  # values kept per item of a multi-valued column


def import_shop(
    form: str, source: Path, out: Path, *, asked: Asked | None = None, force: bool = False
) -> list[tuple[str, str, str]]:
    """Reads `source` as `form` (a key of FORMATS) and writes a shop to `out`; gives what each column was
    taken for."""
    if form not in FORMATS:
        raise InvalidInput(f"--format {form!r} is unknown; use {', '.join(FORMATS)}")
    if not source.exists():
        raise InvalidInput(f"{source} is missing; SRC is a file or folder to import")
    from builders.shop.read import read_shop

    imported = FORMATS[form](source, asked or Asked())
    with new_folder(out, force=force) as folder:
        _write(folder, imported)
        read_shop(folder)  # what we write, a build must be able to read
    return imported.mapping


def _write(folder: Path, imported: Imported) -> None:
    pq.write_table(imported.interactions, folder / "interactions.parquet")
    split: Any = imported.split
    if imported.held_out:
        split = {"kind": "files"} | {f"{part}_file": f"{part}.parquet" for part in imported.held_out}
    for part, table in imported.held_out.items():
        pq.write_table(table, folder / f"{part}.parquet")
    lines = [f"name = {json.dumps(imported.name)}", *_toml_lines({"split": split}), ""]
    lines += [
        "[interactions]",
        'file = "interactions.parquet"',
        'user = "user_id"',
        'item = "item_id"',
        'time = "time"',
        f"history = {json.dumps(imported.history)}",
        *_toml_lines(imported.keys),
        "",
    ]
    for what, table, features in (
        ("items", imported.items, imported.item_features),
        ("users", imported.users, imported.user_features),
    ):
        if table is None:
            continue
        pq.write_table(table, folder / f"{what}.parquet")
        lines += [f"[{what}]", f'file = "{what}.parquet"', f'id = "{what[:-1]}_id"']
        lines += ['title = "title"'] if what == "items" and "title" in table.column_names else []
        for feature in features:
            lines += ["", f"[[{what}.features]]", *_toml_lines(feature)]
        lines.append("")
    for task in imported.tasks:
        lines += ["[[tasks]]", *_toml_lines(task), ""]
    (folder / SHOP_FILE).write_text("\n".join(lines), "utf-8")


def _toml_lines(entry: dict[str, Any]) -> list[str]:
    def value(v: Any) -> str:
        return (
            "{" + ", ".join(f"{k} = {value(x)}" for k, x in v.items()) + "}"
            if isinstance(v, dict)
            else json.dumps(v)
        )

    return [f"{key} = {value(v)}" for key, v in entry.items()]


def _read_sequences(source: Path, asked: Asked) -> Imported:
    """Reads lines of 'user item item …', oldest item first."""
    asked.refuse("sequences", "lines of 'user item item …' have no columns and no ratings")
    path = _sequence_file(source, asked.name)
    lines = [line.split() for line in text_of(path, "utf-8").splitlines()]
    lines = [line for line in lines if line]
    short = next((number for number, line in enumerate(lines, 1) if len(line) < 2), 0)
    if not lines or short:
        raise InvalidInput(
            f"{path}: line {short or 1}: wanted 'user item item …', one line per user, oldest item first"
        )
    lengths = np.array([len(line) - 1 for line in lines])
    items = [item for line in lines for item in line[1:]]
    position = np.arange(1, len(items) + 1) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    users = pa.array([line[0] for line in lines]).take(pa.array(np.repeat(np.arange(len(lines)), lengths)))
    interactions = pa.table({"user_id": users, "item_id": pa.array(items), "time": pa.array(position)})
    table, features = _sequence_items(path, set(items))
    return Imported(
        path.stem, interactions, "leave_one_out", [{"name": "interact", "kind": "binary"}], table, features
    )


def _sequence_file(source: Path, name: str | None) -> Path:
    if source.is_file():
        return source
    found = sorted(p for p in source.glob("*.txt") if not p.stem.lower().endswith("sample"))
    if name is not None:
        found = [p for p in found if p.stem == name]
    if len(found) != 1:
        there = ", ".join(sorted(p.stem for p in source.glob("*.txt"))) or "no .txt file"
        raise InvalidInput(
            f"{source}: pick one file of 'user item item …' lines with "
            f"--name{f', not {name!r}' if name else ''}; there are: {there}"
        )
    return found[0]


def _sequence_items(path: Path, seen: set[str]) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Reads titles and attributes that lie beside (NAME_items.tsv, NAME_item2attributes.json)."""
    titles_file, attributes_file = (
        path.with_name(f"{path.stem}_items.tsv"),
        path.with_name(f"{path.stem}_item2attributes.json"),
    )
    titles: dict[str, str] = {}
    if titles_file.is_file():
        rows = [line.split("\t") for line in text_of(titles_file, "utf-8").splitlines()]
        if "item_id" not in rows[0] or "title" not in rows[0]:
            raise InvalidInput(
                f"{titles_file}: its first line must name item_id and title, tab-separated; it is {rows[0]}"
            )
        at, title = rows[0].index("item_id"), rows[0].index("title")
        titles = {row[at]: row[title] for row in rows[1:] if len(row) > max(at, title)}
    attributes: dict[str, list[Any]] = {}
    if attributes_file.is_file():
        attributes = json.loads(text_of(attributes_file, "utf-8"))
    ids = sorted(seen | titles.keys() | attributes.keys(), key=lambda i: (len(i), i))
    columns = {"item_id": pa.array(ids)}
    features: list[dict[str, Any]] = []
    if titles:
        columns["title"] = pa.array([titles.get(i) for i in ids])
        features.append({"name": "words", "kind": "text", "column": "title"})
    if attributes:
        values = [[str(v) for v in dict.fromkeys(attributes.get(i, []))] for i in ids]
        columns["attributes"] = pa.array(values, pa.list_(pa.string()))
        features.insert(
            0, {"name": "attributes", "kind": "category", "width": min(MAX_ATTRIBUTES, max(map(len, values)))}
        )
    return pa.table(columns), features


# --- RecBole's atomic files: tab-separated, the header gives name:type ---


def _read_recbole(source: Path, asked: Asked) -> Imported:
    inter, parts = _inter_files(source, asked.name)
    columns = _atomic(inter)
    user, item = _atomic_ids(inter, columns, asked)
    time = asked.told.get("time") or next(
        (c for c, (kind, _) in columns.items() if kind == "float" and "time" in c), None
    )
    rating = asked.told.get("rating", "rating")
    for role, name in asked.told.items():
        if role not in ("user", "item", "time", "rating") or name not in columns:
            raise InvalidInput(
                f"--map {role}={name}: roles are user, item, time, rating; columns {', '.join(columns)}"
            )
    names = {"user": user, "item": item, "time": time}
    tasks: list[dict[str, Any]] = [{"name": "interact", "kind": "binary"}]
    history, label = "all", None
    for column, threshold in (("label", None), (rating, asked.liked)):
        if column in columns:
            label = column
            of: dict[str, Any] = {"column": column} | ({"threshold": threshold} if threshold else {})
            tasks = [{"name": "like", "kind": "binary", "label": of}]
            history = "all" if threshold else "like"  # what was rated badly was taken all the same
            names["label" if threshold is None else f"rating; {threshold:g} and more is liked"] = column
            break
    table = _inter_table(inter, columns, user, item, time, label)
    stem = inter.name.removesuffix(".inter").removesuffix(".train")
    out = Imported(stem, table, "time" if time else "leave_one_out", tasks, history=history)
    out.mapping = [(inter.name, name, role) for role, name in names.items() if name is not None]
    for part, path in parts.items():
        out.held_out[part] = _inter_table(path, _atomic(path), user, item, time, label)
        out.mapping.append((path.name, "all rows", part))
    for entity in ("item", "user"):
        if (path := inter.with_name(f"{stem}.{entity}")).is_file():
            found, features = _atomic_entities(path, f"{entity}_id")
            setattr(out, f"{entity}s", found)
            setattr(out, f"{entity}_features", features)
    return out


def _inter_files(source: Path, name: str | None) -> tuple[Path, dict[str, Path]]:
    """Finds the interactions, and the files of a split that is given (NAME.train.inter, .valid., .test.)."""
    if source.suffix == ".inter" and not source.name.endswith(".train.inter"):
        return source, {}
    trains = [source] if source.is_file() else sorted(source.glob(f"{name or '*'}.train.inter"))
    if len(trains) != 1:
        return only_file(source, f"{name or '*'}.inter"), {}
    stem = trains[0].name.removesuffix(".train.inter")
    named = {"validation": f"{stem}.valid.inter", "test": f"{stem}.test.inter"}
    parts = {part: trains[0].with_name(file) for part, file in named.items()}
    parts = {part: path for part, path in parts.items() if path.is_file()}
    if "test" not in parts:
        raise InvalidInput(f"{trains[0]}: {named['test']} is missing beside it; a split needs a test file")
    return trains[0], parts


def _inter_table(
    path: Path,
    columns: dict[str, tuple[str, pa.ChunkedArray]],
    user: str,
    item: str,
    time: str | None,
    label: str | None,
) -> pa.Table:
    """Gives the rows of a file of interactions; without times, their places in the file stand for them."""
    for name in filter(None, (user, item, time, label)):
        if name not in columns:
            raise InvalidInput(f"{path}: no column {name!r}; there are {', '.join(columns)}")
    table = {"user_id": columns[user][1], "item_id": columns[item][1]}
    position = pa.chunked_array([np.arange(1, len(table["user_id"]) + 1)])
    table["time"] = numbers_of(path, time, columns[time][1]) if time else position
    if label:
        table[label] = numbers_of(path, label, columns[label][1])
    return pa.table(table)


def _atomic(path: Path) -> dict[str, tuple[str, pa.ChunkedArray]]:
    """Reads an atomic file: column -> (token | token_seq | float | float_seq, its cells as text)."""
    table = delimited(path.read_bytes(), path)
    columns = {}
    for header in table.column_names:
        column, _, kind = header.partition(":")
        if kind not in ("token", "token_seq", "float", "float_seq"):
            raise InvalidInput(
                f"{path}: header {header!r} is not name:type with type token, token_seq, float or float_seq"
            )
        columns[column] = (kind, table.column(header))
    return columns


def _atomic_ids(path: Path, columns: dict[str, tuple[str, pa.ChunkedArray]], asked: Asked) -> tuple[str, str]:
    tokens = [c for c, (kind, _) in columns.items() if kind == "token"]
    user = asked.told.get("user") or next((c for c in tokens if c.startswith("user")), None)
    item = asked.told.get("item") or next((c for c in tokens if c.startswith("item")), None)
    if user is None or item is None:
        raise InvalidInput(f"{path}: no token columns user_id and item_id; there are {', '.join(columns)}")
    return user, item


def _atomic_entities(path: Path, id_name: str) -> tuple[pa.Table, list[dict[str, Any]]]:
    columns = _atomic(path)
    id_column = next((c for c in columns if c == id_name), next(iter(columns)))
    table = {id_name: columns.pop(id_column)[1]}
    features: list[dict[str, Any]] = []
    for column, (kind, cells) in columns.items():
        name = re.sub(r"\W", "_", column)
        if (
            id_name == "item_id"
            and "title" not in table
            and ("title" in column or column in ("name", "item_name"))
        ):
            table["title"] = cells
            features.append({"name": "words", "kind": "text", "column": "title"})
        elif kind == "float":
            table[name] = numbers_of(path, column, cells)
            features.append({"name": name, "kind": "number"})
        elif kind in ("token", "token_seq"):
            table[name] = cells
            features.append(
                {"name": name, "kind": "category"} | ({"separator": " "} if kind == "token_seq" else {})
            )
        elif (dim := len((cells[0].as_py() or "").split())) > 0:
            table[name] = cells
            features.append({"name": name, "kind": f"vector({dim})", "separator": " "})
    return pa.table(table), features


# --- MovieLens: 100k (u.data), 1m (ratings.dat), 20m and latest (ratings.csv) ---


def _read_movielens(source: Path, asked: Asked) -> Imported:
    if asked.told:
        raise InvalidInput("--map: MovieLens' columns are known", "leave it out for --format movielens")
    if (source / "u.data").is_file():
        ratings = delimited(
            (source / "u.data").read_bytes(),
            source / "u.data",
            names=["user_id", "item_id", "rating", "time"],
        )
        items = _movies_100k(source / "u.item")
        users = _people(source / "u.user", b"|", ["user_id", "age", "gender", "occupation", "zip"])
    elif (source / "ratings.dat").is_file():
        ratings = _double_colon(source / "ratings.dat", ["user_id", "item_id", "rating", "time"])
        items = _double_colon(source / "movies.dat", ["item_id", "title", "genres"])
        users = _people(source / "users.dat", b"::", ["user_id", "gender", "age", "occupation", "zip"])
    elif (source / "ratings.csv").is_file():
        ratings = delimited(
            (source / "ratings.csv").read_bytes(), source / "ratings.csv", delimiter=","
        ).rename_columns(["user_id", "item_id", "rating", "time"])
        items = delimited(
            (source / "movies.csv").read_bytes(), source / "movies.csv", delimiter=","
        ).rename_columns(["item_id", "title", "genres"])
        users = None
    else:
        raise InvalidInput(
            f"{source}: no u.data, ratings.dat or ratings.csv; SRC is the unpacked MovieLens folder"
        )
    table = {c: ratings.column(c) for c in ("user_id", "item_id")} | {
        c: numbers_of(source, c, ratings.column(c)) for c in ("time", "rating")
    }
    tasks = [{"name": "like", "kind": "binary", "label": {"column": "rating", "threshold": asked.liked}}]
    item_features = [
        {"name": "genres", "kind": "category", "separator": "|"},
        {"name": "words", "kind": "text", "column": "title"},
    ]
    user_features = [{"name": c, "kind": "category"} for c in ("gender", "age", "occupation")]
    return Imported(
        asked.name or source.resolve().name,
        pa.table(table),
        "time",
        tasks,
        items,
        item_features,
        users,
        user_features if users else [],
        mapping=[("ratings", "rating", f"rating; {asked.liked:g} and more is liked")],
    )


def _movies_100k(path: Path) -> pa.Table:
    """Reads u.item: id|title|release|video|url|19 flags, whose names stand in u.genre."""
    genre_file = path.with_name("u.genre")
    genres = (
        [line.split("|")[0] for line in text_of(genre_file, "latin-1").splitlines() if line.strip()]
        if genre_file.is_file()
        else [f"genre{g}" for g in range(19)]
    )
    rows = [line.split("|") for line in text_of(path, "latin-1").splitlines() if line]
    kinds = ["|".join(g for g, flag in zip(genres, row[5:], strict=False) if flag == "1") for row in rows]
    return pa.table({"item_id": [row[0] for row in rows], "title": [row[1] for row in rows], "genres": kinds})


def _people(path: Path, separator: bytes, names: list[str]) -> pa.Table | None:
    return (
        delimited(path.read_bytes().replace(separator, b"\t"), path, names=names).drop_columns(["zip"])
        if path.is_file()
        else None
    )


def _double_colon(path: Path, names: list[str]) -> pa.Table:
    if not path.is_file():
        raise InvalidInput(f"{path} is missing; it belongs to this MovieLens set")
    return delimited(path.read_bytes().decode("latin-1").encode().replace(b"::", b"\t"), path, names=names)


FORMATS = {
    "sequences": _read_sequences,
    "recbole": _read_recbole,
    "movielens": _read_movielens,
    "retailrocket": read_retailrocket,
    "amazon": read_amazon,
}
