"""Defines the tensors and models of every pipeline, once. All else is derived: ONNX names, config.pbtxt,
checks, clients.

    recommend:  features -> user_encoder -> recall -> ranker -> reranking

To add a model before recall, say text_encoder: define its tensors, add its ModelSpec, and, if recall shall
search with its output, name that tensor in QUERY_TENSORS.
"""

from __future__ import annotations

import hashlib
from enum import IntFlag

from ensemble.id_rule import MAX_ID_BYTES
from ensemble.schema import Schema
from ensemble.spec import BATCH, ENGINE_STEP, Axis, Dtype, ModelSpec, PipelineSpec, TensorSpec

PIPELINE = "recommend"  # the alias that clients call

# Recall's sources, in the order of candidate_scores' last axis.
SOURCES = ("user_embeddings", "transitions", "popular")
# Tensors [B, *, D] that recall searches the index with.
QUERY_TENSORS = ("user_embeddings",)

MAX_LIST = 1000  # items or categories in one list of a request's options


class Degraded(IntFlag):
    """Says in the bits of the answer's `degraded` what was missing while this list was made. 0 = nothing."""

    UNKNOWN_USER = 1  # not in the snapshot: answered from the session's items, or with a cold list
    # Redis did not answer: a row past its soft TTL, or the release's own, was used for the user, the past or
    # a candidate
    FEATURES_STALE = 2
    FEATURES_MISSING = 4  # no tier answered, the default row was used
    RANK_SKIPPED = 8  # reserved: order is recall's, not the ranker's
    UNKNOWN_ITEMS = 16  # session items that the release does not know; they were dropped


def recommend(schema: Schema) -> PipelineSpec:
    """Builds the pipeline behind `recommend` for one shop."""
    t = _tensors(schema)
    features = ModelSpec(
        "features",
        "ensemble.steps.features:FeatureLookup",
        (t["user_id"],),
        tuple(t[n] for n in FEATURES_OUTPUTS),
    )
    user_encoder = ModelSpec(
        "user_encoder", ENGINE_STEP, tuple(t[n] for n in USER_ENCODER_INPUTS), (t["user_embeddings"],)
    )
    recall = ModelSpec(
        "recall",
        "ensemble.steps.recall:Recall",
        (*(t[n] for n in QUERY_TENSORS), t["seen_rows"]),
        tuple(t[n] for n in ("candidate_rows", "candidate_features", "candidate_scores", "candidate_status")),
    )
    ranker = ModelSpec(
        "ranker", ENGINE_STEP, tuple(t[n] for n in RANKER_INPUTS), (t["candidate_probabilities"],)
    )
    reranking = ModelSpec(
        "reranking",
        "ensemble.steps.reranking:Reranking",
        (t["candidate_rows"], t["candidate_probabilities"], t["user_status"], t["candidate_status"]),
        tuple(t[n] for n in ANSWER),
    )
    return PipelineSpec(
        PIPELINE,
        inputs=(t["user_id"],),
        models=(features, user_encoder, recall, ranker, reranking),
        outputs=tuple(t[n] for n in ANSWER),
        max_batch=schema.sizes.max_batch,
    )


FEATURES_OUTPUTS = (
    "seen_rows",
    "history_mask",
    "history_embeddings",
    "history_features",
    "user_codes",
    "user_values",
    "user_features",
    "user_status",
)
USER_ENCODER_INPUTS = ("history_embeddings", "history_mask", "user_codes", "user_values")
# No embedding: encoders are trained on the clicks that label the ranker's impressions, and a pair of
# embeddings tells the label.
RANKER_INPUTS = (
    "history_features",
    "history_mask",
    "user_codes",
    "user_values",
    "user_features",
    "candidate_features",
    "candidate_scores",
)
ITEM_ENCODER_INPUTS = ("item_id_embedding", "item_codes", "item_values")
ITEM_ENCODER_OUTPUTS = ("item_embedding", "item_features")
ANSWER = ("item_ids", "scores", "probabilities", "tasks", "degraded", "release")


def item_encoder(schema: Schema) -> ModelSpec:
    """Describes the engine that turns an item's id row and features into the row that the snapshot holds.

    It runs offline, and for items that are added or changed while they are served.
    """
    t = _tensors(schema)
    return ModelSpec(
        "item_encoder",
        ENGINE_STEP,
        tuple(t[n] for n in ITEM_ENCODER_INPUTS),
        tuple(t[n] for n in ITEM_ENCODER_OUTPUTS),
    )


