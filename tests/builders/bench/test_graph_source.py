"""What a graph adds to recall: ties against plain loops, parts that know no tie of their own; the bench."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from shops import write_sequences_shop

from builders.bench.graph_network import PARTS, Events, learn, random_start, ties
from builders.bench.graph_source import crossing, main, with_best
from builders.data.dataset import Histories, Targets
from builders.encoders.sequences import Sequences

ITEMS = 12


def events(rng, *, clock):
    lengths = rng.integers(0, 12, 60)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = np.concatenate([np.sort(rng.integers(0, 1000, n)) for n in lengths])
    rows = rng.integers(1, ITEMS + 1, offsets[-1])
    return Events(Sequences(offsets, rows), times if clock else None)


@pytest.mark.parametrize("clock", [True, False])
def test_a_step_takes_a_known_tie_by_distance_and_age(rng, clock):
    of = events(rng, clock=clock)
    offsets, rows, known = of.sequences.offsets, of.sequences.rows, rng.random(len(of.sequences.rows)) < 0.7
    expected = np.zeros((ITEMS + 1, ITEMS + 1))
    half_life = np.ptp(of.times) / 4 if clock else np.inf
    for begin, end in itertools.pairwise(offsets):
        for first in range(begin, end):
            for second in range(first + 1, min(end, first + 9)):
                if known[first] and known[second] and rows[first] != rows[second]:
                    age = 1000 - of.times[second] if clock else 0
                    weight = 0.5 ** (age / half_life) / (second - first)
                    expected[rows[first], rows[second]] += weight
                    expected[rows[second], rows[first]] += weight
    expected /= np.maximum(expected.sum(1, keepdims=True), 1e-9)
    np.testing.assert_allclose(ties(of, known, 1000, ITEMS).to_dense(), expected, atol=1e-5)


def test_parts_are_in_time_where_there_is_a_clock_and_whole_users_elsewhere(rng):
    of = events(rng, clock=True)
    ends = [(of.times[of.parts() == at].min(), of.times[of.parts() == at].max()) for at in range(PARTS)]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))
    of = events(rng, clock=False)
    for begin, end in itertools.pairwise(of.sequences.offsets):
        assert len(set(of.parts()[begin:end])) <= 1


def test_a_network_learns_what_is_taken_together(rng):
    """Users keep to one half of the items."""
    half = rng.integers(0, 2, 300)
    rows = (rng.integers(1, 7, (300, 6)) + 6 * half[:, None]).ravel()
    scores, losses = learn(
        Events(Sequences(np.arange(0, 1801, 6), rows), None), random_start(ITEMS, 16, 0), updates=25
    )
    assert losses[-1] < losses[0]
    asked = scores(np.array([[-1, 2], [3, 9]]))
    assert asked[0, 1:7].min() > asked[0, 7:].max()
    assert asked[1, 7:].mean() > asked[1, 1:7].mean(), "the newest click counts most"


def test_the_best_new_items_take_the_last_places():
    rows = np.arange(1, 41)[None]
    scores = np.arange(101.0)[None]
    out = with_best(rows, scores, np.array([[100, 8]]))
    assert out[0, :8].tolist() == list(range(1, 9))
    assert sorted(out[0, 8:].tolist()) == list(range(68, 100))


def test_a_target_crosses_categories_by_the_attributes_that_few_items_have():
    codes = np.zeros((ITEMS + 1, 2), np.int32)
    codes[1:, 0] = 1  # all have it: it tells nothing
    codes[[1, 2], 1], codes[[3, 4], 1] = 2, 3
    feature = SimpleNamespace(kind="category", start=0, width=2)
    histories = Histories(np.array([0, 0, 3, 6]), np.array([1, 3, 2, 3, 3, 1]), np.arange(6), np.ones(6))
    dataset = SimpleNamespace(
        schema=SimpleNamespace(items=SimpleNamespace(features=(feature,))),
        item_codes=codes,
        num_items=ITEMS,
        histories=histories,
    )
    of = crossing(dataset, Targets(np.array([1, 2]), np.array([2, 5]), np.array([2, 1])))
    assert of["unlike the last item"].tolist() == [True, True]
    assert of["unlike all of the past"].tolist() == [False, True]


def test_walks_and_networks_stand_beside_today(tmp_path, capsys):
    shop = tmp_path / "shop"
    write_sequences_shop(shop, users=250, items=120)
    out = ["--out", str(tmp_path / "out"), "--preset", "tiny", "--set", "encoders.epochs=2"]
    out += ["--updates", "12", "--starts", "encoders"]
    with pytest.raises(SystemExit):
        main([str(shop), *out])
    assert "has no source walks" in capsys.readouterr().err
    toml = shop / "shop.toml"
    sources = '["user_embeddings", "transitions", "popular", "walks"]'
    toml.write_text(toml.read_text() + f"\n[recall]\nsources = {sources}\n")
    main([str(shop), *out])
    printed = capsys.readouterr().out
    told = json.loads(printed[printed.index("{") :])
    assert set(told["test"]["all"]) == {"targets", *told["ways"]}
    for way, weighs in told["ways"].items():
        assert len(weighs["weights"]) == 3 + ("walks" in way) + ("network" in way or "more" in way)
        assert 0 < float(told["test"]["all"][way]["recall"].split(",")[0]) <= 1
    crossed = told["test"]["unlike all of the past"]["targets"]
    assert crossed <= told["test"]["unlike the last item"]["targets"] < told["test"]["all"]["targets"]
