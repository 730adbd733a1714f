"""Reranking against a slow reference that takes one user and one item at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from random_release import TASKS, RandomRelease, make_release

from ensemble.options import Options, parse_options
from ensemble.steps.reranking import Reranking

N, USERS = 24, 16


@pytest.fixture
def release(tmp_path, rng) -> RandomRelease:
    return make_release(tmp_path, rng)


@pytest.fixture
def reranking(release) -> Reranking:
    return Reranking(release.model("reranking"), release)


def candidates(rng: np.random.Generator, users: int = USERS, known: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows [B, N], the last N - known of them padding, and random values [B, N, T]."""
    rows = np.stack([rng.permutation(120)[:N] + 1 for _ in range(users)])
    rows[:, known:] = -1
    return rows, rng.random((users, N, len(TASKS)), dtype=np.float32)


def ask(release: RandomRelease, users: int = USERS, **parameters) -> Options:
    return parse_options(
        json.dumps({k: v if isinstance(v, (int, float)) else json.dumps(v) for k, v in parameters.items()}),
        users,
        release.schema,
    )


def run(
    reranking: Reranking, options: Options, rows: np.ndarray, values: np.ndarray
) -> dict[str, np.ndarray]:
    return reranking.run(
        options,
        candidate_rows=rows,
        candidate_probabilities=values,
        candidate_scores=np.zeros((*rows.shape, 3), np.float32),
        **status([[0]] * len(rows), [[0]] * len(rows)),
    )


def status(user: list[list[int]], candidates: list[list[int]]) -> dict[str, np.ndarray]:
    return {"user_status": np.array(user), "candidate_status": np.array(candidates)}


def blend(value: np.ndarray, weights: dict[str, float]) -> float:
    """ESMM: the conditional tasks' values count times P(click)."""
    ctr, cvr, dwell = (float(v) for v in value)
    return weights["ctr"] * ctr + weights["cvr"] * ctr * cvr + weights["dwell"] * ctr * dwell


def item_rows(release: RandomRelease, ids: np.ndarray) -> list[int]:
    return [row for row in release.item_ids.rows_from_ids(ids.astype("S")).tolist() if row]


@pytest.mark.parametrize(
    "weights", [{}, {"ctr": 0.0, "cvr": 1.0, "dwell": 0.0}, {"cvr": -3.0}, {"dwell": 5.0, "ctr": -1.0}]
)
def test_the_blend_is_over_the_entire_space_and_sorts(release, reranking, rng, weights):
    rows, values = candidates(rng)
    out = run(reranking, ask(release, top_k=10, weights=weights), rows, values)
    used = {**{t.name: t.weight for t in TASKS}, **weights}
    for user in range(USERS):
        scores = {int(row): blend(value, used) for row, value in zip(rows[user], values[user], strict=True)}
        best = sorted(scores, key=lambda row: (-scores[row], row))[:10]
        assert item_rows(release, out["item_ids"][user]) == best
        np.testing.assert_allclose(out["scores"][user], [scores[row] for row in best], rtol=1e-5, atol=1e-6)
        place = {int(row): n for n, row in enumerate(rows[user])}
        np.testing.assert_array_equal(out["probabilities"][user], values[user][[place[row] for row in best]])


def test_each_user_has_its_own_weights_and_top_k(release, reranking, rng):
    rows, values = candidates(rng, 2)
    options = ask(
        release, 2, top_k=[3, 7], weights=[{"ctr": 1, "cvr": 0, "dwell": 0}, {"ctr": 0, "cvr": 0, "dwell": 1}]
    )
    out = run(reranking, options, rows, values)
    assert out["item_ids"].shape == (2, 7)
    assert [len(item_rows(release, ids)) for ids in out["item_ids"]] == [3, 7]
    assert item_rows(release, out["item_ids"][0]) == rows[0][np.argsort(-values[0, :, 0])][:3].tolist()
    assert (
        item_rows(release, out["item_ids"][1])
        == rows[1][np.argsort(-values[1, :, 0] * values[1, :, 2])][:7].tolist()
    )
    assert not out["scores"][0, 3:].any()
    assert not out["probabilities"][0, 3:].any()
    assert out["item_ids"][0, 3:].tolist() == [b""] * 4


def test_equal_scores_come_in_order_of_rows(release, reranking, rng):
    rows, values = candidates(rng)
    values[:] = 0.25
    out = run(reranking, ask(release, top_k=24), rows, values)
    for user in range(USERS):
        assert item_rows(release, out["item_ids"][user]) == sorted(rows[user].tolist())


