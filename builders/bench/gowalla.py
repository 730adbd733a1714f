"""Measures real embeddings of a public data set: how well they rank, how well an index finds them.

    python -m builders.bench.gowalla SRC --out DIR

SRC holds train.txt and test.txt, one "user item item ..." a line (Gowalla in the split of NGCF and LightGCN).
Ranking is theirs: every item is ranked for every user, the user's train items are left out, Recall@20 is hits
/ test items and NDCG@20 is against the best order there is.

What is trained is the project's own pair of encoders on ids alone. Two things differ from a shop, as these
lists have no order:
  - every epoch sees each user's items in a new random order, and of a long list a new random sample: nobody
    counts for hundreds;
  - the user encoder starts without a preference for recent items (`ordered=False`). Left as it is for shops,
    it learns slower here.
A user is then a random window of their train items; `orders` windows averaged are a fuller picture of a long
list for as many encodings. Early stopping looks at one train item of some users, held out; test.txt is read
for the figures only.

The index part asks each kind of builders.index.choice for half of the queries until its settings reach the
wanted recall@100 against exact search, and reports the other half. DIR keeps embeddings.npz (a second run
starts from there) and report.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from builders.encoders.encoders import (
    EncoderCheckpoint,
    EncoderConfig,
    Validation,
    encode_items,
    encode_users,
)
from builders.encoders.sequences import Sequences
from builders.encoders.stage import train_encoders
from builders.index.choice import IndexKind, IndexTarget, exact_positions, index_of_kind, try_settings, tune
from ensemble.arrays import Array
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.index.vectors import packed_vectors
from ensemble.json_text import json_text

PUBLISHED = {  # Recall@20, NDCG@20: the BARS leaderboard, then two that were measured on these files
    "ItemCF": (0.1570, 0.1214),
    "MF-BPR": (0.1627, 0.1378),
    "YoutubeDNN (two-tower)": (0.1754, 0.1473),
    "EASE": (0.1765, 0.1467),
    "LightGCN": (0.1820, 0.1547),
    "UltraGCN": (0.1862, 0.1580),
    "SimpleX": (0.1872, 0.1557),
    "closed form, measured": (0.1850, 0.1518),
    "popularity, measured": (0.0416, 0.0317),
}


def read_lists(path: Path) -> dict[int, Array]:
    """Reads lines of 'user item item ...' into {user: item rows [n] int64, from 1}."""
    if not path.is_file():
        raise InvalidInput(
            f"{path} is missing; SRC holds train.txt and test.txt, lines of 'user item item ...'"
        )
    lists: dict[int, Array] = {}
    for number, words in enumerate(map(str.split, path.read_text("utf-8").splitlines()), 1):
        if not all(word.isdecimal() for word in words):
            raise InvalidInput(f"{path}: line {number}: wanted 'user item item ...', whole numbers from 0")
        if words:
            lists[int(words[0])] = np.unique(np.array(words[1:], np.int64)) + 1
    if not any(map(len, lists.values())):
        raise InvalidInput(f"{path}: no line of 'user item item ...'")
    return lists


def read_split(source: Path) -> tuple[Sequences, Sequences, int]:
    """Reads (train, test, number of items); both have every user, who may have nothing in one of them."""
    both = [read_lists(source / name) for name in ("train.txt", "test.txt")]
    users, nothing = 1 + max(max(lists) for lists in both), np.zeros(0, np.int64)
    train, test = (together([lists.get(user, nothing) for user in range(users)]) for lists in both)
    return train, test, int(max(train.rows.max(), test.rows.max()))


def together(lists: list[Array]) -> Sequences:
    return Sequences(
        np.concatenate([[0], np.cumsum([len(rows) for rows in lists])]).astype(np.int64),
        np.concatenate(lists),
    )


def drawn(lists: Sequences, limit: int, rng: np.random.Generator) -> Sequences:
    """Draws every user's items in a random order, at most `limit` of them: another sample with every call."""
    counts = np.diff(lists.offsets)
    owner = np.repeat(np.arange(len(counts)), counts)
    rows = lists.rows[np.lexsort((rng.random(len(owner)), owner))]
    place = np.arange(len(rows)) - np.repeat(lists.offsets[:-1], counts)
    return Sequences(np.concatenate([[0], np.cumsum(np.minimum(counts, limit))]), rows[place < limit])


