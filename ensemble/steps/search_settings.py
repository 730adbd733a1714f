"""Holds what the build chose for search: search.json of a release.

text      x = words_share * words + (1 - words_share) * text; of an item without a text, the best x of all
          times shown_weight * shown, or .99 where that is more
image     x = image; of an item without a picture, the best x of all times told_weight * told, likewise
relevance log odds = slope * x + bias, of a picture by its own slope and bias; of several the mean
order     relevance + taste_weight * taste, where taste [-1, 1] is an item's place by the ranker
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ensemble.errors import ReleaseError

SEARCH_FILE = "search.json"


@dataclass(frozen=True)
class SearchSettings:
    """Holds the content of search.json; as it stands here, what is used before anything is fitted."""

    words_share: float = 0.6  # of the words in what a text finds, the rest is its meaning's
    text_slope: float = 8.0
    text_bias: float = -3.0
    image_slope: float = 8.0
    image_bias: float = -4.0
    least_text: float = 0.3  # x below which an item does not fit
    least_image: float = 0.4
    shown_weight: float = 0.0  # of what pictures show of a text; 0: it is not asked
    told_weight: float = 0.0  # of what texts tell of a picture; 0: they are not asked
    taste_weight: float = 0.0
    probe: str = "item"  # a text that is asked for before a release is served

    def to_json(self) -> str:
        """Writes the content of search.json."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_search(folder: Path) -> SearchSettings:
    """Reads search.json of a release; where there is none yet, nothing was fitted."""
    path = folder / SEARCH_FILE
    if not path.exists():
        return SearchSettings()
    try:
        return SearchSettings(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ReleaseError(
            f"{SEARCH_FILE} does not fit this Peregrine ({error})", "build the release again"
        ) from None