def test_padding_is_never_shown(release, reranking, rng):
    rows, values = candidates(rng, known=5)
    values[:, 5:] = 1e6
    for rule in ({}, {"diversity": 0.5}, {"caps": {"brand": 1}}):
        out = run(reranking, ask(release, top_k=10, **rule), rows, values)
        for user in range(USERS):
            assert set(item_rows(release, out["item_ids"][user])) == set(rows[user, :5].tolist())
            assert not out["scores"][user, 5:].any()
            assert out["item_ids"][user, 5:].tolist() == [b""] * 5


def test_a_list_of_nothing_is_empty(release, reranking, rng):
    rows, values = candidates(rng, known=0)
    for rule in ({}, {"diversity": 1.0, "caps": {"brand": 1}}):
        out = run(reranking, ask(release, **rule), rows, values)
        assert (out["item_ids"] == b"").all()
        assert not out["scores"].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_count_as_0(release, reranking, rng, bad):
    rows, values = candidates(rng)
    values[:, 3] = bad
    out = run(reranking, ask(release, top_k=24), rows, values)
    assert np.isfinite(out["scores"]).all()
    assert np.isfinite(out["probabilities"]).all()
    for user in range(USERS):
        assert item_rows(release, out["item_ids"][user])[-1] == rows[user, 3], "it is last, not lost"


@pytest.mark.parametrize("cap", [1, 2, 5])
def test_caps_hold_while_other_items_are_left(release, reranking, rng, cap):
    rows, values = candidates(rng)
    out = run(reranking, ask(release, top_k=24, caps={"brand": cap}), rows, values)
    plain = run(reranking, ask(release, top_k=24), rows, values)
    for user in range(USERS):
        chosen = item_rows(release, out["item_ids"][user])
        assert sorted(chosen) == sorted(rows[user].tolist()), "a capped item is put behind, never dropped"
        codes = release.items["codes"][:, 0]
        wanted, behind, count = [], [], dict.fromkeys(codes.tolist(), 0)
        for row in item_rows(release, plain["item_ids"][user]):  # best first
            full = codes[row] > 0 and count[codes[row]] >= cap
            (behind if full else wanted).append(row)
            count[codes[row]] += 1 if not full else 0
        assert chosen[: len(wanted)] == wanted
        assert sorted(chosen[len(wanted) :]) == sorted(behind)


def mmr(
    release: RandomRelease, rows: np.ndarray, scores: np.ndarray, diversity: float, top_k: int
) -> list[int]:
    """Carbonell & Goldstein 1998, one item at a time."""
    vectors = {
        int(row): release.items["embedding"][row] / np.linalg.norm(release.items["embedding"][row])
        for row in rows
    }
    relevance = dict(
        zip(rows.tolist(), ((scores - scores.min()) / (scores.max() - scores.min())).tolist(), strict=True)
    )
    chosen: list[int] = []
    while len(chosen) < top_k:
        left = [row for row in relevance if row not in chosen]
        utility = {
            row: (1 - diversity) * relevance[row]
            - diversity * max([0.0, *(float(vectors[row] @ vectors[other]) for other in chosen)])
            for row in left
        }
        chosen.append(max(left, key=lambda row: (utility[row], -row)))
    return chosen


@pytest.mark.parametrize("diversity", [0.1, 0.5, 0.9, 1.0])
def test_diversity_is_mmr(release, reranking, rng, diversity):
    rows, values = candidates(rng)
    out = run(reranking, ask(release, top_k=12, diversity=diversity), rows, values)
    plain = run(reranking, ask(release, top_k=12), rows, values)
    for user in range(USERS):
        scores = np.array([blend(value, {t.name: t.weight for t in TASKS}) for value in values[user]])
        found = item_rows(release, out["item_ids"][user])
        if diversity < 1:
            assert found == mmr(release, rows[user], scores, diversity, 12)
        assert len(set(found)) == 12
    assert (out["item_ids"] != plain["item_ids"]).any()


def test_rules_of_one_user_leave_its_batch_mates_alone(release, reranking, rng):
    rows, values = candidates(rng)
    plain = run(reranking, ask(release, top_k=10), rows, values)
    ruled = run(
        reranking,
        ask(release, top_k=10, diversity=[0.8 if u == 5 else 0.0 for u in range(USERS)]),
        rows,
        values,
    )
    same = (plain["item_ids"] == ruled["item_ids"]).all(axis=1)
    assert same.tolist() == [u != 5 for u in range(USERS)]


def test_the_answer_says_which_release_and_what_was_missing(release, reranking, rng):
    rows, values = candidates(rng, 2)
    out = reranking.run(
        ask(release, 2),
        candidate_rows=rows,
        candidate_probabilities=values,
        candidate_scores=np.zeros((*rows.shape, 3), np.float32),
        **status([[1], [16]], [[2], [0]]),
    )
    assert out["release"].tolist() == [[b"r1"], [b"r1"]]
    assert out["degraded"].tolist() == [[1 | 2], [16]]
