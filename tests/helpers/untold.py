"""Finds what tests of items without a title need: a picture that some title tells well, and releases that ask
pictures, or know nothing of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ensemble.content.shared_space import SHARED, read_heads
from ensemble.index.looks import shared_file, vectors_file
from ensemble.release.release import Release
from ensemble.steps.search_settings import SEARCH_FILE


def best_told(shop: Path, release: Release) -> tuple[str, Path]:
    """The title, and the picture's file, of the item whose title says best what its picture shows."""
    import pyarrow.parquet as pq

    texts, pictures = (np.load(release.path / of) for of in (vectors_file("words"), shared_file("image")))
    own = (read_heads(release.path / SHARED)["words"].unit(texts) * pictures).sum(axis=1)
    best = release.item_ids.ids_from_rows(own.argmax()[None])[0].decode()
    item = next(row for row in pq.read_table(shop / "items.parquet").to_pylist() if row["item_id"] == best)
    return item["title"], shop / item["image"]


def asks_pictures(own: Path, members: dict[str, Path]) -> None:
    """Makes a release ask pictures where no text tells of an item, and texts where it has no picture,
    whatever its build has chosen."""
    settings = json.loads((own / SEARCH_FILE).read_text())
    (own / SEARCH_FILE).write_text(json.dumps({**settings, "shown_weight": 2.0, "told_weight": 2.0}))


def knows_no_space(own: Path, members: dict[str, Path]) -> None:
    """Makes a release what one was before titles and pictures shared a space."""
    settings = json.loads((own / SEARCH_FILE).read_text())
    del settings["shown_weight"], settings["told_weight"]
    (own / SEARCH_FILE).write_text(json.dumps(settings))
    for name in (SHARED, shared_file("image"), shared_file("words")):
        (own / name).unlink()
