"""Measures what titles and pictures tell, encoded as a build encodes them.

    python -m builders.bench.titles_and_pictures DATA_DIR --out DIR [--only types,cold] [--epochs 3]

  - **types**: the article type of each product of DATA_DIR/mm_fashion_small that has at least 20 of its kind,
    by logistic regression on frozen vectors and on the components that an item's row holds, beside TF-IDF of
    the titles; also with every word of a type's name masked in the titles. A fifth of the products tests.
  - **cold**: Beauty (DATA_DIR/seq_s3rec) without the items whose number ends in 0, which nobody then took:
    how often one that somebody takes is among the first 20 of these (recall@20), by the trained encoders, by
    the frozen components alone and by TF-IDF of the titles.

DIR keeps the encoders, the pictures and, of `cold`, the shop with its stages data, encoders and index.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from builders.bench.cold_items import build
from builders.content.cache import KeptEncoder, keep_encoder
from builders.content.sources import EFFICIENTNET, MINILM, find_source
from builders.data.dataset import Dataset, history_windows, open_dataset
from builders.index.stage import open_recall
from builders.shop.imported import Asked
from builders.shop.importers import import_shop
from builders.shop.shop_toml import SHOP_FILE, FeatureColumn
from ensemble.arrays import Array
from ensemble.content.encoder import ContentEncoder
from ensemble.content.projection import fitted_projection
from ensemble.contract import TEXT
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.json_text import json_text

PLACES, _COMPONENTS, _FEWEST = 20, 128, 20
_AT_ONCE = 1024
# how little each kind of vector is regularized (scikit-learn's C); one value was tried each
STRENGTHS = {"picture": 0.003, "title": 0.03, "row": 0.1, "tf-idf": 10.0}


def encoder_of(kind: str, name: str, cache: Path) -> ContentEncoder:
    """Opens a pretrained encoder as a build does, on one thread."""
    return kept_encoder(kind, name, cache).open(1)


def kept_encoder(kind: str, name: str, cache: Path) -> KeptEncoder:
    """Exports a pretrained encoder into `cache`, once."""
    feature = FeatureColumn(name="content", kind=kind, encoder=name)
    return keep_encoder(find_source(feature, cache), cache)


def kept_vectors(kept: KeptEncoder, inputs: Sequence[bytes]) -> tuple[list[bytes], Array]:
    """Encodes texts in UTF-8, or pictures' files, each once for all runs: the distinct ones [n] that have a
    vector, and the vectors [n, V] float32."""
    distinct = sorted(set(inputs))
    keys = [hashlib.sha256(one).hexdigest() for one in distinct]

    def read(places: list[int]) -> Any:
        of = [distinct[at] for at in places]
        return [one.decode() for one in of] if kept.facts.model == TEXT else of

    said = _told(kept.facts.source, len(distinct))
    vectors = kept.encoded(keys, read, 1, lambda done, total: said(done)).vectors
    there = vectors.any(axis=1)
    return [distinct[at] for at in np.flatnonzero(there)], vectors[there]


def masked(titles: Sequence[str], types: Sequence[str]) -> list[str]:
    """Takes every word of a type's name, in singular and plural, out of the titles."""
    words = {word for name in types for word in re.findall(r"\w+", name.lower())} - {"and", "of"}
    words |= {word.rstrip("s") for word in words} | {f"{word}s" for word in words}
    kept = (
        (word for word in title.split() if re.sub(r"\W", "", word.lower()) not in words) for title in titles
    )
    return [" ".join(of) for of in kept]


# --- types


