"""The features step: stored past and session become one history."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from random_release import RandomRelease, make_release, schema_of

from ensemble.arrays import ranks_within
from ensemble.contract import Degraded
from ensemble.options import parse_options
from ensemble.release.events import FIELDS, GAPS, events_file
from ensemble.steps.features import FeatureLookup


@pytest.fixture
def release(tmp_path, rng) -> RandomRelease:
    return make_release(tmp_path, rng)


@pytest.fixture
def features(release) -> FeatureLookup:
    return FeatureLookup(release.model("features"), release)


def run(
    features: FeatureLookup, release: RandomRelease, users: list[str], sessions: list[list[str]] | None = None
) -> dict[str, np.ndarray]:
    parameters = {} if sessions is None else {"session_items": json.dumps(sessions)}
    return features.run(
        parse_options(json.dumps(parameters), len(users), release.schema),
        user_id=np.array([[u.encode()] for u in users]),
    )


def past(release: RandomRelease, user: int) -> list[int]:
    """Item rows of user u<user>'s stored past."""
    seen = release.users["seen"][user + 1]
    return seen[seen > 0].tolist()


def test_the_session_comes_behind_the_past_and_the_oldest_fall_out(release, features, rng):
    users = rng.integers(0, 40, 60).tolist()
    sessions = [[f"i{i:05}" for i in rng.integers(0, 120, rng.integers(0, 20))] for _ in users]
    out = run(features, release, [f"u{u:05}" for u in users], sessions)
    for n, (user, session) in enumerate(zip(users, sessions, strict=True)):
        whole = (past(release, user) + [int(i[1:]) + 1 for i in session])[-12:]
        assert out["seen_rows"][n].tolist() == [-1] * (12 - len(whole)) + whole
        assert out["history_mask"][n].tolist() == [row > 0 for row in out["seen_rows"][n, -5:]]
        for place, row in enumerate(out["seen_rows"][n, -5:]):
            for name, field in (("history_embeddings", "embedding"), ("history_features", "features")):
                wanted = release.items[field][row] if row > 0 else np.zeros(release.items[field].shape[1])
                np.testing.assert_array_equal(out[name][n, place], wanted)
    assert not out["user_status"].any()


def test_what_events_add_is_in_the_history_and_padding_stays_0(tmp_path, rng):
    schema = replace(schema_of(), events=("view", "buy"))
    release = make_release(tmp_path, rng, schema=schema)
    asked = release, ["u00001", "nobody"], [["i00004", "i00005"], []]
    plain = run(FeatureLookup(release.model("features"), release), *asked)
    there = plain["history_mask"][0]
    for field in FIELDS:
        name = {"embedding": "history_embeddings", "features": "history_features"}[field]
        table = rng.standard_normal(((len(schema.events) + 1) * GAPS, release.items[field].shape[1])).astype(
            np.float32
        )
        table[:GAPS] = 0
        np.save(events_file(release.path, field), table)
        added = run(FeatureLookup(release.model("features"), release), *asked)[name] - plain[name]
        # the session's last item: of the first kind, in the second of the one before
        np.testing.assert_allclose(added[0, -1], table[GAPS], atol=1e-6)
        assert not added[1].any()
        assert added[0][there].any(1).all()
        assert not added[0][~there].any()


def test_unknown_items_of_a_session_are_dropped_and_flagged(release, features):
    out = run(
        features,
        release,
        ["u00001", "u00001", "u00001"],
        [["i00004", "nothing", "i00007"], ["nothing"], ["i00004", "i00007"]],
    )
    assert out["seen_rows"][0].tolist() == out["seen_rows"][2].tolist()
    assert out["seen_rows"][0, -2:].tolist() == [5, 8]
    assert [x for x in out["seen_rows"][1].tolist() if x > 0] == past(release, 1)
    assert out["user_status"].tolist() == [[Degraded.UNKNOWN_ITEMS], [Degraded.UNKNOWN_ITEMS], [0]]


def test_an_unknown_user_has_the_unknown_row_and_may_still_have_a_session(release, features):
    out = run(features, release, ["nobody", "", "u00005", "nobody"], [[], [], [], ["i00000", "x"]])
    assert out["user_status"].ravel().tolist() == [1, 1, 0, 1 | 16]
    assert (out["seen_rows"][:2] == -1).all()
    assert not out["history_mask"][:2].any()
    assert not out["history_embeddings"][:2].any()
    assert not out["history_features"][:2].any()
    assert not out["user_features"][[0, 1, 3]].any()
    assert out["user_features"][2].any()
    assert out["seen_rows"][3, -1] == 1


def test_a_known_user_without_a_past_is_no_unknown_user(release, features):
    out = run(features, release, ["u00000"])
    assert out["user_status"].tolist() == [[0]]
    assert (out["seen_rows"] == -1).all()


def test_a_longer_id_is_not_the_user_whose_id_it_begins_with(release, features):
    assert run(features, release, ["u000010"])["user_status"].tolist() == [[1]]


def test_tensors_have_the_contracts_dtypes_and_shapes(release, features):
    model = release.model("features")
    out = run(features, release, ["u00001", "nobody"], [["i00001"], []])
    assert set(out) == {spec.name for spec in model.outputs}
    for spec in model.outputs:
        assert (out[spec.name].dtype.name, out[spec.name].shape) == (spec.dtype, (2, *spec.dims)), spec.name


def test_a_session_of_the_longest_kind_keeps_its_newest(release, features):
    out = run(features, release, ["u00001"], [[f"i{i % 120:05}" for i in range(1000)]])
    assert out["seen_rows"][0].tolist() == [i % 120 + 1 for i in range(988, 1000)]


def test_ranks_within_counts_from_0_for_each_owner():
    assert ranks_within(np.array([0, 0, 2, 5, 5, 5])).tolist() == [0, 1, 0, 0, 1, 2]
    assert ranks_within(np.zeros(0, np.int64)).tolist() == []
