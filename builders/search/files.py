"""Writes what search reads of the catalogue: the postings of titles, the vectors of texts and pictures, and
the space that both share."""

from __future__ import annotations

from pathlib import Path

from builders.data.dataset import Dataset
from builders.progress import Progress
from builders.search.shared_space import exact_heads, fit_heads
from ensemble.content.shared_space import SHARED, save_heads
from ensemble.index.looks import write_vectors
from ensemble.index.words import write_words


def write_search_files(dataset: Dataset, folder: Path, progress: Progress) -> None:
    """Writes them where the shop has a search: where something encodes texts or pictures."""
    if not dataset.schema.encoders:
        return
    write_words([title.decode() for title in dataset.item_titles.tolist()], folder)
    heads = fit_heads(dataset, 0, progress, exact_heads(dataset.schema, folder)) or {}
    for feature in dataset.schema.items.features:
        if feature.encoder:
            write_vectors(feature, dataset.item_values, folder)
        if feature.name in heads:
            write_vectors(feature, dataset.item_values, folder, heads[feature.name])
    if heads:
        save_heads(heads, folder / SHARED)
