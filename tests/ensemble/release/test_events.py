"""What events of a past add to their items: cells of kind and age, and a release without any."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from random_release import make_release, schema_of

from ensemble.release.events import AGES, HISTORY_EVENTS, HistoryEvents, event_cells, num_cells

SCHEMA = replace(schema_of(), events=("view", "buy"))
DAY_S = 86_400
TIMES = np.array([[0, 0, 1_000], [1_000, 1_000 + DAY_S - 1, 1_000 + DAY_S], [0, 5, 1 << 40]])
KINDS = np.array([[0, 0, 2], [2, 1, 1], [1, 2, 1]])


def test_a_cell_is_the_kind_and_the_age_against_the_newest_event_and_padding_is_of_kind_0():
    day, last, before = int(np.log2(1 + DAY_S)), AGES - 1, int(np.log2(1_001))
    wanted = [
        [before, before, 2 * AGES],
        [2 * AGES + day, AGES + 1, AGES],
        [AGES + last, 2 * AGES + last, AGES],
    ]
    assert event_cells(SCHEMA, TIMES, KINDS).tolist() == wanted
    assert event_cells(SCHEMA, TIMES, KINDS).max() < num_cells(SCHEMA)


def test_where_times_are_no_times_every_event_is_of_one_age():
    cells = event_cells(replace(SCHEMA, has_clock=False), TIMES, KINDS)
    assert cells.tolist() == (KINDS * AGES).tolist()


def test_a_release_adds_what_its_table_says_and_nothing_without_one(tmp_path, rng):
    release = make_release(tmp_path, rng, schema=SCHEMA)
    features = rng.standard_normal((3, 3, SCHEMA.sizes.item_features)).astype(np.float32)
    cells = event_cells(SCHEMA, TIMES, KINDS)
    assert not HistoryEvents(release).known
    assert HistoryEvents(release).added(features, cells) is features
    table = rng.standard_normal((num_cells(SCHEMA), features.shape[-1])).astype(np.float32)
    np.save(release.path / HISTORY_EVENTS, table)
    added = HistoryEvents(release).added(features, cells)
    np.testing.assert_array_equal(added, features + table[cells])
    assert added.dtype == np.float32