def types_figures(source: Path, out: Path) -> dict[str, Any]:
    """Measures how well the type of a product is told: {vectors: {all, beauty}}, and milliseconds."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    rows = products_of(source)
    types = np.array([row["article_type"] for row in rows])
    beauty = np.array([row["master_category"] == "Personal Care" for row in rows])
    common = {
        name for name, count in zip(*np.unique(types, return_counts=True), strict=True) if count >= _FEWEST
    }
    known = np.isin(types, sorted(common))
    trains = np.zeros(len(rows), bool)
    trains[np.random.RandomState(0).permutation(len(rows))[: int(0.8 * len(rows))]] = True
    titles = [row["title"] for row in rows]
    without = masked(titles, sorted(set(types.tolist())))
    vectors, ms = _content_vectors(source, rows, [titles, without], out)

    def probe(values: Any, strength: float) -> dict[str, float]:
        return {
            name: accuracy(values, types, chosen & trains, chosen & ~trains, strength)
            for name, chosen in (("all", known), ("beauty", known & beauty))
        }

    def words(of: list[str]) -> Any:
        return TfidfVectorizer(sublinear_tf=True, min_df=2).fit_transform(of)

    c = STRENGTHS
    both = np.concatenate([scaled(vectors["masked"], trains), scaled(vectors["picture"], trains)], axis=1)
    return {
        "picture": probe(scaled(vectors["picture"], trains), c["picture"]),
        "picture, components of a row": probe(row_of(vectors["picture"]), c["row"]),
        "title": probe(scaled(vectors["title"], trains), c["title"]),
        "title, components of a row": probe(row_of(vectors["title"]), c["row"]),
        "title, TF-IDF": probe(words(titles), c["tf-idf"]),
        "masked title": probe(scaled(vectors["masked"], trains), c["title"]),
        "masked title, TF-IDF": probe(words(without), c["tf-idf"]),
        "masked title and picture": probe(both, c["picture"]),
        "milliseconds of CPU each": ms,
    }


def products_of(source: Path) -> list[dict[str, str]]:
    """Reads the products."""
    path = source / "mm_fashion_small" / "items.csv"
    if not path.is_file():
        raise InvalidInput(f"{path} is missing; DATA_DIR is the folder that holds {path.parent.name}")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pictures_of(source: Path, rows: list[dict[str, str]]) -> list[bytes]:
    """Reads the files of the products' pictures."""
    with zipfile.ZipFile(source / "mm_fashion_small" / "images.zip") as file:
        inside = {Path(name).name: name for name in file.namelist()}
        return [file.read(inside[f"{row['product_id']}.jpg"]) for row in rows]


def _content_vectors(
    source: Path, rows: list[dict[str, str]], texts: list[list[str]], out: Path
) -> tuple[dict[str, Array], dict[str, float]]:
    """Encodes pictures, titles and masked titles: vectors [n, V] of each, and milliseconds of CPU each."""
    pictures = pictures_of(source, rows)
    image, text = (encoder_of(*of, out / "encoded") for of in (("image", EFFICIENTNET), ("text", MINILM)))
    found, ms = {}, {}
    inputs: tuple[tuple[str, ContentEncoder, Any], ...] = (
        ("picture", image, pictures),
        ("title", text, texts[0]),
        ("masked", text, texts[1]),
    )
    for name, encoder, given in inputs:
        start = time.process_time()
        found[name] = encoder.encode(given, _told(name, len(given))).vectors
        ms[name] = round(1e3 * (time.process_time() - start) / len(given), 2)
    return found, ms


