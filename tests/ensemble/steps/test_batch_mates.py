"""A user's list is the same alone and among others, whatever they ask for, on every kind of index."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from random_release import BRANDS, SETTINGS, RandomRelease, make_release, open_recall, schema_of

from ensemble.options import Options, parse_options
from ensemble.steps.recall import Recall

ITEMS, USERS = 3000, 64
KINDS = {
    "Flat": (1, 0),
    "IVF32,Flat": (4, 0),
    "IVF32,PQ4x4fsr": (4, 4),
    "IVF32,PQ8x5": (4, 4),
    "IVF32,RaBitQ": (4, 8),
}
FILTERS = (
    {},
    {"deny": {"brand": ["brand0", "brand1"]}},
    {"allow": {"brand": ["brand2"], "tags": ["tag1"]}},
    {"allow": {"brand": ["no such brand"]}},
    {"deny": {"brand": list(BRANDS)}},
)
TOLERANCE = 1e-6  # of scores: sums in another order


def release_of(folder, rng, kind: str, interests: int = 1) -> RandomRelease:
    """A third of its items are the same to the encoder, as new items without features are."""
    nprobe, factor = KINDS[kind]
    settings = dataclasses.replace(SETTINGS, nprobe=nprobe, refine_factor=factor)
    twins = rng.choice(ITEMS, ITEMS // 3, replace=False)
    return make_release(
        folder, rng, num_items=ITEMS, num_users=200, index=kind, settings=settings, twins=twins,
        schema=schema_of(interests=interests),
    )  # fmt: skip


def asked_by(rng: np.random.Generator) -> list[dict]:
    """Everybody wants something else: filters, and exclusions of none to a thousand items."""
    lengths = np.where(rng.random(USERS) < 0.3, 0, rng.integers(0, 40, USERS))
    lengths[rng.integers(0, USERS, 4)] = 1000
    excluded = [[f"i{i:05}" for i in rng.choice(ITEMS, length, replace=False)] for length in lengths]
    every = [
        {**FILTERS[user % len(FILTERS)], "exclude_items": ids, "exclude_seen": bool(user % 3)}
        for user, ids in enumerate(excluded)
    ]
    return [every[user] for user in rng.permutation(USERS)]


def options_of(release: RandomRelease, asked: list[dict]) -> Options:
    defaults = {"exclude_seen": True, "exclude_items": [], "allow": {}, "deny": {}}
    each = {name: json.dumps([one.get(name, default) for one in asked]) for name, default in defaults.items()}
    return parse_options(json.dumps(each), len(asked), release.schema)


def answers(recall: Recall, options: Options, seen: np.ndarray, query: np.ndarray, size: int) -> dict:
    """All users' lists, asked for in batches of `size`."""
    parts = []
    for start in range(0, USERS, size):
        piece = slice(start, start + size)
        of = Options(options.users[piece])
        parts.append(recall.run(of, seen_rows=seen[piece], user_embeddings=query[piece]))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("interests", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_list_is_the_same_in_batches_of_any_size(tmp_path, rng, kind, interests):
    release = release_of(tmp_path, rng, kind, interests)
    recall, options = open_recall(release), options_of(release, asked_by(rng))
    seen = release.users["seen"][rng.integers(0, 200, USERS)].astype(np.int64)
    query = rng.standard_normal((USERS, interests, 8), dtype=np.float32)
    query[:8, 0] = release.items["embedding"][release.twins[0]]  # their lists end among equal scores
    alone = answers(recall, options, seen, query, 1)
    for size in (2, 7, 21, 64):
        together = answers(recall, options, seen, query, size)
        for name, array in alone.items():
            close = np.isclose(array, together[name], rtol=0, atol=TOLERANCE)
            users = np.flatnonzero(~close.reshape(USERS, -1).all(axis=1))
            assert not len(users), f"batches of {size}, {name}: users {users.tolist()} get something else"


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_is_the_same_whoever_else_is_there(tmp_path, rng, kind):
    """One who excludes a thousand items, and one whose list ends among equal scores, cost only themselves."""
    release = release_of(tmp_path, rng, kind)
    recall, plain = open_recall(release), [{}] * USERS
    query = rng.standard_normal((USERS, 1, 8), dtype=np.float32)
    seen = np.full((USERS, 12), -1)
    before = answers(recall, options_of(release, plain), seen, query, USERS)
    heavy = {"exclude_items": [f"i{i:05}" for i in rng.choice(ITEMS, 1000, replace=False)]}
    query[-1, 0] = release.items["embedding"][release.twins[0]]
    after = answers(recall, options_of(release, [*plain[:-1], heavy]), seen, query, USERS)
    for name, array in before.items():
        np.testing.assert_allclose(array[:-1], after[name][:-1], rtol=0, atol=TOLERANCE, err_msg=name)
