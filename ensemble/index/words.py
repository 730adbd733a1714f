"""Finds items by the words of their titles: BM25 over postings in NumPy arrays that all processes map.

A title's terms are its words, three letters in a row of each longer word (so that a typo or another ending
still finds it), and for scripts that write no spaces single characters and pairs. A score is BM25 (Robertson
and Zaragoza, 2009) over what a title that says just the query would have: 1 for that one, near 0 where next
to nothing of the query is there, whatever the query's length. Words that no title has count as rare ones, so
a query of such words finds nothing.

The libraries bm25s and tantivy were looked at: neither adds single documents to arrays that are mapped, and
neither gives the score of a document that it does not hold, which live items and the measure of 1 need.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ensemble.arrays import Array

TERMS, STARTS, POSTINGS = "search_terms.npy", "search_starts.npy", "search_postings.npy"
LENGTH = "search_length.npy"
FILES = (TERMS, STARTS, POSTINGS, LENGTH)
POSTING = np.dtype([("row", "<i4"), ("weight", "<f4")])
_K1, _B = 1.2, 0.75
_WORD = re.compile(r"[^\W_]+")
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\u0e00-\u0e7f]+")
_SYMBOL = re.compile(r"[\u2600-\u27bf\U0001f300-\U0001faff]")  # emoji are words
_MAX_TERM_BYTES, _MAX_TERMS = 48, 600  # of a title, of which more say no more
_LONG = 4  # letters from which a word's trigrams count
_TRIGRAM_SHARE = 0.5  # of a word's count, for all its trigrams together
_UNKNOWN = 4.0  # what trigrams count in a query where no title has the word


def terms_of(text: str) -> Counter[bytes]:
    """Counts the terms of a text, trigrams by their share of a word."""
    plain = unicodedata.normalize("NFKC", text[: 16 * _MAX_TERMS]).casefold()
    terms: Counter[bytes] = Counter()
    for word in _WORD.findall(_UNSPACED.sub(" ", plain)):
        _count(terms, word, 1.0)
        pieces = _trigrams(word)
        for piece in pieces:
            _count(terms, piece, _TRIGRAM_SHARE / len(pieces))
    for run in _UNSPACED.findall(plain):
        for piece in (*run, *(run[at : at + 2] for at in range(len(run) - 1))):
            _count(terms, piece, 1.0)
    for symbol in _SYMBOL.findall(plain):
        _count(terms, symbol, 1.0)
    return terms if len(terms) <= _MAX_TERMS else Counter(dict(list(terms.items())[:_MAX_TERMS]))


def _trigrams(word: str) -> list[str]:
    """Gives what stands for three letters in a row of a longer word, its ends included."""
    marked = f"^{word}$"
    return [f"~{marked[at : at + 3]}" for at in range(len(marked) - 2)] if len(word) >= _LONG else []


def _encoded(term: str) -> bytes:
    return term.encode("utf-8", "replace")[:_MAX_TERM_BYTES]


def _count(terms: Counter[bytes], term: str, share: float) -> None:
    terms[_encoded(term)] += share  # type: ignore[assignment]


def weight_of(count: float, length: float, mean_length: float) -> float:
    """Gives BM25's weight of a term that a title of so many terms has so often, without the term's rarity."""
    norm = _K1 * (1 - _B + _B * length / max(mean_length, 1e-9))
    return count * (_K1 + 1) / (count + norm)


def write_words(titles: Sequence[str], folder: Path) -> None:
    """Writes the postings of titles [I + 1], whose first is nobody's."""
    counted = [terms_of(title) for title in titles]
    lengths = [float(sum(terms.values())) for terms in counted]
    mean = float(np.mean(lengths[1:])) if len(lengths) > 1 else 0.0
    vocabulary = sorted({term for terms in counted for term in terms})
    place = {term: at for at, term in enumerate(vocabulary)}
    of_term, rows, weights = [], [], []
    for row, terms in enumerate(counted):
        for term, count in terms.items() if row else ():
            of_term.append(place[term])
            rows.append(row)
            weights.append(weight_of(count, lengths[row], mean))
    order = np.argsort(np.array(of_term, np.int64), kind="stable")
    postings = np.zeros(len(rows), POSTING)
    postings["row"], postings["weight"] = np.array(rows, np.int64)[order], np.array(weights)[order]
    counts = np.bincount(np.array(of_term, np.int64), minlength=len(vocabulary))
    np.save(folder / TERMS, np.array(vocabulary or [b""], dtype="S"))
    np.save(folder / STARTS, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    np.save(folder / POSTINGS, postings)
    np.save(folder / LENGTH, np.array([mean, len(titles) - 1], np.float64))


@dataclass
class LiveWords:
    """Holds the titles that changes have brought, by row: the last one of each counts."""

    mean: float
    terms: dict[int, Counter[bytes]] = field(default_factory=dict)
    rows: dict[bytes, dict[int, float]] = field(default_factory=dict)
    _changed: Array | None = None  # the rows of `terms`, until the next one comes

    def put(self, row: int, title: str) -> None:
        """Makes `title` the title of a row."""
        for term in self.terms.pop(row, ()):
            self.rows[term].pop(row, None)
        self.terms[row] = terms = terms_of(title)
        length = float(sum(terms.values()))
        for term, count in terms.items():
            self.rows.setdefault(term, {})[row] = weight_of(count, length, self.mean)
        self._changed = None

    def changed(self) -> Array:
        """Gives the rows whose titles changes have brought: [n] int64."""
        if self._changed is None:
            self._changed = np.fromiter(self.terms, np.int64, len(self.terms))
        return self._changed

    def postings(self, term: bytes) -> tuple[Array, Array]:
        """Gives rows and weights [n] of the changed titles that have a term."""
        found = self.rows.get(term, {})
        rows = np.fromiter(found.keys(), np.int64, len(found))
        return rows, np.fromiter(found.values(), np.float32, len(found))


class Words:
    """Holds the postings of a release, mapped."""

    def __init__(self, folder: Path) -> None:
        self._terms, self._starts, self._postings, length = (
            np.load(folder / name, mmap_mode="r", allow_pickle=False).view(np.ndarray) for name in FILES
        )
        self.mean, self.num_titles = float(length[0]), int(length[1])

    def live(self) -> LiveWords:
        """Gives an empty holder of titles that changes bring."""
        return LiveWords(self.mean)

    def scores(self, terms: Counter[bytes], num_rows: int, live: LiveWords) -> Array:
        """Scores all rows [num_rows] float32 for the terms of a query, 1 for a title that says just that."""
        out = np.zeros(num_rows, np.float32)
        if not terms:
            return out
        all_postings = self._of(terms)
        importance = self._importance(terms, all_postings, live)
        own, length = 0.0, float(sum(terms.values()))
        for term, count in terms.items():
            own += importance[term] * weight_of(count, length, self.mean)
            postings = all_postings[term]
            out[postings["row"]] += importance[term] * postings["weight"]
        if live.terms:
            changed = live.changed()
            out[changed[changed < num_rows]] = 0  # the release's own titles of these are old
            for term in terms:
                rows, weights = live.postings(term)
                there = rows < num_rows
                out[rows[there]] += importance[term] * weights[there]
        return out / np.float32(max(own, 1e-9))

    def _of(self, terms: Iterable[bytes]) -> dict[bytes, Array]:
        """Gives the postings of each term, none where no title has it; all are looked up at once."""
        found = dict.fromkeys(terms, self._postings[:0])
        # NumPy would widen the whole vocabulary for a term that is longer than any of it
        asked = [term for term in found if len(term) <= self._terms.itemsize]
        if not asked or len(self._starts) < 2:
            return found
        keys = np.array(asked, self._terms.dtype)
        places = np.minimum(np.searchsorted(self._terms, keys), len(self._terms) - 1)
        there = self._terms[places] == keys
        starts, ends = self._starts[places].tolist(), self._starts[places + 1].tolist()
        for term, is_there, start, end in zip(asked, there.tolist(), starts, ends, strict=True):
            if is_there:
                found[term] = self._postings[start:end]
        return found

    def _importance(
        self, terms: Mapping[bytes, float], postings: Mapping[bytes, Array], live: LiveWords
    ) -> dict[bytes, float]:
        """Gives what each term of a query counts: its inverse document frequency, always above 0, as often as
        it stands there. A longer word that no title has counts by its trigrams alone: it may be mistyped."""
        total = self.num_titles + len(live.terms)
        found, unknown = {}, list[bytes]()
        for term, count in terms.items():
            have = min(total, len(postings[term]) + len(live.rows.get(term, ())))
            found[term] = float(np.log1p((total - have + 0.5) / (have + 0.5))) * max(1.0, count)
            if not have and not term.startswith(b"~"):
                unknown.append(term)
        for term in unknown:
            pieces = _trigrams(term.decode("utf-8", "ignore"))
            for piece in map(_encoded, pieces):
                if piece in found:
                    found[piece] *= _UNKNOWN
            if pieces:
                found[term] = 0.0
        return found
