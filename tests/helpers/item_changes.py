"""Random changes of items, and the truth about them: the items as plain dictionaries."""

from __future__ import annotations

import json

import numpy as np
from random_release import BRANDS, RandomRelease, open_recall

from ensemble.index.item_index import find
from ensemble.options import parse_options
from ensemble.steps.recall import Recall

KINDS = ["Flat", "IVF8,Flat", "IVF8,PQ8x4fsr"]


def recall_of(release: RandomRelease, index: str = "Flat") -> Recall:
    if "PQ" in index:
        settings = json.loads((release.path / "recall.json").read_text())
        (release.path / "recall.json").write_text(json.dumps({**settings, "nprobe": 8, "refine_factor": 16}))
    return open_recall(release)


def random_changes(rng: np.random.Generator, release: RandomRelease, count: int) -> list[dict]:
    """Upserts and deletes of old and new items, each id once."""
    ids = [f"i{i:05}" for i in rng.choice(120, count // 2, replace=False)] + [
        f"new{i:03}" for i in rng.choice(100, count - count // 2, replace=False)
    ]
    view, changes = release.live.refresh(), []
    for item_id in ids:
        row = int(view.rows_from_ids(np.array([item_id.encode()]))[0])
        there = row > 0 and not bool(view.is_deleted(np.array([row]))[0])
        if there and rng.random() < 0.3:
            changes.append({"op": "delete", "item": {"item_id": item_id}})
            continue
        features = {
            "brand": str(rng.choice(BRANDS)),
            "tags": "tag1|tag2",
            "price": float(rng.uniform(1, 100)),
        }
        changes.append(
            {
                "op": "upsert",
                "item": {"item_id": item_id, **features, "item_embedding": rng.standard_normal(8).tolist()},
            }
        )
    return changes


class Mirror:
    """The items as plain dictionaries: the truth."""

    def __init__(self, release: RandomRelease) -> None:
        numbers, names = np.load(release.path / "numbers.npy"), release.item_ids.sorted_ids
        embeddings = np.array(release.items["embedding"])
        self.items = {
            names[row - 1]: (embeddings[row], self._brand(release, row), numbers[row, 0])
            for row in range(1, len(release.items))
        }

    @staticmethod
    def _brand(release: RandomRelease, row: int) -> str:
        code = int(release.items["codes"][row, 0])
        return BRANDS[code - 2] if code >= 2 else ""

    def apply(self, changes: list[dict]) -> None:
        for change in changes:
            name, item = change["item"]["item_id"].encode(), change["item"]
            if change["op"] == "delete":
                del self.items[name]
            else:
                self.items[name] = (
                    np.array(item["item_embedding"], np.float32),
                    item["brand"],
                    np.float32(item["price"]),
                )

    def best(
        self,
        query: np.ndarray,
        depth: int,
        brands: list[str] | None = None,
        price: tuple[float, float] | None = None,
    ) -> list[bytes]:
        passing = {
            name: embedding @ query
            for name, (embedding, brand, cost) in self.items.items()
            if (brands is None or brand in brands) and (price is None or price[0] <= cost <= price[1])
        }
        return sorted(passing, key=lambda name: -passing[name])[:depth]


ASKED = [
    {},
    {"brands": ["brand1", "brand2"]},
    {"price": (20.0, 60.0)},
    {"brands": ["brand3"], "price": (0.0, 50.0)},
    {"brands": []},
]


def found_names(recall: Recall, query: np.ndarray, depth: int, asked: dict) -> list[bytes]:
    parameters = {}
    if "brands" in asked:
        parameters["allow"] = json.dumps({"brand": asked["brands"]})
    if "price" in asked:
        parameters["ranges"] = json.dumps({"price": asked["price"]})
    wanted = parse_options(json.dumps(parameters), 1, recall.live.release.schema).users[0].filter
    view = recall.live.refresh()
    mask = None if wanted is None else recall.filters.mask(wanted, view)
    rows = find(view, query[None], depth, mask)[0][0]
    return view.ids_from_rows(rows[rows > 0]).tolist()


def hold_against(recall: Recall, mirror: Mirror, rng: np.random.Generator, exact: bool) -> None:
    shares = []
    for _ in range(8):
        query = rng.standard_normal(8).astype(np.float32)
        for asked in ASKED:
            best, found = mirror.best(query, 20, **asked), found_names(recall, query, 20, asked)
            assert len(found) == len(best) == len(set(found)), "as many as pass, each once"
            assert found == best or not exact
            shares.append(len(set(found) & set(best)) / max(1, len(best)) if best else 1.0)
    assert np.mean(shares) >= 0.95
