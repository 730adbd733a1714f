"""Releases of random numbers: what the steps read, without a build, for tests that hold the steps against
brute force."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import faiss
import numpy as np

from ensemble.release.ids import write_ids
from ensemble.release.snapshot import item_dtype, user_dtype
from ensemble.schema import Feature, Schema, Sizes, Table, Task
from ensemble.steps.recall import Recall
from ensemble.steps.recall_settings import RecallSettings
from ensemble.steps.served import ServedRelease

SIZES = Sizes(
    seen=12,
    history=5,
    embedding=8,
    candidates=24,
    item_features=3,
    user_features=2,
    max_batch=64,
    max_top_k=24,
)
BRANDS, TAGS = tuple(f"brand{b}" for b in range(6)), tuple(f"tag{t}" for t in range(4))
ITEMS = Table(
    (
        Feature("brand", "category", 0, 1, 1, 1 + len(BRANDS)),
        Feature("tags", "category", 1, 2, 2 + len(BRANDS), 1 + len(TAGS)),
        Feature("price", "number", 0, 1),
    )
)
ENCODING = [
    {"name": "brand", "source": "brand", "separator": None, "log1p": False},
    {"name": "tags", "source": "tags", "separator": "|", "log1p": False},
    {
        "name": "price",
        "source": "price_eur",
        "separator": None,
        "log1p": False,
        "mean": [50.0],
        "deviation": [30.0],
        "limit": 10.0,
    },
]
TASKS = (Task("ctr", "binary"), Task("cvr", "binary", "ctr", 2.0), Task("dwell", "regression", "ctr", 0.1))
SETTINGS = RecallSettings(
    transition_items=3, quotas={"transitions": 8, "popular": 3}, source_weights=(1.0, 0.5, 0.1)
)


class RandomRelease(ServedRelease):
    """A folder of files, without a manifest to hold them against."""

    twins: np.ndarray  # [n] int64, rows of items with one embedding

    def verify(self, paths: Iterable[Path] | None = None) -> None:
        """Nothing was promised."""


def schema_of(**sizes: int) -> Schema:
    return Schema("random", ITEMS, Table(), TASKS, dataclasses.replace(SIZES, **sizes))


def make_release(
    folder: Path,
    rng: np.random.Generator,
    *,
    num_items: int = 120,
    num_users: int = 40,
    schema: Schema | None = None,
    settings: RecallSettings = SETTINGS,
    index: str = "Flat",
    whole_numbers: bool = False,
    twins: np.ndarray | tuple[int, ...] = (),
) -> RandomRelease:
    """Writes r1 under `folder`. `whole_numbers`: embeddings of small integers, so that scores are exact and
    ties abound. `twins`: items, from 0, that share one embedding."""
    schema = schema or schema_of()
    path = folder / "r1"
    path.mkdir(parents=True)
    items = _items(rng, schema, num_items, whole_numbers)
    rows = 1 + np.asarray(twins, np.int64)
    items["embedding"][rows] = items["embedding"][rows[:1]]
    np.save(path / "items.npy", items)
    np.save(path / "users.npy", _users(rng, schema, num_users, num_items))
    write_ids(path / "item_ids.npy", np.array(sorted(f"i{i:05}".encode() for i in range(num_items))))
    write_ids(path / "user_ids.npy", np.array(sorted(f"u{u:05}".encode() for u in range(num_users))))
    np.save(path / "transitions.npy", _transitions(rng, num_items, whole_numbers))
    popularity = np.log1p(rng.integers(0, 6, num_items + 1)).astype(np.float32)
    popularity[0] = 0
    np.save(path / "popular.npy", popularity)
    (path / "schema.json").write_text(schema.to_json())
    (path / "vocabularies.json").write_text(
        json.dumps({"items": {"brand": BRANDS, "tags": TAGS}, "users": {}})
    )
    (path / "recall.json").write_text(settings.to_json())
    _write_index(path, items["embedding"][1:], index)
    numbers = np.where(
        rng.random((num_items + 1, 1)) < 0.1, np.nan, rng.uniform(1, 100, (num_items + 1, 1))
    ).astype(np.float32)
    np.save(path / "numbers.npy", numbers)
    (path / "encoding.json").write_text(json.dumps(ENCODING))
    np.save(
        path / "new_item_id_embedding.npy",
        rng.standard_normal((1, schema.sizes.embedding + schema.sizes.item_features), dtype=np.float32),
    )
    release = RandomRelease(folder, "r1", {})
    release.twins = rows
    return release


def open_again(release: RandomRelease) -> RandomRelease:
    """The same release, as another process sees it."""
    return RandomRelease(release.repository, release.name, release.manifest)


def open_recall(release: ServedRelease) -> Recall:
    return Recall(release.model("recall"), release)


def _items(rng: np.random.Generator, schema: Schema, num_items: int, whole_numbers: bool) -> np.ndarray:
    items = np.zeros(num_items + 1, item_dtype(schema))
    shape = items["embedding"].shape
    items["embedding"] = rng.integers(-2, 3, shape) if whole_numbers else rng.standard_normal(shape)
    items["features"] = rng.standard_normal(items["features"].shape)
    brand, tags = ITEMS.features[:2]
    items["codes"][:, 0] = brand.offset + rng.integers(0, brand.size, num_items + 1)
    items["codes"][:, 1] = tags.offset + rng.integers(0, tags.size, num_items + 1)
    items["codes"][:, 2] = np.where(
        rng.random(num_items + 1) < 0.5, 0, tags.offset + rng.integers(0, tags.size, num_items + 1)
    )
    items["codes"][rng.random(num_items + 1) < 0.1] = 0  # nothing known of them
    items["codes"][0] = 0
    return items


def _users(rng: np.random.Generator, schema: Schema, num_users: int, num_items: int) -> np.ndarray:
    users = np.zeros(num_users + 1, user_dtype(schema))
    users["features"] = rng.standard_normal(users["features"].shape)
    users["features"][0] = 0
    users["seen"] = -1
    for user in range(2, num_users + 1):  # the first user has no past
        past = rng.integers(1, num_items + 1, rng.integers(1, schema.sizes.seen + 1))
        users["seen"][user, -len(past) :] = past
        users["seen_kinds"][user, -len(past) :] = 1
        users["seen_times"][user, -len(past) :] = np.sort(rng.integers(1, 1 << 31, len(past)))
    return users


def _transitions(rng: np.random.Generator, num_items: int, whole_numbers: bool) -> np.ndarray:
    lists = np.zeros(num_items + 1, [("rows", "<i4", (6,)), ("scores", "<f4", (6,))])
    for row in range(1, num_items + 1):
        known = rng.integers(0, 7)
        lists["rows"][row, :known] = 1 + rng.choice(num_items, known, replace=False)
        scores = rng.integers(1, 4, known) if whole_numbers else rng.random(known) + 0.01
        lists["scores"][row, :known] = np.sort(scores)[::-1]
    return lists


def _write_index(path: Path, embeddings: np.ndarray, kind: str) -> None:
    index = faiss.index_factory(embeddings.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    vectors = np.ascontiguousarray(embeddings)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(path / "index.faiss"))


def write_item_encoder(release: ServedRelease, seed: int = 5) -> None:
    """A real engine: the id row plus random projections of codes and values."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    sizes, items, rng = release.schema.sizes, release.schema.items, np.random.default_rng(seed)
    outs = {"item_embedding": sizes.embedding, "item_features": sizes.item_features}
    nodes, weights = [helper.make_node("Cast", ["item_codes"], ["codes"], to=TensorProto.FLOAT)], []
    for name, width in outs.items():
        sources = (
            ("item_id_embedding", sizes.embedding + sizes.item_features),
            ("codes", items.code_width),
            ("item_values", items.value_width),
        )
        for place, (source, rows) in enumerate(sources):
            weights.append(
                numpy_helper.from_array(
                    rng.standard_normal((rows, width)).astype(np.float32), f"{name}{place}"
                )
            )
            nodes.append(helper.make_node("MatMul", [source, f"{name}{place}"], [f"{name}_{place}"]))
        nodes.append(helper.make_node("Sum", [f"{name}_{place}" for place in range(3)], [name]))
    model = release.model("item_encoder")
    kinds = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
    described = [
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], ["B", *t.dims]) for t in part]
        for part in (model.inputs, model.outputs)
    ]
    graph = helper.make_graph(nodes, "item_encoder", *described, weights)
    path = release.member_file("item_encoder", "model.onnx")
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
