"""What lists show, against plain loops; how often what was foretold came true; what the data lacks."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from builders.data.dataset import Histories
from builders.verify.calibration import calibration
from builders.verify.shown import Lists, asked_lists, variety, variety_table
from ensemble.schema import Task

ITEMS = 30


@pytest.fixture
def dataset(rng):
    lengths = np.concatenate([[0], rng.integers(0, 9, 40)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = 1 + (rng.random(offsets[-1]) ** 2 * 20).astype(np.int64)
    histories = Histories(offsets, rows, np.zeros_like(rows), np.ones(len(rows), np.uint8))
    return SimpleNamespace(histories=histories, train_ends=offsets[1:], num_items=ITEMS)


def test_variety_is_what_loops_say(dataset, rng):
    rows = np.stack([rng.permutation(ITEMS)[:10] + 1 for _ in range(50)])
    rows[3, 4:] = rows[7, 1:] = rows[9] = -1
    embeddings = rng.normal(size=(ITEMS + 1, 8)).astype(np.float32)
    embeddings[5] = 0
    found = variety(dataset, embeddings, Lists(np.arange(50), {"chain": rows}))["ways"]["chain"]
    lists = [[item for item in row if item > 0] for row in rows.tolist()]
    every = [item for row in lists for item in row]
    assert found["items"] == len(set(every))
    assert found["coverage"] == len(set(every)) / ITEMS
    counts = sorted((every.count(item) for item in set(every)), reverse=True)
    half = next(n for n in range(1, ITEMS + 1) if sum(counts[:n]) >= len(every) / 2)
    assert found["half"] == half
    takers: dict[int, set[int]] = {}
    offsets = dataset.histories.offsets
    for user in range(len(offsets) - 1):
        for item in dataset.histories.item_rows[offsets[user] : offsets[user + 1]].tolist():
            takers.setdefault(item, set()).add(user)
    users = sum(offsets[user] < offsets[user + 1] for user in range(len(offsets) - 1))
    bits = [-math.log2((len(takers.get(item, ())) + 1) / (users + 1)) for item in every]
    assert found["novelty"]["value"] == pytest.approx(np.mean(bits))
    assert found["novelty"]["low"] < np.mean(bits) < found["novelty"]["high"]
    units = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    alike = [units[a] @ units[b] for row in lists for a, b in itertools.combinations(row, 2)]
    # the pair of an item without a vector is at distance 1
    assert found["diversity"]["value"] == pytest.approx(1 - np.mean(alike), abs=1e-5)


def test_nobody_asked_is_no_error(dataset):
    none = Lists(np.zeros(0, np.int64), {"chain": np.zeros((0, 10), np.int64)})
    found = variety(dataset, np.ones((ITEMS + 1, 2)), none)
    assert found["ways"]["chain"]["diversity"] is None
    assert variety_table(found, {})[1] == [["chain", "0", "0.0%", "0 items", "", ""]]


def test_each_user_is_asked_once_and_popular_lists_leave_out_what_was_had():
    class Verifier:
        popularity = np.arange(ITEMS + 1.0)

        def answer(self, user_rows, history_ends):
            shown = np.tile(np.arange(1, 7), (len(user_rows), 1))
            return SimpleNamespace(shown=shown, recalled=shown[:, ::-1], had=np.full((len(user_rows), 1), 29))

    targets = SimpleNamespace(user_rows=np.array([4, 2, 4]), history_ends=np.array([9, 8, 7]))
    lists = asked_lists(Verifier(), targets)
    assert sorted(lists.users.tolist()) == [2, 4]
    assert lists.ways["chain"][0].tolist() == [1, 2, 3, 4, 5, 6, -1, -1, -1, -1]
    assert lists.ways["recall"][0, :2].tolist() == [6, 5]
    assert lists.ways["popularity"][0].tolist() == [30, *range(28, 19, -1)]


def test_calibration_compares_what_was_foretold_with_what_came_true(rng):
    foretold = rng.random((5000, 2)).astype(np.float32)
    labels = (rng.random((5000, 2)) < foretold**2).astype(np.float32)  # too sure of itself
    labels[:100, 0] = np.nan
    tasks = (Task("click", "binary"), Task("dwell", "regression"))
    found = calibration(tasks, SimpleNamespace(labels=labels), foretold)
    assert list(found) == ["click"]
    points = found["click"]
    assert sum(point["rows"] for point in points) == 4900
    assert [point["rows"] for point in points] == [490] * 10
    assert all(point["rate"] == pytest.approx(point["foretold"] ** 2, abs=0.08) for point in points)
    assert points[5]["high"] < points[5]["foretold"]
    order = np.argsort(foretold[100:, 0])[:490]
    assert points[0]["rate"] == pytest.approx(labels[100:, 0][order].mean())
    few = calibration(tasks, SimpleNamespace(labels=labels[:101]), foretold[:101])
    assert few == {}, "one row is no point"
