"""Measures how well words, meaning and both find a product: a table for BENCHMARKS.md.

    python -m builders.bench.search DATA_DIR --out DIR [--items 400]

The catalogue is DATA_DIR/mm_fashion_small. Queries are made of titles that one product has alone, as a build
makes them (builders/search/queries.py), and of titles without the words of any type's name; NDCG@10 of the
product itself, half of the products choosing what words weigh beside meaning, the other half told. Beside
them stands the type's name asked of a catalogue whose titles say no type: of the first ten, how many are of
that type. DIR keeps the encoder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from builders.bench.titles_and_pictures import encoder_of, masked, products_of
from builders.content.sources import MINILM
from builders.metrics import ndcg
from builders.search.queries import FULL, asked_of
from ensemble.arrays import Array
from ensemble.content.encoder import ContentEncoder
from ensemble.content.projection import fitted_projection
from ensemble.errors import PeregrineError
from ensemble.index.looks import query_rows
from ensemble.index.words import Words, terms_of, write_words
from ensemble.json_text import json_text

_COMPONENTS, _TOP, _FEWEST = 128, 10, 20
_SHARES = np.round(np.arange(0, 1.01, 0.1), 1)
UNTYPED = "type words masked"


class Catalogue:
    """Holds what a search reads of some titles."""

    def __init__(self, titles: list[str], encoder: ContentEncoder, folder: Path) -> None:
        write_words(["", *titles], folder)
        self._words, self._encoder = Words(folder), encoder
        vectors = encoder.encode(titles).vectors
        self._projection = fitted_projection(vectors, _COMPONENTS)
        self.vectors = query_rows(self._projection, vectors)  # [I, P] float32 of length 1

    def rows(self, texts: list[str]) -> Array:
        """Encodes texts as rows hold titles: [Q, P] float32 of length 1."""
        return query_rows(self._projection, self._encoder.encode(texts).vectors)

    def scores(self, texts: list[str]) -> tuple[Array, Array]:
        """Gives what words and meaning say of every title: [Q, I] float32 each."""
        live, size = self._words.live(), len(self.vectors) + 1
        words = np.stack([self._words.scores(terms_of(text), size, live)[1:] for text in texts])
        return words, np.maximum(self.rows(texts) @ self.vectors.T, 0)


def figures(source: Path, out: Path, num_items: int) -> dict[str, Any]:
    """Measures all ways: {kind of query: {way: NDCG@10}}, and what was chosen."""
    rows, rng = products_of(source), np.random.default_rng(0)
    titles, types = [row["title"] for row in rows], [row["article_type"] for row in rows]
    encoder = encoder_of("text", MINILM, out)
    with tempfile.TemporaryDirectory() as folder:
        catalogue = Catalogue(titles, encoder, Path(folder))
        texts, items, kinds = queries_about(titles, types, num_items, rng)
        started = time.process_time()
        words, text = catalogue.scores(texts)
        ms = (time.process_time() - started) / len(texts) * 1e3
    ranks = np.stack([ranks_of(share * words + (1 - share) * text, items) for share in _SHARES], axis=1)
    _, number = np.unique(items, return_inverse=True)
    tuned = number % 2 == 0
    gains = [
        float(np.mean([ndcg(ranks[tuned & (kinds == k), s], _TOP) for k in set(kinds)]))
        for s in range(len(_SHARES))
    ]
    share = int(np.argmax(gains))
    ways = {"words": len(_SHARES) - 1, "text": 0, "both": share}
    told: dict[str, Any] = {
        str(kind): {
            way: round(float(ndcg(ranks[~tuned & (kinds == kind), s], _TOP)), 3) for way, s in ways.items()
        }
        for kind in dict.fromkeys(kinds)
    }
    full = ~tuned & (kinds == FULL)
    told["full title first"] = {way: round(float((ranks[full, s] == 0).mean()), 3) for way, s in ways.items()}
    told["type asked of titles without types, precision@10"] = _by_type(
        titles, types, encoder, float(_SHARES[share])
    )
    return told | {
        "share of words": float(_SHARES[share]),
        "queries": len(texts),
        "ms of CPU a query": round(ms, 2),
    }


def queries_about(
    titles: list[str],
    types: list[str],
    num_items: int,
    rng: np.random.Generator,
    among: Array | None = None,
) -> tuple[list[str], Array, Array]:
    """Makes queries of titles that one product has alone: texts [Q], places of their products, kinds; of the
    products `among` [I] bool, all where it is None."""
    _, first, counts = np.unique(np.array(titles), return_index=True, return_counts=True)
    alone = first[counts == 1]
    alone = alone if among is None else alone[among[alone]]
    untyped = masked(titles, sorted(set(types)))
    texts, items, kinds = list[str](), list[int](), list[str]()
    for item in np.sort(rng.choice(alone, min(num_items, len(alone)), replace=False)).tolist():
        asked = asked_of(titles[item], set(), rng)
        if untyped[item] and untyped[item] != titles[item]:
            asked[UNTYPED] = untyped[item]
        for kind, text in asked.items():
            texts.append(text)
            items.append(item)
            kinds.append(kind)
    return texts, np.array(items), np.array(kinds, dtype=object)


def ranks_of(scores: Array, items: Array) -> Array:
    """Gives the place from 0 of each query's product [Q] among scores [Q, I]."""
    own = scores[np.arange(len(items)), items][:, None]
    return (scores > own).sum(axis=1)


def _by_type(titles: list[str], types: list[str], encoder: ContentEncoder, share: float) -> dict[str, float]:
    """Asks for each common type by its name where no title names one: of the first ten, the share of it."""
    names = [name for name in sorted(set(types)) if types.count(name) >= _FEWEST]
    with tempfile.TemporaryDirectory() as folder:
        words, text = Catalogue(masked(titles, sorted(set(types))), encoder, Path(folder)).scores(names)
    of = np.array(types)
    found = {}
    for way, scores in (("words", words), ("text", text), ("both", share * words + (1 - share) * text)):
        first = np.argsort(-scores, axis=1, kind="stable")[:, :_TOP]
        found[way] = round(float((of[first] == np.array(names)[:, None]).mean()), 3)
    return found


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(prog="builders.bench.search", description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=400)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    print(json_text(figures(asked.data, asked.out, asked.items), indent=1))


if __name__ == "__main__":
    try:
        main()
    except PeregrineError as error:
        sys.exit(f"error: {error}")
