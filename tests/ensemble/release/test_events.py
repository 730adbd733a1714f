"""What events of a past add to their items: cells of kind and gap, and a release without any."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from random_release import make_release, schema_of

from ensemble.release.events import FIELDS, FIRST, GAPS, HistoryEvents, event_cells, events_file

SCHEMA = replace(schema_of(), events=("view", "buy"))
DAY_S = 86_400
TIMES = np.array([[0, 0, 1_000], [1_000, 1_000 + DAY_S - 1, 1_000 + DAY_S], [0, 5, 1 << 40]])
KINDS = np.array([[0, 0, 2], [2, 1, 1], [1, 2, 1]])


def test_a_cell_is_the_kind_and_the_time_since_the_event_before_and_padding_is_of_kind_0():
    day, second = int(np.log2(DAY_S)), 1
    wanted = [
        [FIRST, FIRST, 2 * GAPS + FIRST],
        [2 * GAPS + FIRST, GAPS + day, GAPS + second],
        [GAPS + FIRST, 2 * GAPS + 2, GAPS + FIRST - 1],
    ]
    assert event_cells(SCHEMA, TIMES, KINDS).tolist() == wanted
    assert event_cells(SCHEMA, TIMES, KINDS).max() < (len(SCHEMA.events) + 1) * GAPS


def test_where_times_are_no_times_only_the_first_event_is_told_from_the_others():
    cells = event_cells(replace(SCHEMA, has_clock=False), TIMES, KINDS)
    gaps = [[FIRST, FIRST, FIRST], [FIRST, 0, 0], [FIRST, 0, 0]]
    assert cells.tolist() == (KINDS * GAPS + gaps).tolist()


def test_a_release_adds_what_its_tables_say_and_nothing_without_one(tmp_path, rng):
    release, cells = make_release(tmp_path, rng, schema=SCHEMA), event_cells(SCHEMA, TIMES, KINDS)
    for field in FIELDS:
        rows = rng.standard_normal((3, 3, release.items[field].shape[1])).astype(np.float32)
        assert HistoryEvents(release).added(field, rows, cells) is rows
        table = rng.standard_normal(((len(SCHEMA.events) + 1) * GAPS, rows.shape[-1])).astype(np.float32)
        np.save(events_file(release.path, field), table)
        assert HistoryEvents(release).known
        added = HistoryEvents(release).added(field, rows, cells)
        np.testing.assert_array_equal(added, rows + table[cells])
        assert added.dtype == np.float32
