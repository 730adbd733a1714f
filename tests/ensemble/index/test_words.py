"""Words find titles: exact ones first, mistyped and unspaced ones too, new titles at once, nonsense never."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ensemble.index.words import Words, terms_of, write_words

TITLES = [
    "",
    "Velvet matte lipstick berry",
    "Velvet gloss lipstick coral",
    "Soft cream blush berry",
    "口紅 マット ベリー",
    "المكياج الوردي",
    "Party kit 💄",
    "Soft powder",
]


@pytest.fixture
def words(tmp_path: Path) -> Words:
    write_words(TITLES, tmp_path)
    return Words(tmp_path)


def best(words: Words, text: str) -> tuple[int, float]:
    scores = words.scores(terms_of(text), len(TITLES), words.live())
    return int(scores.argmax()), float(scores.max())


@pytest.mark.parametrize("row", range(1, len(TITLES)))
def test_a_title_finds_its_item_first_with_a_score_of_one(words, row):
    assert best(words, TITLES[row]) == (row, pytest.approx(1.0, abs=1e-5))


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("berry lipstik", 1),
        ("BLUSH", 3),
        ("口紅", 4),
        ("マット", 4),
        ("الوردي", 5),
        ("💄", 6),
        ("powders", 7),
    ],
)
def test_a_part_or_a_mistyped_word_finds_it_well(words, text, row):
    found, score = best(words, text)
    assert found == row
    assert score > 0.3


@pytest.mark.parametrize("text", ["", "\0", "xqzvkj wpfgh", "the of and", "😀" * 100])
def test_what_no_title_says_finds_next_to_nothing(words, text):
    assert best(words, text)[1] < 0.2


def test_a_new_title_is_found_and_an_old_one_no_longer(words):
    live = words.live()
    live.put(1, "Zorblax night serum")
    live.put(9, "Zorblax day serum")
    scores = words.scores(terms_of("velvet matte lipstick berry"), 10, live)
    assert scores[1] == 0
    assert scores.argmax() == 2
    scores = words.scores(terms_of("zorblax night"), 10, live)
    assert scores.argsort()[::-1][:2].tolist() == [1, 9]
    live.put(1, "Other")
    assert words.scores(terms_of("zorblax night"), 10, live).argmax() == 9


def test_no_row_depends_on_how_many_are_asked_for(words):
    terms = terms_of("soft berry")
    few, many = (words.scores(terms, size, words.live()) for size in (len(TITLES), 50))
    np.testing.assert_array_equal(few, many[: len(TITLES)])


def test_a_catalogue_without_titles_finds_nothing(tmp_path):
    write_words(["", "", ""], tmp_path)
    assert not Words(tmp_path).scores(terms_of("lipstick"), 3, Words(tmp_path).live()).any()


def test_a_very_long_text_has_so_many_terms_and_no_more():
    assert len(terms_of(" ".join(f"word{at}" for at in range(10_000)))) <= 600


def test_a_term_longer_than_any_of_the_vocabulary_is_none_of_its_terms(words):
    """Cut to the vocabulary's width it would be another term, and widening that copies all of it."""
    longest = max(terms_of("".join(TITLES)), key=len).decode()
    live = words.live()
    scores = words.scores(terms_of(f"{'velvet' * 6} {longest * 2} lipstick"), len(TITLES), live)
    assert 0 < scores.max() < 0.9
    found = words._of([b"velvet", b"velvet" * 8, b"zz"])
    assert [len(found[term]) for term in (b"velvet", b"velvet" * 8, b"zz")] == [2, 0, 0]
