"""L1 against a dict, and its promises about age."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble.tiers.memory import FRESH, MISS, STALE, WAYS, MemoryTier
from ensemble.tiers.records import item_identities, user_identities
from ensemble.tiers.settings import TierSettings

ROW = np.dtype([("value", "<i8")])


class Clock:
    """Time that only a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def tier(clock: Clock, max_bytes: int = 1 << 20, **settings) -> MemoryTier:
    return MemoryTier(
        ROW, TierSettings("redis://nowhere", memory_bytes=max_bytes, **settings), clock=clock, seed=0
    )


def ids(*rows: int) -> np.ndarray:
    return item_identities(np.array(rows, np.int64))


def put(memory: MemoryTier, values: dict[int, int | None]) -> None:
    rows = np.array([(value or 0,) for value in values.values()], ROW)
    absent = np.array([value is None for value in values.values()], bool)
    memory.put(ids(*values), rows, absent, memory.get(ids(*values)).stamp)


def state(memory: MemoryTier, *rows: int) -> list[int]:
    return memory.get(ids(*rows)).state.tolist()


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("put"),
            st.dictionaries(
                st.integers(1, 60), st.one_of(st.none(), st.integers(0, 9)), min_size=1, max_size=12
            ),
        ),
        st.tuples(st.just("get"), st.lists(st.integers(1, 60), min_size=1, max_size=20)),
        st.tuples(st.just("drop"), st.lists(st.integers(1, 60), min_size=1, max_size=5)),
        st.tuples(st.just("wait"), st.sampled_from([1.0, 5.0, 11.0, 31.0])),
        st.tuples(st.just("flush"), st.none()),
    ),
    max_size=40,
)


@given(steps, st.sampled_from([1, 8, 1 << 12]))
def test_it_says_what_a_dict_would_or_nothing(actions, sets):
    """Whatever is found is the last thing put in, at most hard_ttl_s ago; with room for all it forgets
    nothing before its time."""
    clock = Clock()
    memory = tier(
        clock, sets * WAYS * (ROW.itemsize + 64), soft_ttl_s=10, hard_ttl_s=30, negative_ttl_s=5, jitter=0
    )
    model: dict[int, tuple[int | None, float]] = {}
    for action, argument in actions:
        if action == "put":
            put(memory, argument)
            model |= {row: (value, clock.now) for row, value in argument.items()}
        elif action == "drop":
            memory.drop(ids(*argument))
            model = {row: entry for row, entry in model.items() if row not in argument}
        elif action == "flush":
            memory.flush()
            model = {}
        elif action == "wait":
            clock.now += argument
        else:
            check(memory, model, argument, clock.now, roomy=sets == 1 << 12)
    check(memory, model, list(range(1, 61)), clock.now, roomy=sets == 1 << 12)
    assert memory.bytes <= memory.max_rows * memory.slot_bytes <= max(sets, 1) * WAYS * (ROW.itemsize + 64)


def check(memory, model, rows, now, roomy):
    found = memory.get(ids(*rows))
    for place, row in enumerate(rows):
        value, since = model.get(row, (None, -1e9))
        age, ttl = now - since, (5 if row in model and value is None else 30)
        if found.state[place] == MISS:
            assert not roomy or age >= ttl
            continue
        assert age < ttl
        assert found.absent[place] == (value is None)
        if value is not None:
            assert found.rows["value"][place] == value
            assert found.state[place] == (STALE if age >= 10 else FRESH)


def test_rows_expire_softly_then_for_good_and_no_later_than_promised():
    clock = Clock()
    memory = tier(clock, soft_ttl_s=10, hard_ttl_s=30, jitter=0.2)
    put(memory, {row: row for row in range(1, 401)})
    seen = []
    for _ in range(301):
        seen.append(memory.get(ids(*range(1, 401))).state)
        clock.now += 0.1
    seen = np.array(seen)
    first_stale, first_miss = (seen == STALE).argmax(axis=0) / 10, (seen == MISS).argmax(axis=0) / 10
    assert (seen[-1] == MISS).all()
    for first, ttl in ((first_stale, 10), (first_miss, 30)):
        assert first.min() >= 0.8 * ttl
        assert first.max() <= ttl + 0.1
        assert first.max() - first.min() > 0.15 * ttl, "rows loaded together must not expire together"


def test_jumps_of_the_wall_clock_change_nothing(monkeypatch):
    memory = MemoryTier(ROW, TierSettings("redis://nowhere", soft_ttl_s=3600, hard_ttl_s=7200, jitter=0))
    assert memory.clock is time.monotonic
    put(memory, {1: 1})
    true = time.time
    for jump_s in (3600 * 24, -3600 * 24, 0):
        monkeypatch.setattr(time, "time", lambda jump_s=jump_s: true() + jump_s)
        assert state(memory, 1) == [FRESH]


