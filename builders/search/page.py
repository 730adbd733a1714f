"""Writes the report's part on search: what words, meaning and both find, what taste moves, and what pictures
find of what no text tells of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = {
    "words": "words alone (BM25)",
    "text": "meaning alone (text encoder)",
    "both": "both, as weighed",
    "without_taste": "both, by the whole search",
    "with_taste": "what is served: moved by the user's taste",
}


def search_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Gives head and rows of the table: NDCG@10 of each way, by kind of query too."""
    ways = {**found["ways"], **{name: found[name] for name in ("without_taste", "with_taste")}}
    kinds = list(found["ways"]["both"]["by_kind"])
    rows = [
        [
            _NAMES[name],
            f"{of['ndcg@10']:.4f}",
            "" if of["full_title_first"] is None else f"{of['full_title_first']:.1%}",
            *(f"{of['by_kind'].get(kind, 0.0):.4f}" for kind in kinds),
        ]
        for name, of in ways.items()
    ]
    return ["", "ndcg@10", "title first", *(kind.replace("_", " ") for kind in kinds)], rows


def search_note(found: Mapping[str, Any]) -> str:
    """Says what was asked, and what was chosen."""
    settings = found["settings"]
    return (
        f"{found['queries']:,} queries made of titles of items that the weights were not chosen on; each "
        f"looks for its own item among all. Words weigh {settings['words_share']:.0%}, meaning the rest; "
        f"taste weighs {settings['taste_weight']:g}, the largest that costs at most 2%. Of texts that "
        f"mean nothing, {found['nonsense_refused']:.0%} find nothing, as they should."
    ) + "".join(f" {line}" for line in [*shown_lines(found), *told_lines(found)])


def shown_lines(found: Mapping[str, Any]) -> list[str]:
    """Says whether a text finds what only a picture shows, and what that gains and costs; nothing where a
    shop has too few titles and pictures to learn it from."""
    shown = found.get("shown")
    if not shown:
        return []
    hidden, told, first = shown["hidden"], shown["told"], shown["full_title_first"]
    figures = (
        f"NDCG@10 of items whose titles were hidden {hidden['without']:.3f} -> {hidden['with']:.3f} "
        f"({hidden['title_in_first_ten']:.0%} of their titles find them among the first ten), of the others "
        f"beside them {told['without']:.3f} -> {told['with']:.3f}, whose full titles come first in "
        f"{first['with']:.1%} (before: {first['without']:.1%})"
    )
    if shown["on"]:
        return [f"A text finds items without a text by their pictures: {figures}."]
    return [
        f"A text does not find items without a text by their pictures, it would gain too little: {figures}."
    ]


def told_lines(found: Mapping[str, Any]) -> list[str]:
    """Says whether a photo finds what only a text tells, and what that gains and costs; nothing where a shop
    has too few titles and pictures to learn it from."""
    told = found.get("told")
    if not told:
        return []
    hidden, stay = told["hidden"], told["first_ten_stay"]
    figures = (
        f"NDCG@10 of items whose pictures were hidden, by these, {hidden['without']:.3f} -> "
        f"{hidden['with']:.3f} ({hidden['in_first_ten']:.0%} are among the first ten); of what others find, "
        f"{stay['with']:.1%} stays in the first ten (before: {stay['without']:.1%})"
    )
    if told["on"]:
        return [f"A photo finds items without a picture by their texts: {figures}."]
    return [
        f"A photo does not find items without a picture by their texts, it would gain too little: {figures}."
    ]
