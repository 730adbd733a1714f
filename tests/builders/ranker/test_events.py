"""What an event's kind and age add to its item: learned where it tells something, served as trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_dataset import (
    ITEMS,
    NUM_ITEMS,
    TASKS,
    UNRATED,
    USERS,
    toy_dataset,
    toy_embeddings,
    zero_scores,
)

from builders.data.dataset import Dataset, Histories, Impressions, Targets, cell_windows, history_windows
from builders.data.rates import with_rates
from builders.ranker.checkpoint import open_ranker, save_ranker
from builders.ranker.config import TINY_TRAINING
from builders.ranker.lists import lists_from_impressions, states_of
from builders.ranker.model import TINY
from builders.ranker.trainer import RankerTrainer
from builders.ranker.training import train_ranker
from ensemble.release.events import GAPS
from ensemble.schema import Schema

SCHEMA = with_rates(Schema("toy", ITEMS, USERS, TASKS[:1], UNRATED, events=("view", "buy")))
NUM_USERS, SHOWN = 1500, 3


def bought_or_seen() -> Dataset:
    """A view and a purchase a user, at one time, in either order: who bought last clicks on everything. No
    count and no recency tells which it was, and nobody who validates was trained on."""
    rng, base = np.random.default_rng(0), toy_dataset(with_rates(Schema("toy", ITEMS, USERS, TASKS, UNRATED)))
    buys_last = rng.random(NUM_USERS) < 0.5
    kinds = np.where(buys_last[:, None], [[1, 2]], [[2, 1]]).astype(np.uint8)
    offsets = np.concatenate([[0], 2 * np.arange(NUM_USERS + 1)])
    items = rng.integers(1, NUM_ITEMS + 1, 2 * NUM_USERS)
    histories = Histories(offsets, items, np.full(2 * NUM_USERS, 1_000), kinds.ravel())

    def shown(users: np.ndarray) -> Impressions:
        rows = np.repeat(users, SHOWN)
        clicked = rng.random(len(rows)) < np.where(buys_last[rows - 1], 0.9, 0.1)
        item, when = rng.integers(1, NUM_ITEMS + 1, len(rows)), np.full(len(rows), 2_000)
        labels = clicked[:, None].astype(np.float32)
        return Impressions(rows, item, when, offsets[rows + 1], labels, np.zeros(len(rows), np.int64))

    parts = np.split(np.arange(1, NUM_USERS + 1), [1100, 1300])
    none = np.zeros(0, np.int64)
    return replace(
        base,
        schema=SCHEMA,
        user_ids=np.array([f"{n:05d}".encode() for n in range(NUM_USERS)]),
        user_codes=np.zeros((NUM_USERS + 1, 1), np.int32),
        user_values=np.zeros((NUM_USERS + 1, 1), np.float32),
        histories=histories,
        train_ends=offsets[1:],
        known_ends=offsets[1:],
        validation=Targets(none, none, none),
        test=Targets(none, none, none),
        train_impressions=shown(parts[0]),
        validation_impressions=shown(parts[1]),
        test_impressions=shown(parts[2]),
    )


@pytest.fixture(scope="module")
def trained():
    dataset = bought_or_seen()
    config = replace(TINY_TRAINING, epochs=4, batch=128)
    return dataset, train_ranker(dataset, toy_embeddings(), scores=zero_scores, config=config)


def test_whether_the_newest_event_was_a_purchase_is_known_by_what_it_adds(trained):
    assert trained[1].report["test"]["click"]["auc"] > 0.8


def test_what_events_add_is_kept_and_served_as_it_was_trained(trained, tmp_path):
    dataset, checkpoint = trained
    table = checkpoint.events.table()
    assert table[GAPS:].any()
    assert not table[:GAPS].any(), "padding adds nothing"
    save_ranker(checkpoint, tmp_path, TINY)
    read = open_ranker(tmp_path, SCHEMA)
    np.testing.assert_array_equal(read.events.table(), table)
    rng = np.random.default_rng(0)
    trainer = RankerTrainer(
        dataset, toy_embeddings(), read.ranker, TINY_TRAINING, rng, lambda done, text: None
    )
    trainer.start_from(read)
    trainer.trained.eval()
    shown = dataset.test_impressions
    states = states_of(dataset, shown, read.user_rates[shown.user_rows])
    lists = lists_from_impressions(shown, zero_scores, states)[0].take(np.arange(50))
    asked = lists.user_rows, lists.history_ends, SCHEMA.sizes.history
    served = read.item_features[np.maximum(history_windows(dataset.histories, *asked), 0)]
    served = served + table[cell_windows(dataset, *asked)]
    with torch.no_grad():
        seen, mask = trainer.tensors(lists)[0][:2]
    np.testing.assert_allclose(seen.numpy(), served * mask.numpy()[..., None], atol=1e-5)
