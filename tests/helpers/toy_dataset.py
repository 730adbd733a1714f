"""A toy shop as a dataset, whose clicks, purchases and dwell times are planted."""

import numpy as np

from builders.data.dataset import Dataset, Histories, Impressions, Targets
from builders.data.rates import with_rates
from ensemble.schema import DEFAULT_SOURCES, Feature, Schema, Sizes, Table, Task

UNRATED = Sizes(seen=20, history=8, embedding=16, candidates=12, item_features=8, user_features=8)
ITEMS = Table(
    (
        Feature("brand", "category", 0, 1, 1, 7),
        Feature("words", "text", 1, 3, 8, 16),
        Feature("price", "number", 0, 1),
    )
)
USERS = Table((Feature("style", "category", 0, 1, 1, 5),))
TASKS = (Task("click", "binary"), Task("buy", "binary", "click"), Task("dwell", "regression", "click", 0.1))
SCHEMA = with_rates(Schema("toy", ITEMS, USERS, TASKS, UNRATED))
SIZES = SCHEMA.sizes
NUM_USERS, NUM_ITEMS = 60, 40


def zero_scores(user_rows, history_ends, item_rows):
    """What a shop without recall says of any item."""
    return np.zeros((*item_rows.shape, len(DEFAULT_SOURCES)), np.float32)


def toy_dataset(schema=SCHEMA, seed=0, num_impressions=8000):
    """Clicks that depend on the user's style and the item's brand; every number is planted."""
    rng = np.random.default_rng(seed)
    item_codes = np.zeros((NUM_ITEMS + 1, 4), np.int32)
    brand = rng.integers(0, 6, NUM_ITEMS)
    item_codes[1:, 0] = 2 + brand
    user_codes = np.zeros((NUM_USERS + 1, 1), np.int32)
    style = rng.integers(0, 4, NUM_USERS)
    user_codes[1:, 0] = 2 + style
    taste = rng.normal(0, 1.5, (4, 6))
    lengths = rng.integers(4, 20, NUM_USERS + 1)
    lengths[0] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items, times = rng.integers(1, NUM_ITEMS + 1, offsets[-1]), np.arange(offsets[-1])
    histories = Histories(offsets, items, times, np.ones(offsets[-1], np.uint8))
    users, known = np.arange(1, NUM_USERS + 1), offsets[1:-1] + 2
    targets = Targets(users, known, histories.item_rows[known])

    def impressions(num):
        user, item = rng.integers(1, NUM_USERS + 1, num), rng.integers(1, NUM_ITEMS + 1, num)
        click = 1 / (1 + np.exp(1 - taste[style[user - 1], brand[item - 1]]))
        buy = 1 / (1 + np.exp(-0.5 * taste[0, brand[item - 1]]))
        dwell = 3 + 0.5 * taste[1, brand[item - 1]]
        clicked = rng.random(num) < click
        labels = np.full((num, 3), np.nan, np.float32)
        labels[:, 0] = clicked
        labels[clicked, 1] = (rng.random(num) < buy)[clicked]
        labels[clicked, 2] = (dwell + rng.normal(0, 0.5, num))[clicked]
        ends = offsets[user] + rng.integers(0, 3, num)
        truth = np.stack([click, buy, dwell], 1).astype(np.float32)
        return Impressions(user, item, np.arange(num), ends, labels, np.zeros(num, np.int64), truth)

    parts = (
        [impressions(num_impressions), impressions(4000), impressions(4000)]
        if schema.tasks == TASKS
        else [None] * 3
    )
    ids = np.array([f"{n:04d}".encode() for n in range(max(NUM_USERS, NUM_ITEMS))])
    return Dataset(
        schema,
        ids[:NUM_ITEMS],
        ids[:NUM_USERS],
        np.full(NUM_ITEMS + 1, b"t"),
        item_codes,
        np.zeros((NUM_ITEMS + 1, 1), np.float32),
        user_codes,
        np.zeros((NUM_USERS + 1, 1), np.float32),
        {"items": {}, "users": {}},
        histories,
        offsets[1:],
        targets,
        targets,
        *parts,
        np.full((NUM_ITEMS + 1, 1), np.nan, np.float32),
        [],
        offsets[1:],
        {"kind": "time", "keep_test": False},
    )


def toy_embeddings(seed=0):
    return np.random.default_rng(seed).normal(size=(NUM_ITEMS + 1, SIZES.embedding)).astype(np.float32)
