"""Measures how well items that nobody took are found: CiteULike-a in DropoutNet's split, by articles' tags.

    python -m builders.bench.cold_items DATA_DIR --out DIR --epochs 8 [--new-items median]

DATA_DIR holds the folder cold_citeulike. DIR gets the shop, with `content` among the sources of recall, and
the stages data, encoders and index of its build (a second run starts from the encoders that are there). Then
every user of cold_test.csv is asked about, with the history that the build knows:

  - **among the cold items**: the share of a user's cold test items among the first 100 of the 3,396 items
    that nobody in training took, mean over users (the protocol's Recall@100);
  - **of all**: the share of all cold test pairs among the first 100 of the whole catalogue.

Both by recall's fused score over everything, by the user encoder alone and by the content source alone;
`candidates` are the first 100 that recall really gives. A library has no order and no clock: histories are in
a random order, drawn once.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from builders.bench.recall_stages import recall_stages
from builders.data.dataset import Dataset, history_windows, open_dataset
from builders.folders import new_folder
from builders.index.stage import open_recall
from builders.index.staged import SOURCES_FILE
from builders.presets import preset
from builders.shop.shop_toml import SHOP_FILE
from ensemble.arrays import Array
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.json_text import json_text
from ensemble.steps.content import Content
from ensemble.steps.recall import Recall, fused
from ensemble.steps.sources import Batch, Nearest

SHOP = """name = "citeulike"
split = "leave_one_out"

[interactions]                # one row per article in a user's library, in a random order
file = "interactions.parquet"

[items]
file = "items.parquet"
id = "item_id"
features = [{name = "tags", kind = "category", width = 64}]

[recall]
sources = ["user_embeddings", "transitions", "popular", "content"]
new_items = "NEW_ITEMS"
"""
FIRST = 100
_BATCH = 64


def write_shop(source: Path, folder: Path, new_items: str = "last") -> None:
    """Writes the shop of cold_train.csv and item-tag.dat; `new_items` as in shop.toml."""
    train = _pairs(source / "cold_train.csv")
    train = train[np.random.default_rng(0).permutation(len(train))]
    lines = (source / "item-tag.dat").read_text().splitlines()
    tags = [[f"t{tag}" for tag in line.split()[1:]] for line in lines]
    users, items = (
        pa.array(_ids(kind, column).astype(str)) for kind, column in zip("ua", train.T, strict=True)
    )
    places = np.arange(len(train))
    pq.write_table(
        pa.table({"user_id": users, "item_id": items, "time": places}), folder / "interactions.parquet"
    )
    ids = pa.array(_ids("a", np.arange(1, len(tags) + 1)).astype(str))
    pq.write_table(pa.table({"item_id": ids, "tags": tags}), folder / "items.parquet")
    (folder / SHOP_FILE).write_text(SHOP.replace("NEW_ITEMS", new_items))


def _ids(kind: str, numbers: Array) -> Array:
    """Makes ids [n] S of numbers [n]: `u` of users, `a` of articles."""
    return np.char.add(kind, numbers.astype(str)).astype("S")


def _pairs(path: Path) -> Array:
    """Reads users and items [n, 2] int64 of a file of the split."""
    if not path.is_file():
        raise InvalidInput(f"{path} is missing; DATA_DIR is the folder that holds {path.parent.name}")
    return np.loadtxt(path, delimiter=",", dtype=np.int64, usecols=(0, 1))


def build(shop: Path, out: Path, preset_name: str, epochs: int, seed: int) -> dict[str, Path]:
    """Runs the stages up to the index, with the encoders that are there already; gives their folders."""
    chosen = preset(preset_name)
    chosen = replace(chosen, encoders=replace(chosen.encoders, epochs=epochs))
    return recall_stages(shop, out, chosen, seed)


@dataclass(frozen=True)
class Truth:
    """Holds the cold test pairs by the dataset's rows."""

    cold: Array  # [C] int64, item rows
    users: Array  # [U] int64, user rows, each once
    is_true: Array  # [U, I + 1] bool


def truth_of(source: Path, dataset: Dataset) -> Truth:
    """Reads what each user took of the cold items."""
    pairs = _pairs(source / "cold_test.csv")
    rows = [
        1 + np.searchsorted(ids, _ids(kind, column))
        for ids, kind, column in zip((dataset.user_ids, dataset.item_ids), "ua", pairs.T, strict=True)
    ]
    cold = _ids("a", np.loadtxt(source / "cold_test_item_ids.csv", dtype=np.int64))
    users, place = np.unique(rows[0], return_inverse=True)
    is_true = np.zeros((len(users), dataset.num_items + 1), bool)
    is_true[place, rows[1]] = True
    return Truth(np.sort(1 + np.searchsorted(dataset.item_ids, cold)), users, is_true)


