"""What users had long ago is shown to nobody again, also where a row of the snapshot no longer holds it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from random_release import RandomRelease, make_release, open_recall

from builders.data.dataset import Histories
from builders.index import snapshot
from builders.index.snapshot import older_pasts, write_older
from ensemble.options import default_options, parse_options
from ensemble.release.pasts import ENDS, ROWS, Pasts, ragged
from ensemble.steps.features import FeatureLookup

OLD = {3: [5, 9, 60], 7: [11], 40: [2, 3]}  # user row -> item rows of before


def release_of(folder, rng) -> RandomRelease:
    release = make_release(folder, rng)
    lengths = [len(OLD.get(user, [])) for user in range(41)]
    np.save(release.path / ENDS, np.cumsum(lengths))
    np.save(release.path / ROWS, np.array([row for user in sorted(OLD) for row in OLD[user]], np.int32))
    return release


def ids_of(users: list[int]) -> np.ndarray:
    return np.array([[f"u{user - 1:05}".encode()] for user in users])


def test_what_a_user_had_long_ago_does_not_come_again(tmp_path, rng):
    release = release_of(tmp_path, rng)
    recall, users = open_recall(release), [3, 4, 7, 40]
    seen = np.full((4, 12), -1)
    query = np.stack([release.items["embedding"][OLD.get(user, [1])].sum(0) for user in users])[:, None]
    asked = {"seen_rows": seen, "user_embeddings": query.astype(np.float32)}
    before = recall.run(default_options(4), **asked)["candidate_rows"]
    after = recall.run(default_options(4), user_id=ids_of(users), **asked)["candidate_rows"]
    for place, user in enumerate(users):
        old = set(OLD.get(user, []))
        assert not old & set(after[place].tolist())
        assert (after[place] > 0).all(), "the list is as long as ever"
        if not old:
            np.testing.assert_array_equal(after[place], before[place])
    assert set(OLD[3]) & set(before[0].tolist())
    again = parse_options(json.dumps({"exclude_seen": False}), 4, release.schema)
    np.testing.assert_array_equal(recall.run(again, user_id=ids_of(users), **asked)["candidate_rows"], before)


def test_what_live_events_pushed_out_of_a_row_is_left_out_too(tmp_path, rng):
    """Redis has a newer row than the release; what stood in the release's own is still known."""
    release = release_of(tmp_path, rng)
    own = np.flatnonzero((release.users["seen"] > 0).sum(axis=1) >= 3)[0]
    pasts, newer = Pasts(release), np.arange(100, 112)[None]
    older = pasts.older(ids_of([int(own)])[:, 0], newer)
    stored = release.users["seen"][own]
    assert {*stored[stored > 0].tolist()} <= set(older.rows.tolist())
    short = np.concatenate([[-1], newer[0, 1:]])[None]  # nothing can have been pushed out of this one
    assert set(pasts.older(ids_of([int(own)])[:, 0], short).rows.tolist()) == set(OLD.get(int(own), []))


def test_an_unknown_user_and_a_release_without_the_files_have_no_older_past(tmp_path, rng):
    seen = np.full((2, 12), 1)
    known = Pasts(release_of(tmp_path / "a", rng))
    assert not len(known.older(np.array([b"nobody", b"else"]), seen).rows)
    bare = Pasts(make_release(tmp_path / "b", rng))
    assert not len(bare.older(ids_of([3, 7])[:, 0], seen).rows)


def test_the_chain_leaves_out_the_whole_past_of_a_stored_user(tmp_path, rng):
    release = release_of(tmp_path, rng)
    features = FeatureLookup(release.model("features"), release)
    known = features.run(default_options(2), user_id=ids_of([3, 7]))
    query = release.items["embedding"][[5, 11]][:, None]
    tensors = {name: known[name] for name in ("seen_rows", "seen_kinds", "seen_recencies")}
    found = open_recall(release).run(
        default_options(2), user_id=ids_of([3, 7]), user_embeddings=query.astype(np.float32), **tensors
    )["candidate_rows"]
    for place, user in enumerate((3, 7)):
        had = {*OLD[user], *known["seen_rows"][place].tolist()} - {-1}
        assert not had & set(found[place].tolist())


def dataset_of(rng, num_users: int = 30, seen: int = 5):
    lengths = rng.integers(0, 20, num_users + 1)
    lengths[0] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = rng.integers(1, 40, offsets[-1])
    histories = Histories(offsets, rows, np.arange(offsets[-1]), np.ones(offsets[-1], np.uint8))
    schema = SimpleNamespace(sizes=SimpleNamespace(seen=seen))
    ends = offsets[:-1] + (lengths * 0.9).astype(np.int64)
    return SimpleNamespace(histories=histories, known_ends=ends, num_users=num_users, schema=schema)


@pytest.mark.parametrize(("piece", "most"), [(1 << 16, 10_000), (7, 10_000), (7, 4)])
def test_what_is_written_is_what_stands_before_the_last_items_once_each(
    tmp_path, rng, monkeypatch, piece, most
):
    monkeypatch.setattr(snapshot, "_PIECE", piece)
    monkeypatch.setattr(snapshot, "MOST", most)
    dataset = dataset_of(rng)
    write_older(dataset, tmp_path)
    ends, rows = np.load(tmp_path / ENDS), np.load(tmp_path / ROWS)
    assert len(ends) == 31
    found = np.split(rows, ends[:-1])
    for user in range(31):
        begin, end = int(dataset.histories.offsets[user]), int(dataset.known_ends[user])
        past = dataset.histories.item_rows[begin:end].tolist()[:-5][-most:]
        assert found[user].tolist() == sorted(set(past)), f"user {user}"
    assert len(rows) > 50


def test_of_a_past_time_only_what_was_before_it_counts(rng):
    dataset = dataset_of(rng)
    users = np.array([4, 9, 9])
    ends = dataset.histories.offsets[users] + np.array([3, 7, 9])
    ends = np.minimum(ends, dataset.histories.offsets[users + 1])
    older = older_pasts(dataset, users, ends)
    for place, (user, end) in enumerate(zip(users, ends, strict=True)):
        past = dataset.histories.item_rows[dataset.histories.offsets[user] : end].tolist()
        assert older.rows[older.owners == place].tolist() == past[:-5]


def test_ranges_are_listed_behind_each_other():
    owners, places = ragged(np.array([3, 9, 4, 2]), np.array([5, 9, 7, 1]))
    assert owners.tolist() == [0, 0, 2, 2, 2]
    assert places.tolist() == [3, 4, 4, 5, 6]