def hold_out(
    lists: Sequences, count: int, limit: int, rng: np.random.Generator
) -> tuple[Sequences, Validation]:
    """Takes one item of `count` users with three or more; gives (the lists without those, what validates)."""
    users = np.sort(rng.permutation(np.flatnonzero(np.diff(lists.offsets) >= 3))[:count])
    places = rng.integers(lists.offsets[users], lists.offsets[users + 1])
    gone = np.searchsorted(places, lists.offsets)  # held-out items before each user
    kept = Sequences(lists.offsets - gone, np.delete(lists.rows, places))
    seen = drawn(together([kept.rows[kept.offsets[u] : kept.offsets[u + 1]] for u in users]), limit, rng)
    return kept, Validation(seen, lists.rows[places], users)


def no_features(rows: int) -> tuple[Array, Array]:
    """Gives one column of zeros each: ids are all there is."""
    return np.zeros((rows, 1), np.int32), np.zeros((rows, 1), np.float32)


def train(
    lists: Sequences, num_items: int, config: EncoderConfig, seed: int, validating: int = 2000
) -> EncoderCheckpoint:
    """Trains both encoders.

    train_encoders packs its sequences anew every epoch, so that what is drawn into them in between is what it
    sees.
    """
    rng, items, users = (
        np.random.default_rng(seed),
        no_features(num_items + 1),
        no_features(len(lists.offsets) - 1),
    )
    kept, validation = hold_out(lists, validating, config.max_history, rng)
    shown = drawn(kept, config.max_history + 1, rng)

    def progress(log: dict[str, float]) -> None:
        shown.rows[:] = drawn(kept, config.max_history + 1, rng).rows
        print("  ".join(f"{name} {value:.4g}" for name, value in log.items()), file=sys.stderr, flush=True)

    return train_encoders(
        shown, *items, *users, config=config, seed=seed, validation=validation, progress=progress
    )


def user_embeddings(
    checkpoint: EncoderCheckpoint, items: Array, lists: Sequences, orders: int, seed: int
) -> Array:
    """Encodes users [U, D] float32: the mean over `orders` random windows of each one's items."""
    rng, features = np.random.default_rng(seed), no_features(len(lists.offsets) - 1)
    windows = (drawn(lists, checkpoint.config.max_history, rng) for _ in range(orders))
    return np.mean([encode_users(checkpoint, items, window, *features)[:, 0] for window in windows], axis=0)


def recall_ndcg(
    users: Array, items: Array, train: Sequences, test: Sequences, k: int = 20
) -> tuple[float, float]:
    """Gives Recall@k and NDCG@k of users [U, D] x items [I + 1, D]: means over those with test items."""
    counts, table = np.diff(test.offsets), torch.from_numpy(items).T
    wanted = np.repeat(np.arange(len(counts)), counts) * len(items) + test.rows
    gain = 1 / np.log2(np.arange(k) + 2)
    recalls, gains = [], []
    chosen = np.flatnonzero(counts)
    for part in np.split(chosen, range(512, len(chosen), 512)):  # 84 MB of scores at once
        scores = torch.from_numpy(users[part]) @ table
        scores[:, 0] = -torch.inf
        for score, user in zip(scores, part, strict=True):
            score[torch.from_numpy(train.rows[train.offsets[user] : train.offsets[user + 1]])] = -torch.inf
        best = scores.topk(min(k, len(items)), dim=1).indices.numpy()
        hits = np.isin(part[:, None] * len(items) + best, wanted)
        recalls.append(hits.sum(1) / counts[part])
        gains.append((hits * gain[: best.shape[1]]).sum(1) / np.cumsum(gain)[np.minimum(counts[part], k) - 1])
    return float(np.concatenate(recalls).mean()), float(np.concatenate(gains).mean())


def popularity(lists: Sequences, num_items: int) -> tuple[Array, Array]:
    """Gives users [U, 1] and items [I + 1, 1] whose product is how often an item is in the lists."""
    return np.ones((len(lists.offsets) - 1, 1), np.float32), np.bincount(
        lists.rows, minlength=num_items + 1
    ).astype(np.float32)[:, None]