def test_a_row_is_asked_for_again_while_it_is_still_believed():
    clock = Clock()
    memory = tier(clock, soft_ttl_s=30, hard_ttl_s=300, jitter=0.0)
    put(memory, {7: 1})
    clock.now += 20
    assert not memory.get(ids(7)).refresh.any()
    clock.now += 5
    looked = memory.get(ids(7))
    assert (looked.state.tolist(), looked.refresh.tolist()) == ([FRESH], [True])
    clock.now += 6
    assert memory.get(ids(7)).state.tolist() == [STALE]


def test_one_asker_refreshes_a_stale_row_and_another_later_if_it_failed():
    clock = Clock()
    memory = tier(clock, soft_ttl_s=10, hard_ttl_s=100, jitter=0)
    memory.refresh_s = 0.5
    put(memory, {7: 7})
    clock.now += 11
    assert [memory.get(ids(7)).refresh.tolist() for _ in range(3)] == [[True], [False], [False]]
    clock.now += 1
    assert memory.get(ids(7)).refresh.tolist() == [True]
    put(memory, {7: 8})
    assert state(memory, 7) == [FRESH]


def test_what_was_read_before_an_invalidation_is_not_put_in_after_it():
    memory = tier(Clock())
    before = memory.get(ids(5, 6)).stamp
    memory.drop(ids(5))
    rows, none = np.array([(1,), (2,)], ROW), np.zeros(2, bool)
    memory.put(ids(5, 6), rows, none, before)
    assert state(memory, 5) == [MISS]
    after = memory.get(ids(5)).stamp
    memory.put(ids(5), rows[:1], none[:1], after)
    assert state(memory, 5) == [FRESH]
    before = memory.get(ids(9)).stamp
    memory.flush()
    memory.put(ids(9), rows[:1], none[:1], before)
    assert state(memory, 5, 9) == [MISS, MISS]


def test_the_least_recently_used_row_of_a_set_goes():
    memory = tier(Clock(), WAYS * (ROW.itemsize + 64))
    assert memory.max_rows == WAYS
    for row in (1, 2, 3, 4):
        put(memory, {row: row})
    memory.get(ids(1))
    put(memory, {5: 5})
    assert state(memory, 1, 2, 3, 4, 5) == [FRESH, MISS, FRESH, FRESH, FRESH]
    assert memory.counters.evictions == 1


def test_identities_with_equal_low_words_are_told_apart():
    memory = tier(Clock())
    one, two = np.array([[3, 1]], np.uint64), np.array([[3, 2]], np.uint64)
    memory.put(one, np.array([(1,)], ROW), np.zeros(1, bool), memory.get(one).stamp)
    assert memory.get(two).state.tolist() == [MISS]
    names = np.array([b"u%d" % n for n in range(10_000)])
    assert len({tuple(identity) for identity in user_identities(names).tolist()}) == len(names)


def test_hot_rows_stay_when_many_cold_ones_pass(rng):
    """Zipf traffic through a table of a tenth of the rows: not far from what the hottest tenth, known
    beforehand, would give."""
    memory = tier(Clock(), 1024 * WAYS * (ROW.itemsize + 64) // 4)
    draws = np.minimum(rng.zipf(1.2, 200_000), 10_000)
    for batch in draws.reshape(-1, 100):
        rows = np.unique(batch)
        found = memory.get(ids(*rows.tolist()))
        missing = rows[found.state == MISS]
        memory.put(
            ids(*missing.tolist()), np.zeros(len(missing), ROW), np.zeros(len(missing), bool), found.stamp
        )
    rate = memory.counters.hits / (memory.counters.hits + memory.counters.misses)
    asked = np.concatenate([np.unique(batch) for batch in draws.reshape(-1, 100)])
    best = np.sort(np.bincount(asked))[::-1][: memory.max_rows].sum() / len(asked)
    assert rate > 0.85 * best


@pytest.mark.timeout(60)
def test_threads_share_it():
    memory = tier(Clock(), 1 << 14)

    def work(seed: int) -> list[int]:
        mine, wrong = np.random.default_rng(seed), []
        for _ in range(300):
            rows = np.unique(mine.integers(1, 500, 20))
            found = memory.get(item_identities(rows))
            wrong.extend(rows[(found.state == FRESH) & (found.rows["value"] != rows * 3)].tolist())
            values = np.zeros(len(rows), ROW)
            values["value"] = rows * 3
            memory.put(item_identities(rows), values, np.zeros(len(rows), bool), found.stamp)
            memory.drop(item_identities(rows[:2]))
        return wrong

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [[]] * 4
    assert memory.counters.hits > 0
