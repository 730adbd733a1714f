"""Makes queries of titles: what people could type who look for a certain item."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from builders.data.dataset import Dataset
from ensemble.arrays import Array
from ensemble.release.release import Release

FULL, SOME, TYPO, MASKED = "full title", "two words", "two words, one mistyped", "category words masked"
KINDS = (FULL, SOME, TYPO, MASKED)
_WORD = re.compile(r"[^\W_]+")
_MOST, _MANY_ROWS, _FEW = 240, 200_000, 60  # items asked for; fewer in a catalogue that takes long


@dataclass(frozen=True)
class Queries:
    """Holds Q queries: texts, the row [Q] that each was made of, and its kind."""

    texts: list[str]
    rows: Array
    kinds: Array

    def of(self, chosen: Array) -> Queries:
        """Picks some of them."""
        return Queries([self.texts[at] for at in chosen.tolist()], self.rows[chosen], self.kinds[chosen])


def queries_of(
    dataset: Dataset, release: Release, rng: np.random.Generator, before: Array | None = None
) -> Queries:
    """Makes queries of evenly drawn items whose titles no other item has; of rows `before` [I + 1] bool
    before others, where that is given."""
    titles = dataset.item_titles
    _, first, counts = np.unique(titles, return_index=True, return_counts=True)
    rows = np.sort(first[(counts == 1)])
    rows = rows[(rows > 0) & (titles[rows] != b"")]
    most = _MOST if len(titles) < _MANY_ROWS else _FEW
    rows = rng.permutation(rows)
    if before is not None:
        rows = rows[np.argsort(~before[rows], kind="stable")]
    rows = np.sort(rows[:most])
    texts, of_row, kinds = list[str](), list[int](), list[str]()
    for row in rows.tolist():
        title = titles[row].decode(errors="replace")
        for kind, text in asked_of(title, _category_words(release, row), rng).items():
            if text.strip():
                texts.append(text)
                of_row.append(row)
                kinds.append(kind)
    return Queries(texts, np.array(of_row, np.int64), np.array(kinds, dtype=object))


def asked_of(title: str, known: set[str], rng: np.random.Generator) -> dict[str, str]:
    """Gives the queries of one title by kind, none that says the same as the whole title."""
    words = _WORD.findall(title)
    asked = {FULL: title}
    if len(words) > 2:
        pair = [words[at] for at in np.sort(rng.choice(len(words), 2, replace=False))]
        asked[SOME] = " ".join(pair)
        if long := [at for at, word in enumerate(pair) if len(word) >= 5]:
            at, word = long[0], pair[long[0]]
            cut = int(rng.integers(1, len(word) - 1))
            asked[TYPO] = " ".join([*pair[:at], word[:cut] + word[cut + 1 :], *pair[at + 1 :]])
    left = [word for word in words if word.casefold() not in known]
    if left and len(left) < len(words):
        asked[MASKED] = " ".join(left)
    return asked


def _category_words(release: Release, row: int) -> set[str]:
    """Gives the words of an item's categories, which its title often repeats."""
    words: set[str] = set()
    codes = release.items["codes"][row]
    for feature in release.schema.items.features:
        if feature.kind == "category":
            known = release.vocabularies["items"].get(feature.name, [])
            places = (codes[feature.columns] - feature.offset - 1).tolist()
            words |= {w.casefold() for p in places if 0 <= p < len(known) for w in _WORD.findall(known[p])}
    return words
