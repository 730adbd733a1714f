"""A photo finds items without a picture by their texts only where that gains, and does not cost
too much."""

from __future__ import annotations

import json

import numpy as np
import pytest

from builders.search.page import told_lines
from builders.search.shown import WEIGHTS
from builders.search.told import Photos, choose

AT = WEIGHTS.index(1.6)


def photos(hidden: int, stays: float, judging: int | None = None) -> Photos:
    """80 hidden items that are found at place `hidden` under one weight, and nowhere under the others; of 80
    others so much of the first ten stays under it. `judging`: the place on the half that judges."""
    places, kept = np.full((80, len(WEIGHTS)), 500), np.full((80, len(WEIGHTS)), 0.9)
    places[:, AT], kept[:, AT] = hidden, stays
    places[1::2, AT] = hidden if judging is None else judging
    return Photos(places, kept)


def test_the_weight_that_finds_most_is_taken():
    weight, report = choose(photos(2, 0.9))
    assert weight == 1.6
    assert report["on"]
    assert report["hidden"]["with"] == pytest.approx(0.5)
    assert report["hidden"]["in_first_ten"] == 1
    (line,) = told_lines({"told": json.loads(json.dumps(report))})
    assert line.startswith("A photo finds items without a picture by their texts: NDCG@10")


@pytest.mark.parametrize(
    "found",
    [photos(500, 0.9), photos(2, 0.5), photos(2, 0.9, judging=500)],
    ids=["nothing is gained", "it costs too much", "the other half does not bear it out"],
)
def test_what_gains_nothing_or_costs_too_much_is_off(found):
    weight, report = choose(found)
    assert weight == 0
    assert not report["on"]
    assert told_lines({"told": report})[0].startswith("A photo does not find items without a picture")


def test_no_space_says_nothing():
    assert told_lines({}) == told_lines({"told": {}}) == []


def test_a_build_asks_hidden_pictures_and_says_what_they_found(pictured_release):
    report = pictured_release.manifest["report"]["search"]["told"]
    assert report["queries"] > 8
    assert 0 <= report["hidden"]["without"] <= report["hidden"]["with"] <= 1
    assert report["first_ten_stay"]["without"] > 0.5
