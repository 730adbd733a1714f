"""Recall against brute force: every candidate that should come out does, and no other."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from random_release import BRANDS, SETTINGS, RandomRelease, make_release, open_again, open_recall, schema_of

from ensemble.errors import ReleaseError
from ensemble.options import Options, UserOptions, default_options, parse_options
from ensemble.release.pasts import Older
from ensemble.steps.recall import Recall
from ensemble.steps.sources import Popular, Transitions

FILTERS = [
    {},
    {"deny": {"brand": ["brand0", "brand1"]}},
    {"allow": {"brand": ["brand2"], "tags": ["tag1"]}},
    {"allow": {"tags": ["tag0", "tag3"]}, "deny": {"brand": ["brand4"]}},
    {"allow": {"brand": ["no such brand"]}},
    {"deny": {"brand": list(BRANDS), "tags": []}},
]


def seen_rows_of(release: RandomRelease, users: np.ndarray) -> np.ndarray:
    return release.users["seen"][users].astype(np.int64)


def options_of(release: RandomRelease, per_user: list[dict]) -> Options:
    each = {
        name: json.dumps([one.get(name, default) for one in per_user]) for name, default in DEFAULTS.items()
    }
    return parse_options(json.dumps(each), len(per_user), release.schema)


DEFAULTS = {"exclude_seen": True, "exclude_items": [], "allow": {}, "deny": {}}


def random_options(rng: np.random.Generator, count: int, num_items: int) -> list[dict]:
    asked = []
    for user in range(count):
        excluded = [f"i{i:05}" for i in rng.integers(0, num_items, rng.integers(0, 40))] + ["unknown"]
        asked.append(
            {**FILTERS[user % len(FILTERS)], "exclude_items": excluded, "exclude_seen": bool(user % 3)}
        )
    return asked


def eligible_rows(release: RandomRelease, seen: np.ndarray, one: UserOptions) -> list[int]:
    """What may come out for one user, item by item."""
    vocabularies = release.vocabularies["items"]
    ids = release.item_ids.sorted_ids
    rows = []
    for row in range(1, len(release.items)):
        values = {name: _values(release, vocabularies, name, row) for name in vocabularies}
        allowed = all(values[name] & set(wanted) for name, wanted in one.allow)
        denied = any(values[name] & set(unwanted) for name, unwanted in one.deny)
        if (
            allowed
            and not denied
            and ids[row - 1] not in one.exclude_items
            and not (one.exclude_seen and row in seen)
        ):
            rows.append(row)
    return rows


def _values(release: RandomRelease, vocabularies: dict, name: str, row: int) -> set[str]:
    feature = release.schema.items.category(name)
    codes = release.items["codes"][row][feature.columns]
    return {vocabularies[name][code - feature.offset - 1] for code in codes if code > feature.offset}


def transition_scores(release: RandomRelease, recall: Recall, seen: np.ndarray) -> dict[int, float]:
    lists = np.load(release.path / "transitions.npy")
    scores: dict[int, float] = {}
    for back, row in enumerate(seen[::-1][: recall.settings.transition_items]):
        if row > 0:
            for item, score in zip(lists["rows"][row], lists["scores"][row], strict=True):
                if item > 0:
                    scores[int(item)] = scores.get(int(item), 0) + float(score) / (1 + back)
    return scores


def brute_force(
    release: RandomRelease, recall: Recall, query: np.ndarray, seen: np.ndarray, one: UserOptions
) -> list[int]:
    """The candidates of one user with one interest [1, D]: sources in turn, each offering within its quota
    first, then the rest."""
    eligible = eligible_rows(release, seen, one)
    inner = release.items["embedding"] @ query[0]
    moves = transition_scores(release, recall, seen)
    popularity = np.load(release.path / "popular.npy")
    offers = (
        sorted(eligible, key=lambda row: (-inner[row], row)),
        sorted((row for row in eligible if moves.get(row, 0) > 0), key=lambda row: (-moves[row], row)),
        sorted(eligible, key=lambda row: (-popularity[row], row)),
    )
    wanted, settings = recall.sizes.candidates, recall.settings
    quotas = (
        wanted - settings.quotas["transitions"] - settings.quotas["popular"],
        settings.quotas["transitions"],
        settings.quotas["popular"],
    )
    place: dict[int, tuple] = {}
    for source, rows in enumerate(offers):
        for rank, row in enumerate(rows):
            late = 0 if rank < quotas[source] else 2 if source == 2 else 1
            place[row] = min(place.get(row, (9,)), (late, rank, source))
    return sorted(place, key=lambda row: place[row])[:wanted]


def fused(release: RandomRelease, recall: Recall, query: np.ndarray, seen: np.ndarray, row: int) -> float:
    moves = transition_scores(release, recall, seen)
    popularity = np.load(release.path / "popular.npy")
    scores = ((query @ release.items["embedding"][row]).max(), np.log1p(moves.get(row, 0)), popularity[row])
    return float(np.dot(recall.settings.source_weights, scores))


def test_offers_merged_under_any_quotas_are_what_those_quotas_would_find(tmp_path, rng):
    """Who chooses quotas asks once; each choice is then what recall with it says, for every user."""
    release = make_release(tmp_path, rng, num_items=500)
    asking, users = open_recall(release), rng.integers(1, len(release.users), 30)
    seen, query = seen_rows_of(release, users), rng.standard_normal((30, 1, 8), dtype=np.float32)
    older = Older(np.repeat(np.arange(30), 4), rng.integers(1, 500, 120))
    asked = {"seen_rows": seen, "older": older, "user_embeddings": query}
    offers = asking.offers(default_options(30), **asked)
    found = []
    for quotas in ({"transitions": 8, "popular": 3}, {"transitions": 0, "popular": 12}, {"transitions": 20}):
        settings = dataclasses.replace(SETTINGS, quotas=quotas)
        (release.path / "recall.json").write_text(settings.to_json())
        recall = open_recall(open_again(release))
        found.append(np.sort(recall.run(default_options(30), **asked)["candidate_rows"], axis=1))
        np.testing.assert_array_equal(np.sort(asking.merged(offers, quotas), axis=1), found[-1])
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize("whole_numbers", [False, True], ids=["distinct scores", "many ties"])
def test_candidates_are_those_of_brute_force(tmp_path, rng, whole_numbers):
    release = make_release(tmp_path, rng, num_items=500, whole_numbers=whole_numbers)
    recall = open_recall(release)
    users = rng.integers(0, len(release.users), 48)
    seen = seen_rows_of(release, users)
    query = (
        rng.integers(-2, 3, (48, 1, 8)).astype(np.float32)
        if whole_numbers
        else rng.standard_normal((48, 1, 8), dtype=np.float32)
    )
    options = options_of(release, random_options(rng, 48, 500))
    found = recall.run(options, seen_rows=seen, user_embeddings=query)["candidate_rows"]
    for user in range(48):
        wanted = brute_force(release, recall, query[user], seen[user], options.users[user])
        assert sorted(found[user][found[user] > 0].tolist()) == sorted(wanted), (
            f"user {user}: {options.users[user]}"
        )


@pytest.mark.parametrize("index", ["Flat", "IVF16,Flat"])
@pytest.mark.parametrize("interests", [1, 4])
def test_what_comes_out_is_eligible_distinct_full_and_in_order(tmp_path, rng, index, interests):
    release = make_release(tmp_path, rng, index=index, schema=schema_of(interests=interests))
    recall = open_recall(release)
    users = rng.integers(0, len(release.users), 48)
    seen = seen_rows_of(release, users)
    query = rng.standard_normal((48, interests, 8), dtype=np.float32)
    options = options_of(release, random_options(rng, 48, 120))
    found = recall.run(options, seen_rows=seen, user_embeddings=query)
    for user, rows in enumerate(found["candidate_rows"].tolist()):
        eligible = eligible_rows(release, seen[user], options.users[user])
        shown = [row for row in rows if row != -1]
        assert set(shown) <= set(eligible)
        assert len(shown) == len(set(shown)) == min(len(eligible), recall.sizes.candidates)
        assert rows == shown + [-1] * (len(rows) - len(shown)), "padding is last"
        scores = [fused(release, recall, query[user], seen[user], row) for row in shown]
        assert all(a > b - 1e-5 for a, b in itertools.pairwise(scores))
        np.testing.assert_allclose(
            found["candidate_features"][user][: len(shown)], release.items["features"][shown]
        )
        for name in ("candidate_features", "candidate_scores"):
            assert not found[name][user][len(shown) :].any(), f"{name} is 0 where padded"


def test_equal_scores_come_in_order_of_rows(tmp_path, rng):
    release = make_release(
        tmp_path,
        rng,
        whole_numbers=True,
        settings=dataclasses.replace(SETTINGS, source_weights=(1.0, 0.0, 0.0)),
    )
    recall = open_recall(release)
    query = rng.integers(-1, 2, (30, 1, 8)).astype(np.float32)
    rows = recall.run(Options((UserOptions(),) * 30), seen_rows=np.full((30, 12), -1), user_embeddings=query)[
        "candidate_rows"
    ]
    scores = np.einsum("bnd,bd->bn", release.items["embedding"][rows], query[:, 0])
    same = scores[:, :-1] == scores[:, 1:]
    assert same.mean() > 0.3
    assert (rows[:, 1:] > rows[:, :-1])[same].all()


@pytest.mark.parametrize("index", ["Flat", "IVF16,Flat"])
def test_a_batch_is_the_same_as_its_users_one_by_one(tmp_path, rng, index):
    release = make_release(tmp_path, rng, index=index, whole_numbers=True)
    recall = open_recall(release)
    seen = seen_rows_of(release, rng.integers(0, len(release.users), 64))
    query = rng.integers(-2, 3, (64, 1, 8)).astype(np.float32)
    options = options_of(release, random_options(rng, 64, 120))
    together = recall.run(options, seen_rows=seen, user_embeddings=query)
    for user in range(64):
        alone = recall.run(
            Options(options.users[user : user + 1]),
            seen_rows=seen[user : user + 1],
            user_embeddings=query[user : user + 1],
        )
        for name, array in alone.items():
            np.testing.assert_array_equal(array[0], together[name][user], err_msg=f"user {user}: {name}")


@pytest.mark.parametrize("left", [0, 1, 3])
def test_filters_that_leave_few_are_exact(tmp_path, rng, left):
    release = make_release(tmp_path, rng, index="IVF16,Flat")
    recall = open_recall(release)
    kept = rng.permutation(120)[:left]
    options = options_of(release, [{"exclude_items": [f"i{i:05}" for i in range(120) if i not in kept]}])
    rows = recall.run(
        options,
        seen_rows=np.full((1, 12), -1),
        user_embeddings=rng.standard_normal((1, 1, 8), dtype=np.float32),
    )["candidate_rows"]
    assert sorted(rows[rows > 0].tolist()) == sorted((kept + 1).tolist())


def test_a_catalogue_smaller_than_n_is_all_there(tmp_path, rng):
    release = make_release(tmp_path, rng, num_items=10)
    seen = seen_rows_of(release, np.arange(1, 20))
    rows = open_recall(release).run(
        Options((UserOptions(exclude_seen=False),) * 19),
        seen_rows=seen,
        user_embeddings=np.ones((19, 1, 8), np.float32),
    )
    for one in rows["candidate_rows"]:
        assert sorted(one[one > 0].tolist()) == list(range(1, 11))


def test_padding_is_never_gathered(tmp_path, rng):
    """Rows 0 and -1 of every table are poisoned: nothing of them may show."""
    release = make_release(tmp_path, rng)
    recall = open_recall(release)
    poisoned = np.array(release.items)
    poisoned["embedding"][0] = poisoned["features"][0] = np.nan
    recall.item_reader.table = poisoned
    options = options_of(release, [{"allow": {"brand": ["brand2"]}}, {"allow": {"brand": ["none"]}}, {}])
    found = recall.run(
        options,
        seen_rows=np.full((3, 12), -1),
        user_embeddings=rng.standard_normal((3, 1, 8), dtype=np.float32),
    )
    assert (found["candidate_rows"] == -1).any()
    for name in ("candidate_features", "candidate_scores"):
        assert np.isfinite(found[name]).all()


def test_every_source_has_its_place(tmp_path, rng):
    """What only transitions offer comes out up to their quota, and so does the most popular item."""
    release = make_release(tmp_path, rng)
    recall = open_recall(release)
    seen = seen_rows_of(release, np.arange(2, 30))
    query = rng.standard_normal((28, 1, 8), dtype=np.float32)
    rows = recall.run(
        Options((UserOptions(exclude_seen=False),) * 28), seen_rows=seen, user_embeddings=query
    )["candidate_rows"]
    offered, scores = recall.source(Transitions).followers(seen)
    popular = recall.source(Popular).rows[: recall.settings.quotas["popular"]]
    for user in range(28):
        best = offered[user][scores[user] > 0][: recall.settings.quotas["transitions"]]
        assert set(best.tolist()) <= set(rows[user].tolist())
        assert set(popular.tolist()) <= set(rows[user].tolist())


def test_the_popular_of_a_rare_category_come_however_far_down_they_are(tmp_path, rng):
    release = make_release(tmp_path, rng, num_items=2000)
    recall = open_recall(release)
    options = options_of(release, [{"allow": {"brand": ["brand2"], "tags": ["tag1"]}}] * 8)
    rows = recall.run(
        options,
        seen_rows=np.full((8, 12), -1),
        user_embeddings=rng.standard_normal((8, 1, 8), dtype=np.float32),
    )["candidate_rows"]
    popularity = np.load(release.path / "popular.npy")
    passing = sorted(
        eligible_rows(release, np.zeros(0), options.users[0]), key=lambda row: (-popularity[row], row)
    )
    assert len(passing) > 2 * recall.sizes.candidates
    for user in range(8):
        assert set(passing[: recall.settings.quotas["popular"]]) <= set(rows[user].tolist())


@pytest.mark.parametrize("content", [b"", b"IxFI", b"nonsense" * 100])
def test_a_broken_index_is_a_release_error(tmp_path, rng, content):
    release = make_release(tmp_path, rng)
    (release.path / "index.faiss").write_bytes(content)
    with pytest.raises(ReleaseError, match=r"^cannot open .*index\.faiss: "):
        open_recall(release)


def test_an_index_of_other_items_is_refused(tmp_path, rng):
    release, other = make_release(tmp_path / "a", rng), make_release(tmp_path / "b", rng, num_items=119)
    (release.path / "index.faiss").write_bytes((other.path / "index.faiss").read_bytes())
    with pytest.raises(
        ReleaseError, match=r"has 119 vectors of 8, metric 0; the release has 120 of 8, inner product$"
    ):
        open_recall(release)


def test_a_release_without_numbers_is_refused_when_it_is_loaded(tmp_path, rng):
    """Not by every request of a batch in which one asks for a range."""
    release = make_release(tmp_path, rng)
    (release.path / "numbers.npy").unlink()
    with pytest.raises(ReleaseError, match=r"numbers\.npy"):
        open_recall(release)


def test_who_asks_for_what_he_had_gets_it_by_how_often(tmp_path, rng):
    release = make_release(tmp_path, rng, num_items=500)
    often = dataclasses.replace(SETTINGS, again=2.0)
    users = rng.integers(0, len(release.users), 24)
    seen = seen_rows_of(release, users)
    seen[:, -6:] = seen[:, -1:]  # whoever has a past had one item several times
    query = rng.standard_normal((24, 1, 8), dtype=np.float32)
    options = options_of(release, [{"exclude_seen": bool(user % 3)} for user in range(24)])
    recall = open_recall(release)
    before = recall.run(options, seen_rows=seen, user_embeddings=query)
    recall.settings = often
    found = recall.run(options, seen_rows=seen, user_embeddings=query)
    alone = recall.run(options.of(np.arange(3)), seen_rows=seen[:3], user_embeddings=query[:3])
    for name in ("candidate_rows", "candidate_scores"):
        np.testing.assert_array_equal(found[name][:3], alone[name], "whoever asks beside them")
        np.testing.assert_array_equal(*(of[name][options.exclude_seen] for of in (before, found)))
    for user in np.flatnonzero(~options.exclude_seen):
        rows, counts = np.unique(seen[user][seen[user] > 0], return_counts=True)
        most = rows[np.lexsort((rows, -counts))][: recall.sizes.candidates // 2]
        shown = found["candidate_rows"][user].tolist()
        assert set(most.tolist()) <= set(shown)
        moves = transition_scores(release, recall, seen[user])
        had = dict(zip(rows.tolist(), counts.tolist(), strict=True))
        expected = [np.log1p(moves.get(row, 0)) + 2 * np.log1p(had.get(row, 0)) for row in shown if row > 0]
        np.testing.assert_allclose(
            found["candidate_scores"][user][: len(expected), 1], expected, rtol=1e-5, atol=1e-6
        )
