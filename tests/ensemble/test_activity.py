"""What a user did lately, and with which candidates, against the plainest way to count it."""

import numpy as np
import pytest

from ensemble.activity import activity, activity_width, recencies, state_width, touches, touches_width
from ensemble.schema import Schema, Sizes, Table

SCHEMA = Schema("toy", Table(), Table(), (), Sizes(user_rates=2), events=("view", "buy"))
NOW = 1_700_000_000


def _pasts(rng, users=7, width=12):
    kinds = rng.integers(0, 3, (users, width)).astype(np.int32)
    kinds[0] = 0  # a user without a past
    rows = np.where(kinds > 0, rng.integers(1, 6, kinds.shape), -1)
    times = np.where(kinds > 0, NOW - rng.integers(0, 2_000_000, kinds.shape), 0)
    return rows, times, kinds


def test_a_recency_falls_from_1_now_to_0_a_year_ago_and_padding_has_none():
    gaps = np.array([[0, 60, 3600, 86_400, 40_000_000, 0]])
    kinds = np.array([[1, 1, 1, 1, 1, 0]], np.int32)
    found = recencies(SCHEMA, NOW - gaps, kinds, np.array([float(NOW)]))[0]
    assert found[0] == 1
    assert found[4] == found[5] == 0
    assert (np.diff(found[:5]) < 0).all()
    later = recencies(SCHEMA, NOW - gaps, kinds, np.array([NOW + 0.4]))[0]
    assert (later[1:] == found[1:]).all(), "an answer does not change within a second"
    assert (recencies(SCHEMA, NOW + gaps, kinds, np.array([float(NOW)]))[0, :5] == 1).all(), "late clocks"


def test_activity_counts_each_kind_and_the_last_minutes_hours_and_days(rng):
    rows, times, kinds = _pasts(rng)
    near = recencies(SCHEMA, times, kinds, np.full(len(rows), float(NOW)))
    found = activity(SCHEMA, near, kinds)
    assert found.shape == (len(rows), activity_width(SCHEMA))
    assert activity_width(SCHEMA) + 2 == state_width(SCHEMA)
    assert not found[0].any()
    for user in range(len(rows)):
        for kind in (1, 2):
            own = kinds[user] == kind
            assert found[user, 2 * kind - 2] == (near[user, own].max() if own.any() else 0)
            assert found[user, 2 * kind - 1] == pytest.approx(np.log1p(own.sum()))
        day = (kinds[user] > 0) & (NOW - times[user] <= 86_400)
        # recencies are steps of a hundredth: an event near the edge may count or not
        edge = (kinds[user] > 0) & (np.abs(NOW - times[user] - 86_400) < 30_000)
        assert day.sum() <= round(np.expm1(found[user, 7])) <= (day | edge).sum()


def test_without_a_clock_only_counts_are_told(rng):
    from dataclasses import replace

    schema = replace(SCHEMA, has_clock=False)
    rows, times, kinds = _pasts(rng)
    near = recencies(schema, times, kinds, np.full(len(rows), float(NOW)))
    assert not near.any()
    found = activity(schema, near, kinds)
    assert not found[:, [0, 2, 4, 5, 6, 7, 8]].any()
    assert found[1:, 1].any()
    asked = np.tile(np.arange(1, 6), (len(rows), 1))
    counts = touches(schema, rows, near, kinds, asked)[..., -1]
    wanted = np.log1p([[(line == item).sum() for item in range(1, 6)] for line in rows])
    np.testing.assert_allclose(counts, wanted, rtol=1e-6)
    newest = touches(schema, np.array([[3, 4, 3, 5]]), np.zeros((1, 4)), np.ones((1, 4), int), asked[:1])
    assert newest[0, 2:, 2].tolist() == pytest.approx([1 / 2, 1 / 3, 1]), "their order is told"


def test_touches_tell_the_last_event_of_each_kind_with_that_very_item(rng):
    rows, times, kinds = _pasts(rng)
    near = recencies(SCHEMA, times, kinds, np.full(len(rows), float(NOW)))
    asked = np.stack([rng.permutation(np.arange(-1, 9)) for _ in rows])
    found = touches(SCHEMA, rows, near, kinds, asked)
    assert found.shape == (*asked.shape, touches_width(SCHEMA))
    for user, items in enumerate(asked):
        for place, item in enumerate(items):
            own = (rows[user] == item) & (kinds[user] > 0)
            wanted = [near[user, own & (kinds[user] == kind)].max(initial=0) for kind in (1, 2)]
            # the newest event is 1 event ago
            wanted.append(1 / (rows.shape[1] - np.flatnonzero(own)[-1]) if own.any() else 0)
            wanted.append(np.log1p(own.sum()))
            assert found[user, place].tolist() == pytest.approx(wanted if item > 0 else [0, 0, 0, 0])
    alone = touches(SCHEMA, rows[3:4], near[3:4], kinds[3:4], asked[3:4])
    assert (alone[0] == found[3]).all(), "batch-mates change nothing"
