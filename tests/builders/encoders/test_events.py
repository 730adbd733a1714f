"""What the user encoder knows of events beside their items: the same in training and served, and learned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from toy_dataset import SCHEMA, toy_dataset

from builders.data.dataset import cell_windows
from builders.encoders import sequences as packing
from builders.encoders.checkpoint import read_encoders, save_encoders
from builders.encoders.encoders import EncoderConfig, Validation, evaluate_encoders
from builders.encoders.encoding import known_histories, training_sequences
from builders.encoders.sequences import Sequences, windows
from builders.encoders.training import train_encoders
from ensemble.release.events import GAPS

USERS, ITEMS, LENGTH = 400, 60, 9


def test_cells_that_are_trained_on_are_those_of_served_windows(rng):
    toy = toy_dataset()
    count = len(toy.histories.item_rows)
    kinds, times = rng.integers(1, 3, count).astype(np.uint8), np.cumsum(rng.integers(0, 1 << 20, count))
    histories = replace(toy.histories, times=times, kinds=kinds)
    dataset = replace(toy, schema=replace(SCHEMA, events=("view", "buy")), histories=histories)
    sequences, users = training_sequences(dataset), np.arange(1, dataset.num_users + 1)
    length, ends = SCHEMA.sizes.history, np.asarray(dataset.train_ends[users])
    served, there = cell_windows(dataset, users, ends, length), windows(sequences, users, length) > 0
    np.testing.assert_array_equal(packing.cell_windows(sequences, users, length)[there], served[there])
    assert len(np.unique(served[there])) > 10
    assert (served[~there] < GAPS).all(), "padding is of kind 0"
    np.testing.assert_array_equal(known_histories(dataset, users, ends).cells, served[there])


def test_where_a_purchase_leads_elsewhere_than_a_view_the_user_encoder_knows_it(rng, tmp_path):
    """After a view comes an item of the first half of the catalogue, after a purchase one of the other."""
    kinds = rng.integers(1, 3, (USERS, LENGTH))
    after = rng.integers(1, ITEMS // 2 + 1, (USERS, LENGTH)) + np.where(kinds == 2, ITEMS // 2, 0)
    rows = np.concatenate([rng.integers(1, ITEMS + 1, (USERS, 1)), after], axis=1)
    offsets = np.arange(USERS + 1) * LENGTH
    sequences = Sequences(offsets, rows[:, :LENGTH].ravel(), (kinds * GAPS).ravel())
    validation = Validation(sequences, rows[:, LENGTH], np.arange(USERS))
    halves = 1 + (np.arange(ITEMS + 1)[:, None] > ITEMS // 2).astype(np.int32)
    none = [np.zeros((count, 1), np.float32) for count in (ITEMS + 1, USERS)]
    features = halves, none[0], np.zeros((USERS, 1), np.int32), none[1]
    sizes = {"num_kinds": 2, "num_item_codes": 3, "item_code_slices": ((0, 1),)}
    config = EncoderConfig.tiny(**sizes, epochs=12, evaluate_every=12, learning_rate=3e-2)
    found = []
    for cells in (None, sequences.cells):
        of = replace(validation, histories=replace(sequences, cells=cells))
        trained = train_encoders(of.histories, *features, config=config, validation=of)
        found.append(trained.log[-1]["ndcg_at_10"])
    assert found[1] > 1.3 * found[0]
    save_encoders(trained, tmp_path)
    again = evaluate_encoders(read_encoders(tmp_path), of, *features)
    assert again["ndcg_at_10"] == found[1]