def measure(folders: dict[str, Path], source: Path) -> dict[str, dict[str, float]]:
    """Asks about every user of the test: {way: {figure: value}}."""
    dataset = open_dataset(folders["data"])
    offline, embeddings = open_recall(folders, dataset)
    truth, recall = truth_of(source, dataset), offline.recall
    weights = {"all sources": recall.settings.source_weights}
    for place, name in enumerate(dataset.schema.source_names):
        if name in ("user_embeddings", "content") and name not in recall.settings.off:
            weights[name] = tuple(float(at == place) for at in range(len(dataset.schema.sources)))
    every = np.arange(1, dataset.num_items + 1)
    parts: dict[str, list[Array]] = {}
    for start in range(0, len(truth.users), _BATCH):
        users, right = truth.users[start : start + _BATCH], truth.is_true[start : start + _BATCH]
        ends = dataset.known_ends[users]
        had = history_windows(
            dataset.histories, users, ends, int((ends - dataset.histories.offsets[users]).max())
        )
        rows = np.broadcast_to(every, (len(users), len(every)))
        seen = had[:, -dataset.schema.sizes.seen :]
        query = offline.encode_users(users, ends)
        scores = _scores(recall, Batch(query, seen, recall.live.view), rows, embeddings[1:])
        for way, of in weights.items():
            one = np.concatenate([np.full((len(users), 1), -np.inf), fused(rows, scores, of)], axis=1)
            np.put_along_axis(one, np.maximum(had, 0), -np.inf, axis=1)
            parts.setdefault(f"{way}: among cold", []).append(
                _found(one[:, truth.cold], right[:, truth.cold])
            )
            parts.setdefault(f"{way}: of all", []).append(_found(one, right))
        candidates = offline.candidates(users, ends)[0][:, :FIRST]
        shown = np.take_along_axis(right, np.maximum(candidates, 0), axis=1).sum(axis=1)
        parts.setdefault("candidates: of all", []).append(shown)
    return _figures({name: np.concatenate(found) for name, found in parts.items()}, truth.is_true.sum(axis=1))


def _scores(recall: Recall, batch: Batch, rows: Array, embeddings: Array) -> Array:
    """Gives every source's score of every item [Q, I, S]: rows [Q, I] are all items, embeddings [I, D].

    What is an inner product is one product of matrices here; as recall does it, each user would gather every
    item's vector.
    """
    scores = np.zeros((*rows.shape, len(recall.sources)), np.float32)
    for place, source in enumerate(recall.sources):
        if isinstance(source, Nearest):
            scores[..., place] = (batch.query @ embeddings.T).max(axis=1)
        elif isinstance(source, Content):
            vectors = source.vectors[1:].astype(np.float32)
            scores[..., place] = source.query(batch) @ vectors.T
        else:
            scores[..., place] = source.score(batch, rows, np.zeros(0))
    return scores


def _found(scores: Array, right: Array) -> Array:
    """Counts the right ones [Q, X] bool among the first 100 by scores [Q, X]: [Q]."""
    best = np.argpartition(-scores, FIRST, axis=1)[:, :FIRST]
    return np.take_along_axis(right, best, axis=1).sum(axis=1)


def _figures(found: dict[str, Array], wanted: Array) -> dict[str, dict[str, float]]:
    """Gives the protocol's mean over users and the share of pairs, by way."""
    figures: dict[str, dict[str, float]] = {}
    for name, counts in found.items():
        way, what = name.split(": ")
        figure = f"recall@{FIRST}_{what.replace(' ', '_')}"
        value = (counts / wanted).mean() if what == "among cold" else counts.sum() / wanted.sum()
        figures.setdefault(way, {})[figure] = round(float(value), 4)
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Builds what is missing, measures, and prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="DATA_DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--new-items", default="last", choices=("last", "median"))
    given = parser.parse_args(arguments)
    source = given.source / "cold_citeulike"
    try:
        with new_folder(given.out / "shop", force=True) as folder:
            write_shop(source, folder, given.new_items)
        folders = build(given.out / "shop", given.out, given.preset, given.epochs, given.seed)
        told = json.loads((folders["index"] / SOURCES_FILE).read_text())
        print(json_text({**told, "figures": measure(folders, source)}, indent=1))
    except PeregrineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
