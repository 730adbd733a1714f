"""Writes what search reads of the catalogue: the postings of titles and the vectors of texts and pictures."""

from __future__ import annotations

from pathlib import Path

from builders.data.dataset import Dataset
from ensemble.index.looks import write_vectors
from ensemble.index.words import write_words


def write_search_files(dataset: Dataset, folder: Path) -> None:
    """Writes them where the shop has a search: where something encodes texts or pictures."""
    if not dataset.schema.encoders:
        return
    write_words([title.decode() for title in dataset.item_titles.tolist()], folder)
    for feature in dataset.schema.items.features:
        if feature.encoder:
            write_vectors(feature, dataset.item_values, folder)