def _told(name: str, total: int) -> Callable[[int], None]:
    """Makes what prints how far an encoder is, a thousand inputs a line."""

    def told(done: int) -> None:
        if done % 1000 < 32 or done == total:
            print(f"{name}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return told


def scaled(vectors: Array, trains: Array) -> Array:
    """Standardizes vectors [n, V] by those that train."""
    return (vectors - vectors[trains].mean(axis=0)) / (vectors[trains].std(axis=0) + 1e-6)


def row_of(vectors: Array) -> Array:
    """Gives the components [n, P] that an item's row holds."""
    return fitted_projection(vectors, _COMPONENTS).values(vectors, np.ones(len(vectors), bool))[:, :-1]


def accuracy(values: Any, types: Array, trains: Array, tests: Array, strength: float) -> float:
    """Gives the share of `tests` [n] bool whose type a regression learned from `trains` tells."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=150).fit(values[trains], types[trains])
    return round(float((model.predict(values[tests]) == types[tests]).mean()), 4)


# --- cold items


def cold_figures(source: Path, out: Path, epochs: int, seed: int) -> dict[str, float]:
    """Measures recall@20 inside the items that nobody took: {way: figure}."""
    shop = out / "shop"
    if not shop.exists():
        _write_beauty(source / "seq_s3rec", shop)
    folders = build(shop, out, "base", epochs, seed)
    dataset = open_dataset(folders["data"])
    users, ends, wanted = cold_events(source / "seq_s3rec" / "Beauty.txt", dataset)
    pool = np.unique([row for row, item in enumerate(dataset.item_ids.tolist(), 1) if is_cold(int(item))])
    offline, embeddings = open_recall(folders, dataset)
    columns = next(of for of in dataset.schema.items.features if of.kind == "embedding").columns
    components = np.asarray(dataset.item_values[:, columns][:, :-1])
    length = np.linalg.norm(components, axis=1, keepdims=True)
    words, components = _words(dataset), components / np.maximum(length, 1e-9)

    def trained(past: Array, piece: slice) -> Array:
        queries = offline.encode_users(users[piece], ends[piece])
        return (queries @ embeddings[pool].T).max(axis=1)

    ways: dict[str, Callable[[Array, slice], Array]] = {
        "trained encoders": trained,
        "frozen components, mean of the past": lambda past, piece: (
            _summed(components, past) @ components[pool].T
        ),
        "TF-IDF, sum of the past": lambda past, piece: _summed(words, past) @ words[pool].T,
    }
    hits = dict.fromkeys(ways, 0)
    for start in range(0, len(users), _AT_ONCE):
        piece = slice(start, start + _AT_ONCE)
        past = history_windows(dataset.histories, users[piece], ends[piece], 50)
        for way, score in ways.items():
            hits[way] += _found(score(past, piece), np.searchsorted(pool, wanted[piece]))
    return {way: round(count / len(users), 4) for way, count in hits.items()} | {"events": len(users)}


def is_cold(number: int) -> bool:
    """Says whether the item of a number is one that nobody took."""
    return number % 10 == 0


def _write_beauty(source: Path, shop: Path) -> None:
    """Imports Beauty without what was taken of the cold items; their titles are encoded, not hashed."""
    import_shop("sequences", source, shop, asked=Asked("Beauty"))
    table = pq.read_table(shop / "interactions.parquet")
    kept = [not is_cold(int(item)) for item in table["item_id"].to_pylist()]
    pq.write_table(table.filter(pa.array(kept)), shop / "interactions.parquet")
    text = (shop / SHOP_FILE).read_text()
    named = re.sub(r'kind = "text"', f'kind = "text"\nencoder = "{MINILM}"', text)
    (shop / SHOP_FILE).write_text(named)


def cold_events(path: Path, dataset: Dataset) -> tuple[Array, Array, Array]:
    """Lists who took a cold item after something warm: user rows [E], the end of the past [E] in the
    dataset's histories, the item's row [E]; `path` has a line a user, its items in time order."""
    user_rows = {user.decode(): row for row, user in enumerate(dataset.user_ids.tolist(), 1)}
    item_rows = {int(item): row for row, item in enumerate(dataset.item_ids.tolist(), 1)}
    found = []
    for line in path.read_text().splitlines():
        user, *items = line.split()
        warm = 0
        for item in map(int, items):
            if not is_cold(item):
                warm += 1
            elif warm:
                begin = int(dataset.histories.offsets[user_rows[user]])
                found.append((user_rows[user], begin + warm, item_rows[item]))
    rows, ends, wanted = np.array(found, np.int64).reshape(-1, 3).T
    return rows, ends, wanted


def _words(dataset: Dataset) -> Array:
    """Gives TF-IDF of the titles [I + 1, words] float32."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    titles = [title.decode() for title in dataset.item_titles.tolist()]
    found = TfidfVectorizer(sublinear_tf=True, stop_words="english", min_df=2).fit_transform(titles)
    return np.asarray(found.toarray(), np.float32)


def _summed(vectors: Array, past: Array) -> Array:
    """Sums the vectors of pasts [E, H] of item rows, padded with -1: [E, V]."""
    out = np.zeros((len(past), vectors.shape[1]), np.float32)
    for column in past.T:  # one item of each past at a time: all of them would not fit
        out += vectors[np.maximum(column, 0)] * (column > 0)[:, None]
    return out


def _found(scores: Array, wanted: Array) -> int:
    """Counts the rows of scores [E, C] whose `wanted` column is among the first 20, ties half."""
    own = scores[np.arange(len(scores)), wanted][:, None]
    rank = (scores > own).sum(axis=1) + ((scores == own).sum(axis=1) - 1) / 2
    return int((rank < PLACES).sum())


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="DATA_DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="types,cold")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    figures: dict[str, Any] = {}
    try:
        for name in given.only.split(","):
            folder = given.out / name
            folder.mkdir(parents=True, exist_ok=True)
            if name == "types":
                figures[name] = types_figures(given.source, folder)
            elif name == "cold":
                figures[name] = cold_figures(given.source, folder, given.epochs, given.seed)
            else:
                raise InvalidInput(f"--only {name}: unknown; known: types, cold")
        print(json_text(figures, indent=1))
    except PeregrineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
