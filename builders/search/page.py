"""Writes the report's part on search: what words, meaning and both find, and what taste moves."""

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
    )