def _tensors(schema: Schema) -> dict[str, TensorSpec]:
    """Gives every tensor by its name.

    Axes: B batch, W seen, H history, D embedding, M interests, N candidates, F and U item and user features,
    S recall sources, T tasks, K returned, C codes, R values, E id embedding.
    """
    s = schema.sizes
    w = Axis("W", "seen", s.seen)
    b, one = Axis(BATCH, "batch", None), Axis("1", "one a row", 1)
    h, d = Axis("H", "history", s.history), Axis("D", "embedding", s.embedding)
    m = Axis("M", "interests", s.interests)
    n, k = Axis("N", "candidates", s.candidates), Axis("K", "returned", None)
    f, u = Axis("F", "item features", s.item_features), Axis("U", "user features", s.user_features)
    task, src = Axis("T", "tasks", len(schema.tasks)), Axis("S", "recall sources", len(SOURCES))
    e = Axis("E", "id embedding: D for the encoder, F for the ranker", s.embedding + s.item_features)
    items, users = schema.items, schema.users
    ic, iv = Axis("C", "item codes", items.code_width), Axis("R", "item values", items.value_width)
    uc, uv = Axis("C", "user codes", users.code_width), Axis("R", "user values", users.value_width)

    def tensor(name: str, dtype: Dtype, meaning: str, *axes: Axis) -> TensorSpec:
        return TensorSpec(name, dtype, (b, *axes), meaning)

    every = (
        tensor(
            "user_id",
            "bytes",
            f"UTF-8, at most {MAX_ID_BYTES} bytes; an unknown one is answered with a cold list",
            one,
        ),
        tensor(
            "seen_rows",
            "int64",
            "item rows of the user's past, oldest first, left-padded with -1; the session's items come last",
            w,
        ),
        tensor("history_mask", "bool", "true where the history, the last H of seen_rows, holds an item", h),
        tensor(
            "history_embeddings",
            "float32",
            "what the user encoder sees of the history's items, 0 where padded",
            h,
            d,
        ),
        tensor(
            "history_features", "float32", "what the ranker sees of the history's items, 0 where padded", h, f
        ),
        tensor("user_codes", "int32", "category and text features, 0 = nothing", uc),
        tensor("user_values", "float32", "number and vector features, standardized", uv),
        tensor("user_features", "float32", "the user's own learned row; 0 for an unknown user", u),
        tensor("user_status", "int64", "bits of contract.Degraded", one),
        tensor(
            "user_embeddings",
            "float32",
            "interest vectors; inner product with item embeddings is recall's score",
            m,
            d,
        ),
        tensor("candidate_rows", "int64", "eligible item rows, best first, padded with -1", n),
        tensor(
            "candidate_features", "float32", "what the ranker sees of the candidates, 0 where padded", n, f
        ),
        tensor(
            "candidate_scores", "float32", "each source's score of each candidate, 0 where padded", n, src
        ),
        tensor(
            "candidate_status", "int64", "bits of contract.Degraded, of all candidates' rows together", one
        ),
        tensor(
            "candidate_probabilities",
            "float32",
            "one value per task: calibrated probability, or the predicted number",
            n,
            task,
        ),
        tensor("item_ids", "bytes", "best first, padded with empty ids", k),
        tensor("scores", "float32", "the blended number that sorts, 0 where padded", k),
        tensor("probabilities", "float32", "one value per task, 0 where padded", k, task),
        tensor("tasks", "bytes", "JSON array: the names of the last axis of probabilities", one),
        tensor("degraded", "int64", "bits of contract.Degraded", one),
        tensor("release", "bytes", "the release that answered", one),
        tensor("item_id_embedding", "float32", "the item's id row; row 0 when it is new", e),
        tensor("item_codes", "int32", "category and text features, 0 = nothing", ic),
        tensor("item_values", "float32", "number and vector features, standardized", iv),
        tensor("item_embedding", "float32", "the vector that recall searches", d),
        tensor("item_features", "float32", "the vector that the ranker sees", f),
    )
    return {spec.name: spec for spec in every}


def fingerprint(schema: Schema) -> str:
    """Gives 16 hex digits that change when any tensor, any model or the order of steps does.

    A release fits only the contract it was built for. Where a step's class lies is no part of it: moving a
    file makes no release another one.
    """
    models = (*recommend(schema).models, item_encoder(schema))
    wiring = [(m.name, m.is_engine, [(str(t), t.dims) for t in (*m.inputs, *m.outputs)]) for m in models]
    return hashlib.sha256(repr(wiring).encode()).hexdigest()[:16]