def kinds(num_items: int, dim: int) -> list[IndexKind]:
    """Lists the kinds that choose_kind knows, with as many lists as it would take; exact search first."""
    # `number`: bytes of an item's in its list
    lists, number = (
        1 << max(4, int(np.log2(2 * np.sqrt(num_items)))),
        8,
    )
    return [
        IndexKind("Flat", 4 * dim),
        IndexKind(f"IVF{lists},Flat", 4 * dim + number, lists),
        IndexKind(f"IVF{lists},RaBitQ", dim // 8 + 8 + number, lists, True),
        IndexKind(f"IVF{lists},PQ{dim // 2}x4fsr", dim // 4 + number, lists, True),
    ]


def index_rows(items: Array, queries: Array, target: IndexTarget) -> list[dict[str, Any]]:
    """Tunes each kind on the first half of the queries and measures it on the second.

    items [I + 1, D], queries [Q, D].
    """
    num_items, half, packed, rows = len(items) - 1, len(queries) // 2, packed_vectors(items, "fp16"), []

    def chunks(start: int, stop: int) -> Array:
        return items[start + 1 : stop + 1]

    truth = exact_positions(queries, target.k, num_items, chunks)
    for kind in kinds(num_items, items.shape[1]):
        index = index_of_kind(kind, num_items, items.shape[1], chunks)
        asked = index, kind, lambda wanted: packed[wanted].astype(np.float32)
        tuned = tune(*asked, queries[:half], truth[:half], target)
        found = try_settings(*asked, queries[half:], truth[half:], tuned.query)
        rows.append(
            {
                **found,
                "index_bytes_per_item": round(faiss.serialize_index(index).nbytes / num_items, 1),
                "tried": tuned.tried,
            }
        )
        print(index_table(rows[-1:], target.k).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


def index_table(rows: list[dict[str, Any]], k: int) -> str:
    lines = [
        f"| index | nprobe | refine | recall@{k} | bytes an item | mapped | ms a query |",
        "|" + " --- |" * 7,
    ]
    names = (
        "index",
        "nprobe",
        "refine_factor",
        f"recall_at_{k}",
        "index_bytes_per_item",
        "mapped_bytes_per_item",
        "ms_per_query",
    )
    return "\n".join([*lines, *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows)])


def ranking_table(ours: dict[str, tuple[float, float]]) -> str:
    rows = {**{f"**{name}**": pair for name, pair in ours.items()}, **PUBLISHED}
    lines = [f"| {name} | {recall:.4f} | {ndcg:.4f} |" for name, (recall, ndcg) in rows.items()]
    return "\n".join(["| | Recall@20 | NDCG@20 |", "| --- | --- | --- |", *lines])


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Trains if DIR has no embeddings yet, ranks, asks the indexes."""
    (lists, test, num_items), kept = read_split(given.source), given.out / "embeddings.npz"
    if not kept.is_file():
        config = EncoderConfig(
            ordered=False,
            dim=128,
            max_history=given.history,
            epochs=given.epochs,
            batch_positions=given.batch,
            learning_rate=3e-3,
            layers=1,
            dropout=given.dropout,
            id_dropout=0.0,
            num_uniform=4096,
            num_hard=0,
            evaluate_every=1,
        )
        checkpoint = train(lists, num_items, config, given.seed)
        used = resource.getrusage(resource.RUSAGE_SELF)
        trained = {
            "log": checkpoint.log,
            "cpu_s": round(used.ru_utime + used.ru_stime),
            "peak_bytes": used.ru_maxrss * 1024,
        }
        items = encode_items(checkpoint, *no_features(num_items + 1))
        one, many = (user_embeddings(checkpoint, items, lists, n, given.seed) for n in (1, given.orders))
        given.out.mkdir(parents=True, exist_ok=True)
        np.savez(kept, items=items, one=one, many=many, trained=json.dumps(trained))
    with np.load(kept, allow_pickle=False) as held:
        items, one, many, trained = held["items"], held["one"], held["many"], json.loads(str(held["trained"]))
    ways = {
        "two-tower, one window": (one, items),
        f"two-tower, {given.orders} windows": (many, items),
        "popularity": popularity(lists, num_items),
    }
    ours = {name: recall_ndcg(*way, lists, test) for name, way in ways.items()}
    print(ranking_table(ours), file=sys.stderr, flush=True)
    queries = one[
        np.random.default_rng(given.seed).permutation(np.flatnonzero(np.diff(lists.offsets)))[:2000]
    ]
    target = IndexTarget(0.96, min(100, num_items))
    return {"ranking": ours, "index": index_rows(items, queries, target), "k": target.k, **trained}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="folder with train.txt and test.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder for embeddings.npz and report.json")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--history", type=int, default=100, help="items of a user that the encoder sees")
    parser.add_argument(
        "--orders", type=int, default=8, help="random windows that the averaged figure takes of a user"
    )
    parser.add_argument("--threads", type=int, default=1, help="of training")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--batch", type=int, default=4096, help="positions a training step")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    try:
        report = measure(given)
    except PeregrineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    (given.out / "report.json").write_text(json_text(report, indent=1) + "\n", "utf-8")
    print(ranking_table(report["ranking"]), index_table(report["index"], report["k"]), sep="\n\n")


if __name__ == "__main__":
    main()
