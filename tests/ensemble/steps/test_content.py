"""The content source against brute force: what is like the last items comes, taken by anybody or not."""

from __future__ import annotations

import dataclasses
import json

import faiss
import numpy as np
import pytest
from item_changes import random_changes
from random_release import (
    SETTINGS,
    RandomRelease,
    make_release,
    open_again,
    open_recall,
    schema_of,
    write_item_encoder,
)

from ensemble.live.merge import merge
from ensemble.live.writer import ItemWriter
from ensemble.options import Options, UserOptions, default_options, parse_options
from ensemble.schema import DEFAULT_SOURCES, RecallSource
from ensemble.steps.content import INDEX, TABLE, VECTORS, Content, content_vectors
from ensemble.steps.recall import Recall
from ensemble.steps.sources import Batch

ITEMS, E, QUOTA = 120, 6, 5


def content_release(folder, rng, index: str = "Flat") -> RandomRelease:
    """A random release with a fourth source: random weights of its codes."""
    schema = dataclasses.replace(schema_of(), sources=(*DEFAULT_SOURCES, RecallSource("content", 0.2)))
    settings = dataclasses.replace(
        SETTINGS,
        quotas={**SETTINGS.quotas, "content": QUOTA},
        source_weights=(1.0, 0.5, 0.1, 2.0),
        content_items=4,
        content_nprobe=8,
    )
    release = make_release(folder, rng, num_items=ITEMS, schema=schema, settings=settings)
    table = rng.standard_normal((schema.items.num_codes, E), dtype=np.float32)
    table[0] = 0
    vectors = content_vectors(table, release.items["codes"]).astype(np.float16)
    np.save(release.path / TABLE, table)
    np.save(release.path / VECTORS, vectors)
    found = faiss.index_factory(E, index, faiss.METRIC_INNER_PRODUCT)
    found.train(vectors[1:].astype(np.float32))
    found.add(vectors[1:].astype(np.float32))
    faiss.write_index(found, str(release.path / INDEX))
    return release


def truth(recall: Recall, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every item's score for each user [B, rows], by the codes that it has now, and which items are there."""
    view = recall.live.refresh()
    table = np.load(recall.source(Content)._table.filename)
    rows = np.arange(view.num_rows)
    vectors = content_vectors(table, view.gather(rows, "codes"))
    vectors[0] = 0
    last = seen[:, -recall.settings.content_items :]
    known = (last > 0)[..., None]
    query = (vectors[np.maximum(last, 0)] * known).sum(1) / np.maximum(known.sum(1), 1)
    return query @ vectors.T, (rows > 0) & ~view.is_deleted(rows)


def offers_are_the_best(recall: Recall, seen: np.ndarray, options: Options) -> None:
    """All that is better than the last item that is offered is offered, but for half precision."""
    scores, there = truth(recall, seen)
    view = recall.live.view
    masks = recall.filters.masks([user.filter for user in options.users], view)
    depths = np.full(len(seen), recall.sizes.candidates)
    source = recall.source(Content)
    batch = Batch(np.zeros((len(seen), 1, 8), np.float32), seen, view, masks, depths)
    offered = source.offer(batch)
    for user, rows in enumerate(offered):
        shown = [row for row in rows[rows > 0].tolist() if there[row]]
        passes = there & (True if masks[user] is None else masks[user].passes(np.arange(len(there))))
        assert passes[shown].all()
        assert len(set(shown)) == len(shown) == min(QUOTA, passes.sum())
        rest = np.setdiff1d(np.flatnonzero(passes), shown)
        assert not len(rest) or scores[user][rest].max() <= scores[user][shown].min() + 2e-3
    every = np.broadcast_to(np.flatnonzero(there), (len(seen), int(there.sum())))
    np.testing.assert_allclose(source.score(batch, every, every), scores[:, there], atol=2e-3)


def asked(count: int) -> Options:
    allow = [{"brand": ["brand1", "brand2"]} if user % 3 == 0 else {} for user in range(count)]
    return parse_options(json.dumps({"allow": json.dumps(allow)}), count, schema_of())


@pytest.mark.parametrize("index", ["Flat", "IVF8,Flat"])
def test_what_is_like_the_last_items_is_offered_through_all_changes(tmp_path, rng, index):
    """New, changed and deleted items, a merge, more changes: always by what items are now."""
    release = content_release(tmp_path, rng, index)
    write_item_encoder(release)
    writer, recall = ItemWriter(release), open_recall(open_again(release))
    for turn in range(4):
        known = 1 + np.flatnonzero(release.items["codes"][1:].any(axis=1))
        offers_are_the_best(recall, rng.choice(known, (9, 12)), asked(9))
        writer.apply(random_changes(rng, release, 30))
        if turn == 1:
            number = merge(open_again(release), writer.sequence)
            writer.overlay.turn_to(number, writer.sequence)
    assert recall.live.view.state.generation == 1
    new = np.arange(ITEMS + 1, recall.live.refresh().num_rows)[-12:]
    offers_are_the_best(recall, np.tile(new, (9, 1)), asked(9))
    writer.close()


def test_who_has_no_past_gets_no_offer_of_it(tmp_path, rng):
    recall = open_recall(content_release(tmp_path, rng))
    seen = np.full((3, 12), -1)
    seen[1, -1] = 7
    batch = Batch(np.zeros((3, 1, 8), np.float32), seen, recall.live.view, [None] * 3, np.full(3, 24))
    offered = recall.source(Content).offer(batch)
    assert (offered[[0, 2]] == -1).all()
    assert (offered[1] > 0).all()


def test_its_quota_comes_out_also_for_who_excludes_the_nearest(tmp_path, rng):
    recall = open_recall(content_release(tmp_path, rng))
    seen = rng.integers(1, ITEMS, (6, 12))
    query = rng.standard_normal((6, 1, 8), dtype=np.float32)
    scores, _ = truth(recall, seen)
    ids = recall.live.view.ids_from_rows(np.argsort(-scores, axis=1)[:, :40])
    each = [UserOptions(exclude_items=tuple(row.tolist())) for row in ids]
    found = recall.run(Options(tuple(each)), seen_rows=seen, user_embeddings=query)["candidate_rows"]
    for user in range(6):
        barred = {*np.argsort(-scores[user])[:40].tolist(), *seen[user].tolist()}
        left = [row for row in np.argsort(-scores[user]).tolist() if row > 0 and row not in barred]
        best = [row for row in left if scores[user][row] > scores[user][left[QUOTA]] + 2e-3]
        assert set(best) <= set(found[user].tolist())


def test_a_list_is_the_same_alone_and_among_others(tmp_path, rng):
    recall = open_recall(content_release(tmp_path, rng, "IVF8,Flat"))
    seen = rng.integers(1, ITEMS, (32, 12))
    query = rng.standard_normal((32, 1, 8), dtype=np.float32)
    together = recall.run(default_options(32), seen_rows=seen, user_embeddings=query)
    for user in range(32):
        piece = slice(user, user + 1)
        alone = recall.run(default_options(1), seen_rows=seen[piece], user_embeddings=query[piece])
        for name, array in alone.items():
            np.testing.assert_allclose(array[0], together[name][user], atol=1e-6, err_msg=name)


def test_what_nothing_is_known_of_has_no_direction(rng):
    table = rng.standard_normal((9, E), dtype=np.float32)
    table[0] = 0
    codes = np.array([[0, 0], [3, 0], [3, 4], [3, 900]])  # 900: new in the vocabulary
    vectors = content_vectors(table, codes)
    assert not vectors[0].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[1:], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(vectors[3], vectors[1])
