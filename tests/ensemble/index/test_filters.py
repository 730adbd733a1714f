"""Masks of filters: many new ones of one request are those that each would have got alone."""

from __future__ import annotations

import itertools

import numpy as np
from random_release import BRANDS, make_release, open_recall

from ensemble.index import filters as module
from ensemble.index.filters import ItemFilters
from ensemble.options import Filter


def filters_of(release) -> ItemFilters:
    vocabularies = release.vocabularies["items"]
    return ItemFilters(release.schema, vocabularies, release.items["codes"], release.item_numbers)


def many() -> list[Filter]:
    pairs = itertools.product(BRANDS, ("tag0", "tag1", "tag2"))
    return [
        Filter(allow=(("brand", (brand,)),), deny=(("tags", (tag, "no such")),), ranges=(("price", 5, 80),))
        for brand, tag in pairs
    ]


def test_many_new_filters_read_the_catalogue_once(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 64)
    release = make_release(tmp_path, rng, num_items=500)
    view, wanted = open_recall(release).live.view, many()
    alone = [filters_of(release).mask(one, view).main for one in wanted]
    together = filters_of(release)
    read = []
    monkeypatch.setattr(together, "_codes", Counted(release.items["codes"], read))
    masks = together.masks([*wanted, None, wanted[0]], view)
    assert masks[-2] is None
    assert masks[-1] is masks[0]
    for mask, main in zip(masks, alone, strict=False):
        np.testing.assert_array_equal(mask.main, main)
    assert sum(read) == 501, "each row is read once for all filters"
    assert any(main.any() for main in alone)
    assert not any(main[0] for main in alone)


def test_masks_of_a_large_catalogue_stay_within_their_memory(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(module, "_BYTES", 9 * 501)
    release = make_release(tmp_path, rng, num_items=500)
    filters, view = filters_of(release), open_recall(release).live.view
    for one in many():
        filters.masks([one], view)
    assert len(filters._masks) == len(filters._parts) == 9
    masks = filters.masks(many(), view)  # more than are kept: all are right all the same
    assert len(filters._masks) == 9
    for one, mask in zip(many(), masks, strict=True):
        np.testing.assert_array_equal(mask.main, filters_of(release).mask(one, view).main)


class Counted:
    """Counts the rows of an array that are taken out of it."""

    def __init__(self, array: np.ndarray, read: list[int]) -> None:
        self.array, self.read = array, read

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, piece: slice) -> np.ndarray:
        self.read.append(len(self.array[piece]))
        return self.array[piece]
