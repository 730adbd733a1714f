"""Turns known data formats into a shop's folder: each reader gives tables and the shop.toml for them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from builders.folders import new_folder
from builders.shop.shop_toml import SHOP_FILE
from ensemble.errors import InvalidInput

MAX_ATTRIBUTES = 32  # values kept per item of a multi-valued column
LIKED = 4  # a rating that means "liked", on the usual scale to 5


@dataclass
class Imported:
    """Holds a shop that is not yet written; `features` are entries of shop.toml."""

    name: str
    interactions: pa.Table  # columns user_id, item_id, time, …
    split: str
    tasks: list[dict[str, Any]]
    items: pa.Table | None = None  # column item_id, and title where there is one
    item_features: list[dict[str, Any]] = field(default_factory=list)
    users: pa.Table | None = None
    user_features: list[dict[str, Any]] = field(default_factory=list)
    history: str = "all"


def import_shop(form: str, source: Path, out: Path, *, name: str | None = None, force: bool = False) -> None:
    """Reads `source` as `form` (a key of FORMATS) and writes a shop to `out`."""
    if form not in FORMATS:
        raise InvalidInput(f"--format {form!r} is unknown; use {', '.join(FORMATS)}")
    if not source.exists():
        raise InvalidInput(f"{source} is missing; SRC is a file or folder to import")
    from builders.shop.read import read_shop

    imported = FORMATS[form](source, name)
    with new_folder(out, force=force) as folder:
        _write(folder, imported)
        read_shop(folder)  # what we write, a build must be able to read


def _write(folder: Path, imported: Imported) -> None:
    pq.write_table(imported.interactions, folder / "interactions.parquet")
    lines = [f"name = {json.dumps(imported.name)}", f"split = {json.dumps(imported.split)}", ""]
    lines += [
        "[interactions]",
        'file = "interactions.parquet"',
        'user = "user_id"',
        'item = "item_id"',
        'time = "time"',
        f"history = {json.dumps(imported.history)}",
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


def _read_sequences(source: Path, name: str | None) -> Imported:
    """Reads lines of 'user item item …', oldest item first."""
    path = _sequence_file(source, name)
    lines = [line.split() for line in _text(path, "utf-8").splitlines()]
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
        rows = [line.split("\t") for line in _text(titles_file, "utf-8").splitlines()]
        if "item_id" not in rows[0] or "title" not in rows[0]:
            raise InvalidInput(
                f"{titles_file}: its first line must name item_id and title, tab-separated; it is {rows[0]}"
            )
        at, title = rows[0].index("item_id"), rows[0].index("title")
        titles = {row[at]: row[title] for row in rows[1:] if len(row) > max(at, title)}
    attributes: dict[str, list[Any]] = {}
    if attributes_file.is_file():
        attributes = json.loads(_text(attributes_file, "utf-8"))
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


def _read_recbole(source: Path, name: str | None) -> Imported:
    inter = source if source.suffix == ".inter" else _only(source, f"{name or '*'}.inter")
    columns = _atomic(inter)
    user, item = _atomic_ids(inter, columns)
    time = next((c for c, (kind, _) in columns.items() if kind == "float" and "time" in c), None)
    table = {"user_id": columns[user][1], "item_id": columns[item][1]}
    position = pa.chunked_array([np.arange(1, len(table["user_id"]) + 1)])
    table["time"] = _numbers(inter, time, columns[time][1]) if time else position
    tasks: list[dict[str, Any]] = [{"name": "interact", "kind": "binary"}]
    history = "all"
    for column, threshold in (("label", None), ("rating", LIKED)):
        if column in columns:
            table[column] = _numbers(inter, column, columns[column][1])
            label: dict[str, Any] = {"column": column} | ({"threshold": threshold} if threshold else {})
            tasks, history = [{"name": "like", "kind": "binary", "label": label}], "like"
            break
    out = Imported(inter.stem, pa.table(table), "time" if time else "leave_one_out", tasks, history=history)
    if inter.with_suffix(".item").is_file():
        out.items, out.item_features = _atomic_entities(inter.with_suffix(".item"), "item_id")
    if inter.with_suffix(".user").is_file():
        out.users, out.user_features = _atomic_entities(inter.with_suffix(".user"), "user_id")
    return out


def _atomic(path: Path) -> dict[str, tuple[str, pa.ChunkedArray]]:
    """Reads an atomic file: column -> (token | token_seq | float | float_seq, its cells as text)."""
    table = _delimited(path.read_bytes(), path)
    columns = {}
    for header in table.column_names:
        column, _, kind = header.partition(":")
        if kind not in ("token", "token_seq", "float", "float_seq"):
            raise InvalidInput(
                f"{path}: header {header!r} is not name:type with type token, token_seq, float or float_seq"
            )
        columns[column] = (kind, table.column(header))
    return columns


def _atomic_ids(path: Path, columns: dict[str, tuple[str, pa.ChunkedArray]]) -> tuple[str, str]:
    tokens = [c for c, (kind, _) in columns.items() if kind == "token"]
    user = next((c for c in tokens if c.startswith("user")), None)
    item = next((c for c in tokens if c.startswith("item")), None)
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
            table[name] = _numbers(path, column, cells)
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


def _read_movielens(source: Path, name: str | None) -> Imported:
    if (source / "u.data").is_file():
        ratings = _delimited(
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
        ratings = _delimited(
            (source / "ratings.csv").read_bytes(), source / "ratings.csv", delimiter=","
        ).rename_columns(["user_id", "item_id", "rating", "time"])
        items = _delimited(
            (source / "movies.csv").read_bytes(), source / "movies.csv", delimiter=","
        ).rename_columns(["item_id", "title", "genres"])
        users = None
    else:
        raise InvalidInput(
            f"{source}: no u.data, ratings.dat or ratings.csv; SRC is the unpacked MovieLens folder"
        )
    table = {c: ratings.column(c) for c in ("user_id", "item_id")} | {
        c: _numbers(source, c, ratings.column(c)) for c in ("time", "rating")
    }
    tasks = [{"name": "like", "kind": "binary", "label": {"column": "rating", "threshold": LIKED}}]
    item_features = [
        {"name": "genres", "kind": "category", "separator": "|"},
        {"name": "words", "kind": "text", "column": "title"},
    ]
    user_features = [{"name": c, "kind": "category"} for c in ("gender", "age", "occupation")]
    return Imported(
        name or source.resolve().name,
        pa.table(table),
        "time",
        tasks,
        items,
        item_features,
        users,
        user_features if users else [],
        "like",
    )


def _movies_100k(path: Path) -> pa.Table:
    """Reads u.item: id|title|release|video|url|19 flags, whose names stand in u.genre."""
    genre_file = path.with_name("u.genre")
    genres = (
        [line.split("|")[0] for line in _text(genre_file, "latin-1").splitlines() if line.strip()]
        if genre_file.is_file()
        else [f"genre{g}" for g in range(19)]
    )
    rows = [line.split("|") for line in _text(path, "latin-1").splitlines() if line]
    kinds = ["|".join(g for g, flag in zip(genres, row[5:], strict=False) if flag == "1") for row in rows]
    return pa.table({"item_id": [row[0] for row in rows], "title": [row[1] for row in rows], "genres": kinds})


def _people(path: Path, separator: bytes, names: list[str]) -> pa.Table | None:
    return (
        _delimited(path.read_bytes().replace(separator, b"\t"), path, names=names).drop_columns(["zip"])
        if path.is_file()
        else None
    )


def _double_colon(path: Path, names: list[str]) -> pa.Table:
    if not path.is_file():
        raise InvalidInput(f"{path} is missing; it belongs to this MovieLens set")
    return _delimited(path.read_bytes().decode("latin-1").encode().replace(b"::", b"\t"), path, names=names)


def _delimited(data: bytes, path: Path, *, names: list[str] | None = None, delimiter: str = "\t") -> pa.Table:
    """Reads a delimited file's cells, all as text; quotes count only between commas."""
    from pyarrow import csv

    if not data.strip():
        raise InvalidInput(f"{path} is empty")
    parse = csv.ParseOptions(delimiter=delimiter, quote_char='"' if delimiter == "," else False)
    first = data.split(b"\n", 1)[0].decode(errors="replace").strip().lstrip("\ufeff").split(delimiter)
    convert = csv.ConvertOptions(
        column_types={c: pa.string() for c in names or first}, strings_can_be_null=True, null_values=[""]
    )
    try:
        return csv.read_csv(pa.BufferReader(data), csv.ReadOptions(column_names=names), parse, convert)
    except pa.ArrowInvalid as error:
        raise InvalidInput(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _numbers(path: Path, name: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    from builders.shop.columns.column import Column
    from builders.shop.columns.numbers import numbers_from_column

    return pa.chunked_array(
        [
            pa.array(
                numbers_from_column(Column(path.name, name, cells.cast(pa.large_string()))), from_pandas=True
            )
        ]
    )


def _text(path: Path, encoding: str) -> str:
    if not path.is_file():
        raise InvalidInput(f"{path} is missing")
    try:
        return path.read_text(encoding)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not {encoding} (byte {error.start})") from None


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise InvalidInput(f"{folder}: {len(found)} files match {pattern}; give the file itself or --name")
    return found[0]


FORMATS = {"sequences": _read_sequences, "recbole": _read_recbole, "movielens": _read_movielens}
