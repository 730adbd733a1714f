"""Measures what a typed query finds of products without a title, by their pictures: a table.

    python -m builders.bench.untold DATA_DIR --out DIR [--items 300] [--weights 0,1,2,3]

The catalogue is DATA_DIR/mm_fashion_small; the space that titles and pictures share is a build's own
(builders/search/shared_space.py), a fifth of the products, by a hash, out of its training. A share of all
products loses its titles, and queries are made of the titles of held-out ones, whether they have lost them or
not: the whole title, two words of it, one of them mistyped, the title without words of types. Told, for each
share and weight of what pictures show (0: they are not asked): NDCG@10 of the product itself by kind of
query, how often a hidden product's full title finds it among the first ten, how often any other's full title
finds it first, and milliseconds of CPU a query that asking pictures takes. Words weigh 90%, meaning the rest.
The reverse, too: photos of products without a picture, as a build asks them (builders/search/told.py).
--encoders FOLDER takes FOLDER/text and FOLDER/image, as `peregrine encoders tune` writes them. DIR keeps the
encoders and their vectors.

Axes: Q queries, I products.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from builders.bench.search import Catalogue, queries_about, ranks_of
from builders.bench.shared_space import vectors_of
from builders.bench.titles_and_pictures import encoder_of, pictures_of, products_of
from builders.content.sources import EFFICIENTNET, MINILM
from builders.metrics import ndcg
from builders.search.queries import FULL
from builders.search.shared_space import fitted_heads, is_judged
from builders.search.shown import hides
from builders.search.told import Photos, choose, places_of
from ensemble.arrays import Array
from ensemble.content.projection import fitted_projection
from ensemble.content.shared_space import Head
from ensemble.errors import PeregrineError
from ensemble.index.looks import query_rows
from ensemble.json_text import json_text
from ensemble.steps.search import beside
from ensemble.steps.search_settings import SearchSettings

_HIDDEN, _COMPONENTS, _TOP = (0.02, 0.1, 0.5), 128, 10
_WORDS_SHARE = 0.9
_PHOTOS = 400  # of products, hidden and others each


def figures(
    source: Path, out: Path, num_items: int, weights: list[float], encoders: tuple[str, str]
) -> dict[str, Any]:
    """Measures all shares and weights: {share hidden: {weight: figures}}, and milliseconds."""
    rows, rng = products_of(source), np.random.default_rng(0)
    titles, types = [row["title"] for row in rows], [row["article_type"] for row in rows]
    ids = np.array([row["product_id"] for row in rows], "S")
    pictures = vectors_of("image", encoders[1], pictures_of(source, rows), out)
    with tempfile.TemporaryDirectory() as folder:
        catalogue = Catalogue(titles, encoder_of("text", encoders[0], out / "encoded"), Path(folder))
        looks = query_rows(fitted_projection(pictures[pictures.any(axis=1)], _COMPONENTS), pictures)
        text_head, head = _heads(catalogue.vectors, looks, ~is_judged(ids))
        there = is_judged(ids) & looks.any(axis=1)
        texts, items, kinds = queries_about(titles, types, num_items, rng, there)
        words, text = catalogue.scores(texts)
        asked, places = catalogue.rows(texts), head.unit(looks)
    started = time.process_time()
    cosines = np.concatenate([text_head.unit(one[None]) @ places.T for one in asked])
    ms = (time.process_time() - started) / len(texts) * 1e3
    x = _WORDS_SHARE * words + (1 - _WORDS_SHARE) * text
    told: dict[str, Any] = {"queries": len(texts), "ms of CPU a query more": round(ms, 2)}
    told["photos"] = photo_figures(ids, looks, places, text_head.unit(catalogue.vectors), there)
    for share in _HIDDEN:
        hidden = hidden_products(ids, share)
        told[f"{share:.0%} without a title"] = {
            f"weight {weight:g}": found_by(np.where(hidden, 0, x), cosines, hidden, weight, items, kinds)
            for weight in weights
        }
    return told


def photo_figures(ids: Array, looks: Array, seen: Array, told: Array, there: Array) -> dict[str, Any]:
    """Chooses and judges what titles count for photos as a build does: of pictures' rows [I, P], and of
    pictures and titles in the space they share, [I, D] each; `there` [I] bool have both, and taught
    nothing."""
    rows = np.array([hides(one) for one in ids.tolist()]) & is_judged(ids)
    found = []
    for gone in (True, False):
        asked = np.flatnonzero(there & told.any(axis=1) & (rows == gone))[:_PHOTOS]
        found.append([_photo(looks, seen, told, rows, int(at)) for at in asked])
    return choose(Photos(np.array([one[0] for one in found[0]]), np.array([one[1] for one in found[1]])))[1]


def _photo(looks: Array, seen: Array, told: Array, hidden: Array, at: int) -> tuple[list[int], list[float]]:
    """Asks a product's own picture: see builders/search/told.py, whose rows begin at 1."""
    image = np.concatenate([[0], looks @ looks[at]])
    gone = np.concatenate([[False], hidden | ~looks.any(axis=1)])
    cosines = np.where(gone, np.concatenate([[0], told @ seen[at]]), 0)
    return places_of(image, np.where(gone, 0, image), cosines, at + 1, SearchSettings())


def hidden_products(ids: Array, share: float) -> Array:
    """Says which products [I] lose their titles, by a hash: a share of all, held-out ones where these are
    more than that, as queries are about them."""
    judged = is_judged(ids)
    places = np.array([zlib.crc32(b"hidden" + one) / 2**32 for one in ids.tolist()])
    if share < judged.mean():
        return judged & (places < share / judged.mean())
    return places < share


def _heads(texts: Array, looks: Array, learns: Array) -> list[Head]:
    """Trains the heads on the rows [I, P of each] that may be learned from, [I] bool."""
    learns = learns & texts.any(axis=1) & looks.any(axis=1)
    return fitted_heads([texts[learns], looks[learns]], 0, lambda share, text: None)


def found_by(
    x: Array, cosines: Array, hidden: Array, weight: float, items: Array, kinds: Array
) -> dict[str, Any]:
    """Tells of queries [Q], whose titles say x [Q, I] and whose pictures `cosines`, what they find."""
    best = x.max(axis=1, keepdims=True)
    shown = [beside(of, float(top), weight) for of, top in zip(cosines, best[:, 0], strict=True)]
    ranks, gone = ranks_of(np.where(hidden, shown, x), items), hidden[items]
    of_kind = {str(kind): kinds == kind for kind in dict.fromkeys(kinds)}
    full = kinds == FULL
    return {
        "hidden": {k: round(float(ndcg(ranks[gone & of], _TOP)), 3) for k, of in of_kind.items()},
        "others": {k: round(float(ndcg(ranks[~gone & of], _TOP)), 3) for k, of in of_kind.items()},
        "hidden products": int((gone & full).sum()),
        "hidden, full title, in the first ten": round(float((ranks[gone & full] < _TOP).mean()), 3),
        "others, full title first": round(float((ranks[~gone & full] == 0).mean()), 3),
    }


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(prog="builders.bench.untold", description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--weights", default="0,1,2,3")
    parser.add_argument("--encoders", type=Path)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    weights = [float(weight) for weight in asked.weights.split(",")]
    folder = asked.encoders and asked.encoders.resolve()
    encoders = (f"{folder}/text", f"{folder}/image") if folder else (MINILM, EFFICIENTNET)
    print(json_text(figures(asked.data, asked.out, asked.items, weights, encoders), indent=1))


if __name__ == "__main__":
    try:
        main()
    except PeregrineError as error:
        sys.exit(f"error: {error}")
