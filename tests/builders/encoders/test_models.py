"""The two encoders, their training and the item transitions."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from builders.encoders.encoders import EncoderConfig, Validation, encode_items, evaluate_encoders
from builders.encoders.models import ItemEncoder, UserEncoder
from builders.encoders.sequences import Sequences, pack_sequences, windows
from builders.encoders.stage import train_encoders
from builders.index.transitions import item_transitions

DIM = 16
FP32 = 1e-4  # embeddings have length 3.8


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def user_encoder(interests: int) -> UserEncoder:
    torch.manual_seed(0)
    encoder = UserEncoder(
        dim=DIM, interests=interests, heads=2, max_history=12, num_user_codes=5, user_code_slices=((0, 1),)
    ).eval()
    for parameter in encoder.parameters():  # nothing may hide behind an initial zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder


def feed(batch: int, length: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    codes = torch.randint(0, 5, (batch, 1), dtype=torch.int32)
    return [
        torch.randn(batch, length, DIM),
        torch.ones(batch, length, dtype=torch.bool),
        codes,
        torch.zeros(batch, 1),
    ]


@pytest.mark.parametrize("interests", [1, 4])
def test_padding_does_not_change_a_user(interests):
    encoder, (history, mask, codes, values) = user_encoder(interests), feed(3, 5)
    padded = (
        torch.cat([torch.full((3, 7, DIM), 9.0), history], 1),
        torch.cat([torch.zeros(3, 7, dtype=torch.bool), mask], 1),
    )
    with torch.no_grad():
        short, long = encoder(history, mask, codes, values), encoder(*padded, codes, values)
    assert short.shape == (3, interests, DIM)
    torch.testing.assert_close(short, long, atol=FP32, rtol=0)


@pytest.mark.parametrize("interests", [1, 4])
def test_packed_training_rows_equal_served_windows(interests):
    encoder, (history, mask, codes, values) = user_encoder(interests), feed(1, 9)
    segments = torch.tensor([1, 1, 1, 1, 2, 2, 2, 2, 2])
    seen = (segments[:, None] == segments[None]) & torch.ones(9, 9, dtype=torch.bool).tril()
    with torch.no_grad():
        packed = encoder.embeddings(
            encoder.positions(history, seen[None])[0], encoder.features(codes, values).expand(9, -1)
        )
        for end, start in [(4, 0), (7, 4), (9, 4)]:
            served = encoder(history[:, start:end], mask[:, start:end], codes, values)
            torch.testing.assert_close(served[0], packed[end - 1], atol=FP32, rtol=0)


@pytest.mark.parametrize("interests", [1, 4])
def test_an_empty_history_gives_the_default_whatever_the_padding_holds(interests):
    encoder, (history, mask, codes, values) = user_encoder(interests), feed(2, 5)
    with torch.no_grad():
        first = encoder(history, mask & False, codes, values)
        second = encoder(history * 7, mask & False, codes, values)
    assert torch.isfinite(first).all()
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_a_user_does_not_depend_on_batch_mates():
    encoder, inputs = user_encoder(1), feed(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(encoder(*inputs)[:1], encoder(*[x[:1] for x in inputs]), atol=FP32, rtol=0)


def test_both_encoders_export_to_onnx_with_the_contracts_names(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    items = ItemEncoder(dim=DIM, num_codes=9, code_slices=((0, 2), (2, 3))).eval()
    item_feed = {
        "item_id_embedding": torch.randn(3, DIM),
        "item_codes": torch.randint(0, 9, (3, 3), dtype=torch.int32),
        "item_values": torch.zeros(3, 1),
    }
    user_feed = dict(
        zip(["history_embeddings", "history_mask", "user_codes", "user_values"], feed(3, 12), strict=True)
    )
    for encoder, inputs in ((items, item_feed), (user_encoder(4), user_feed)):
        batch = torch.export.Dim("B", min=1, max=1024)
        path = tmp_path / "model.onnx"
        torch.onnx.export(
            encoder,
            (),
            path,
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes={name: {0: batch} for name in inputs},
            verbose=False,
        )
        session = ort.InferenceSession(path)
        assert [x.name for x in session.get_inputs()] == list(inputs)
        for rows in (1, 3):
            part = {name: tensor[:rows] for name, tensor in inputs.items()}
            wanted = encoder(**part).detach().numpy()
            np.testing.assert_allclose(
                session.run(None, {k: v.numpy() for k, v in part.items()})[0], wanted, atol=FP32
            )


def test_packing_keeps_every_transition_once_and_windows_keep_the_newest(rng):
    lengths = rng.integers(0, 40, 50)
    sequences = Sequences(np.concatenate([[0], np.cumsum(lengths)]), 1 + np.arange(lengths.sum()))
    packed = pack_sequences(sequences, rng.permutation(50), 12)
    filled = packed.items > 0
    assert (packed.targets[filled] == packed.items[filled] + 1).all()
    wanted = np.setdiff1d(sequences.rows, sequences.rows[sequences.offsets[1:][lengths > 0] - 1])
    np.testing.assert_array_equal(np.sort(packed.items[filled]), wanted)
    assert filled.mean() > 0.7
    assert not packed.cells.any()
    told = pack_sequences(dataclasses.replace(sequences, cells=2 * sequences.rows), rng.permutation(50), 12)
    np.testing.assert_array_equal(told.cells, 2 * told.items)
    newest = windows(sequences, np.arange(50), 12)
    assert all(
        (row[row > 0] == sequences.rows[a:b][-12:]).all()
        for row, a, b in zip(newest, sequences.offsets, sequences.offsets[1:], strict=False)
    )


def markov_shop(rng, num_users=500, num_items=300):
    """Who took item i takes, nine times in ten, one of the two items after i in a hidden order; items share a
    code in fives."""
    order = rng.permutation(num_items) + 1
    place = np.empty(num_items + 1, np.int64)
    place[order] = np.arange(num_items)
    rows = rng.integers(1, num_items + 1, (num_users, 1))
    for _ in range(11):
        step = np.where(
            rng.random(num_users) < 0.9, rng.integers(1, 3, num_users), rng.integers(0, num_items, num_users)
        )
        rows = np.concatenate([rows, order[(place[rows[:, -1]] + step) % num_items][:, None]], 1)
    codes = np.concatenate([[0], 1 + place[1:] // 5]).astype(np.int32)[:, None]
    sequences = Sequences(np.arange(num_users + 1) * 11, rows[:, :11].ravel())
    validation = Validation(sequences, rows[:, 11], np.arange(num_users))
    features = (
        codes,
        np.zeros((num_items + 1, 1), np.float32),
        np.zeros((num_users, 1), np.int32),
        np.zeros((num_users, 1), np.float32),
    )
    return sequences, validation, features


def test_tiny_training_finds_a_planted_chain_is_repeatable_and_places_cold_items(rng):
    sequences, validation, features = markov_shop(rng)
    config = EncoderConfig.tiny(num_item_codes=61, item_code_slices=((0, 1),))
    checkpoint = train_encoders(sequences, *features, config=config, seed=0)
    found = evaluate_encoders(checkpoint, validation, *features)
    # popularity: 10 of 300 items, about .03; the most that can be had: .9
    assert found["hit_rate_at_10"] > 0.5, found
    short = dataclasses.replace(config, epochs=2)
    one, other = (train_encoders(sequences, *features, config=short, seed=0) for _ in range(2))
    np.testing.assert_array_equal(one.item_ids, other.item_ids)

    items = encode_items(checkpoint, *features[:2])
    new = encode_items(checkpoint, np.concatenate([features[0], features[0]]), np.zeros((602, 1), np.float32))
    np.testing.assert_allclose(new[:301], items, atol=FP32)
    # the nearest known item of each item's copy without an id
    near = (new[301 + 1 :] @ items[1:].T).argmax(1)
    assert (features[0][1:][near, 0] == features[0][1:, 0]).mean() > 0.8


def test_items_that_nobody_took_are_placed_by_what_they_are_as_if_added_live(rng):
    """Copies of the first items, new in the catalogue: no negative teaches that they are bad."""
    sequences, _, (codes, values, *users) = markov_shop(rng)
    features = (np.concatenate([codes, codes[1:]]), np.concatenate([values, values[1:]]), *users)
    config = EncoderConfig.tiny(num_item_codes=61, item_code_slices=((0, 1),))
    checkpoint = train_encoders(sequences, *features, config=config, seed=0)
    taken = np.unique(sequences.rows[sequences.rows > 0])
    untaken = np.setdiff1d(np.arange(1, len(features[0])), taken)
    assert not checkpoint.item_ids[untaken].any(), "row 0's, as of items that are added live"
    items = encode_items(checkpoint, *features[:2])
    count = len(codes) - 1
    places = (items[1:] @ items[taken].T).argsort(0).argsort(0)  # of all items, for each taken one as query
    copies = taken + count
    own = places[copies - 1, np.arange(len(taken))] / len(places)  # 1 best
    assert own.mean() > 0.6, own.mean()


def test_two_interests_train(rng):
    sequences, validation, features = markov_shop(rng)
    config = EncoderConfig.tiny(interests=2, bf16=False, num_item_codes=61)
    checkpoint = train_encoders(sequences, *features, config=config, seed=0, validation=validation)
    assert max(entry.get("ndcg_at_10", 0.0) for entry in checkpoint.log) > 0.2


def test_transitions_equal_a_plain_count(rng, monkeypatch):
    lengths = rng.integers(0, 9, 40)
    offsets, rows = np.concatenate([[0], np.cumsum(lengths)]), rng.integers(1, 13, lengths.sum())
    counts = np.zeros((13, 13))
    for start, stop in pairwise(offsets):
        for i in range(start, stop):
            for j in range(i + 1, min(i + 4, stop)):
                counts[rows[i], rows[j]] += (rows[i] != rows[j]) / (j - i)
    wanted = counts / np.sqrt(np.maximum(counts.sum(1, keepdims=True), 1e-9))
    for at_once in (1 << 25, 100):  # in one piece and in shards
        monkeypatch.setattr("builders.index.transitions._PAIRS_AT_ONCE", at_once)
        neighbour_rows, neighbour_scores = item_transitions(offsets, rows, 12, window=3, neighbours=13)
        dense = np.zeros((13, 14))
        np.put_along_axis(dense, neighbour_rows.astype(np.int64), neighbour_scores, 1)
        np.testing.assert_allclose(dense[:, :13], wanted, atol=1e-5)
        assert (np.diff(neighbour_scores, axis=1) <= 0).all()


class MeanOfHistory(torch.nn.Module):
    """A user's own user encoder: one interest, the projected mean of the history."""

    def __init__(self, dim: int):
        super().__init__()
        self.project = torch.nn.Linear(dim, dim)

    def forward(self, history_embeddings, history_mask, user_codes, user_values):
        known = history_mask[..., None].float()
        return self.project((history_embeddings * known).sum(1) / known.sum(1).clamp(min=1))[:, None]


def test_windows_of_packed_rows_are_each_places_own_past(rng):
    sequences, _, _ = markov_shop(rng, num_users=20)
    packed = pack_sequences(sequences, np.arange(20), 12)
    row, places, inside = packed.windows()
    for r, place, known, item, segment in zip(
        row, places, inside, packed.items[packed.items > 0], packed.segments[packed.items > 0], strict=True
    ):
        assert packed.items[r, place[-1]] == item
        assert (packed.segments[r, place[known]] == segment).all()
        assert known[-1]
        assert (np.diff(known.astype(int)) >= 0).all()


def test_a_users_own_encoder_trains(rng):
    sequences, validation, features = markov_shop(rng)
    config = EncoderConfig.tiny(bf16=False, num_item_codes=61, epochs=4)
    checkpoint = train_encoders(
        sequences,
        *features,
        config=config,
        seed=0,
        validation=validation,
        user_encoder=MeanOfHistory(config.dim),
    )
    assert isinstance(checkpoint.user_encoder(), MeanOfHistory)
    assert checkpoint.log[-1]["loss"] < checkpoint.log[0]["loss"]
