"""Defines the tensors and models of every pipeline, once. All else is derived: ONNX names, config.pbtxt,
checks, clients.

    recommend:  features -> user_encoder -> recall -> ranker -> reranking
    search:     features -> user_encoder; text_query, image_query -> search_recall -> ranker
                -> search_reranking

A release has every pipeline that `pipelines` gives for its schema; their models of one name are one member.
To add a model before recall: define its tensors, add its ModelSpec, and, if recall shall search with its
output, name that tensor in QUERY_TENSORS.
"""

from __future__ import annotations

import hashlib
from enum import IntFlag

from ensemble.activity import state_width, touches_width
from ensemble.id_rule import MAX_ID_BYTES
from ensemble.schema import EncoderSizes, Schema
from ensemble.spec import BATCH, ENGINE_STEP, Axis, Dtype, ModelSpec, PipelineSpec, TensorSpec

TEXT, IMAGE = "text_encoder", "image_encoder"  # what encodes items' texts and pictures
PIPELINE, SEARCH = "recommend", "search"  # the aliases that clients call
PIPELINES = (PIPELINE, SEARCH)  # every release has the first one
CONTENTS = ("query_text", "query_image")  # inputs that are no ids: any bytes, empty where there is nothing
MAX_TEXT_BYTES = 2_000  # of a query
MAX_PICTURES, MAX_PICTURES_BYTES = 8, 6 << 20  # of one request

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
    RANK_SKIPPED = 8  # the budget was spent before ranking: order is recall's
    UNKNOWN_ITEMS = 16  # session items that the release does not know; they were dropped
    # The release that is tried did not answer in time, or failed: the list is the main release's
    CANARY_FAILED = 32
    # A value of the request's context is none that the release knows, or its shop has no context at all
    UNKNOWN_CONTEXT = 64
    NO_MATCH = 128  # nothing in the catalogue fits the query
    # Nobody looked for this user: the budget was spent, or no server answered. The list is everybody's
    POPULAR = 256
    # A value of the request's `allow` or `deny` is none that an item has, of the release or a live one
    UNKNOWN_VALUES = 512


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
        tuple(t[n] for n in (*QUERY_TENSORS, *SEEN_TENSORS, "user_id")),
        tuple(t[n] for n in RECALL_OUTPUTS),
    )
    ranker = ModelSpec(
        "ranker", ENGINE_STEP, tuple(t[n] for n in RANKER_INPUTS), (t["candidate_probabilities"],)
    )
    reranking = ModelSpec(
        "reranking",
        "ensemble.steps.reranking:Reranking",
        tuple(t[n] for n in RERANKING_INPUTS),
        tuple(t[n] for n in ANSWER),
    )
    return PipelineSpec(
        PIPELINE,
        inputs=(t["user_id"],),
        models=(features, user_encoder, recall, ranker, reranking),
        outputs=tuple(t[n] for n in ANSWER),
        max_batch=schema.sizes.max_batch,
    )


def search(schema: Schema) -> PipelineSpec:
    """Builds the pipeline behind `search`: what a query finds, in an order that the user's taste moves."""
    t = _tensors(schema)
    shared = {model.name: model for model in recommend(schema).models}
    queries = (
        ModelSpec("text_query", "ensemble.steps.query:TextQuery", (t["query_text"],), (t["query_words"],)),
        ModelSpec("image_query", "ensemble.steps.query:ImageQuery", (t["query_image"],), (t["query_look"],)),
    )
    recall = ModelSpec(
        "search_recall",
        "ensemble.steps.search:SearchRecall",
        tuple(t[n] for n in (*QUERY_TENSORS, *SEEN_TENSORS, "user_id", "query_text", *QUERY_VECTORS)),
        tuple(t[n] for n in (*RECALL_OUTPUTS, *RELEVANCES)),
    )
    reranking = ModelSpec(
        "search_reranking",
        "ensemble.steps.search:SearchReranking",
        tuple(t[n] for n in (*RERANKING_INPUTS, *RELEVANCES)),
        tuple(t[n] for n in SEARCH_ANSWER),
    )
    return PipelineSpec(
        SEARCH,
        inputs=tuple(t[n] for n in ("user_id", *CONTENTS)),
        models=(shared["features"], shared["user_encoder"], *queries, recall, shared["ranker"], reranking),
        outputs=tuple(t[n] for n in SEARCH_ANSWER),
        max_batch=schema.sizes.max_batch,
    )


def pipelines(schema: Schema) -> tuple[PipelineSpec, ...]:
    """Lists a release's pipelines: recommend, and, where something encodes texts or pictures, search."""
    return (recommend(schema), search(schema)) if schema.encoders else (recommend(schema),)


def members(schema: Schema) -> tuple[ModelSpec, ...]:
    """Lists the steps of all pipelines, each once, and the engines beside them."""
    steps = {model.name: model for pipeline in pipelines(schema) for model in pipeline.models}
    return (*steps.values(), *beside(schema))


SEEN_TENSORS = ("seen_rows", "seen_kinds", "seen_recencies")
FEATURES_OUTPUTS = (
    *SEEN_TENSORS,
    "history_mask",
    "history_embeddings",
    "history_features",
    "user_codes",
    "user_values",
    "user_features",
    "user_state",
    "user_status",
)
RECALL_OUTPUTS = (
    "candidate_rows",
    "candidate_features",
    "candidate_state",
    "candidate_scores",
    "candidate_status",
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
    "user_state",
    "candidate_features",
    "candidate_state",
    "candidate_scores",
)
RERANKING_INPUTS = (
    "candidate_rows",
    "candidate_probabilities",
    "candidate_scores",
    "user_status",
    "candidate_status",
)
ITEM_ENCODER_INPUTS = ("item_id_embedding", "item_codes", "item_values")
ITEM_ENCODER_OUTPUTS = ("item_embedding", "item_features")
ANSWER = ("item_ids", "scores", "probabilities", "tasks", "degraded", "release", "sequence")
QUERY_VECTORS = ("query_words", "query_look")
RELEVANCES = ("candidate_relevance", "candidate_finders")
SEARCH_ANSWER = (*ANSWER, "finders")


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


def content_encoder(sizes: EncoderSizes) -> ModelSpec:
    """Describes a text_encoder or an image_encoder: it runs offline, and for items that come while they are
    served."""
    batch, width = Axis(BATCH, "batch", None), Axis("V", "content vector", sizes.width)
    if sizes.model == TEXT:
        axes = (batch, Axis("L", "tokens", None))
        inputs: tuple[TensorSpec, ...] = (
            TensorSpec("token_ids", "int64", axes, "the tokenizer's, 0 where padded"),
            TensorSpec("token_mask", "bool", axes, "true where token_ids holds a token"),
        )
        output = TensorSpec("text_embedding", "float32", (batch, width), "what a text says, of length 1")
    else:
        sides = Axis("Y", "height", sizes.side), Axis("X", "width", sizes.side)
        meaning = "red, green and blue from 0 to 1"
        inputs = (TensorSpec("pixels", "float32", (batch, Axis("3", "colours", 3), *sides), meaning),)
        output = TensorSpec("image_embedding", "float32", (batch, width), "what is seen, of length 1")
    return ModelSpec(sizes.model, ENGINE_STEP, inputs, (output,))


def beside(schema: Schema) -> tuple[ModelSpec, ...]:
    """Lists the engines of a release that are no step of its pipeline: what encodes items."""
    return (item_encoder(schema), *map(content_encoder, schema.encoders))


def _axes(schema: Schema) -> dict[str, Axis]:
    """Gives every axis by its letter; codes and values of items and users by "items C" and the like."""
    s, items, users = schema.sizes, schema.items, schema.users
    widths = {encoder.model: encoder.width for encoder in schema.encoders}
    axes = (
        Axis("1", "one a row", 1),
        Axis("W", "seen", s.seen),
        Axis("H", "history", s.history),
        Axis("D", "embedding", s.embedding),
        Axis("M", "interests", s.interests),
        Axis("N", "candidates", s.candidates),
        Axis("F", "item features", s.item_features),
        Axis("U", "user features", s.user_features),
        Axis("A", "user state", state_width(schema)),
        Axis("G", "candidate state", touches_width(schema)),
        Axis("S", "recall sources", len(schema.sources)),
        Axis("T", "tasks", len(schema.tasks)),
        Axis("K", "returned", None),
        Axis("V", "text vector, or 1", widths.get(TEXT, 1)),
        Axis("Z", "image vector, or 1", widths.get(IMAGE, 1)),
        Axis("E", "id embedding: D for the encoder, F for the ranker", s.embedding + s.item_features),
    )
    packed = {
        "items C": Axis("C", "item codes", items.code_width),
        "items R": Axis("R", "item values", items.value_width),
        "users C": Axis("C", "user codes", users.code_width),
        "users R": Axis("R", "user values", users.value_width),
    }
    return {axis.letter: axis for axis in axes} | packed


# Every tensor: name, dtype, the axes behind the batch (by the keys of _axes), meaning.
_TENSORS: tuple[tuple[str, Dtype, tuple[str, ...], str], ...] = (
    (
        "user_id",
        "bytes",
        ("1",),
        f"UTF-8, at most {MAX_ID_BYTES} bytes; an unknown one is answered with a cold list",
    ),
    (
        "seen_rows",
        "int64",
        ("W",),
        "item rows of the user's past, oldest first, left-padded with -1; the session's items come last",
    ),
    (
        "seen_kinds",
        "int32",
        ("W",),
        "each event's kind, from 1 in the order of the schema's events; 0 = padding",
    ),
    (
        "seen_recencies",
        "float32",
        ("W",),
        "each event's recency: 1 just now, 0 a year ago (ensemble/activity.py)",
    ),
    ("history_mask", "bool", ("H",), "true where the history, the last H of seen_rows, holds an item"),
    (
        "history_embeddings",
        "float32",
        (
            "H",
            "D",
        ),
        "what the user encoder sees of the history's items, 0 where padded",
    ),
    (
        "history_features",
        "float32",
        (
            "H",
            "F",
        ),
        "what the ranker sees of the history's items, 0 where padded",
    ),
    ("user_codes", "int32", ("users C",), "category and text features, 0 = nothing"),
    ("user_values", "float32", ("users R",), "number and vector features, standardized"),
    ("user_features", "float32", ("U",), "the user's own learned row; 0 for an unknown user"),
    (
        "user_state",
        "float32",
        ("A",),
        "what the user did lately, the request's context, the user's rates (ensemble/activity.py)",
    ),
    ("user_status", "int64", ("1",), "bits of contract.Degraded"),
    (
        "user_embeddings",
        "float32",
        (
            "M",
            "D",
        ),
        "interest vectors; inner product with item embeddings is recall's score",
    ),
    ("candidate_rows", "int64", ("N",), "eligible item rows, best first, padded with -1"),
    (
        "candidate_features",
        "float32",
        (
            "N",
            "F",
        ),
        "what the ranker sees of the candidates, 0 where padded",
    ),
    (
        "candidate_state",
        "float32",
        ("N", "G"),
        "what the user did with each candidate lately (ensemble/activity.py); 0 for what is new to the user",
    ),
    (
        "candidate_scores",
        "float32",
        (
            "N",
            "S",
        ),
        "each source's score of each candidate, 0 where padded",
    ),
    ("candidate_status", "int64", ("1",), "bits of contract.Degraded, of all candidates' rows together"),
    (
        "candidate_probabilities",
        "float32",
        (
            "N",
            "T",
        ),
        "one value per task: calibrated probability, or the predicted number",
    ),
    ("item_ids", "bytes", ("K",), "best first, padded with empty ids"),
    ("scores", "float32", ("K",), "the blended number that sorts, 0 where padded"),
    (
        "probabilities",
        "float32",
        (
            "K",
            "T",
        ),
        "one value per task, 0 where padded",
    ),
    ("tasks", "bytes", ("1",), "JSON array: the names of the last axis of probabilities"),
    ("degraded", "int64", ("1",), "bits of contract.Degraded"),
    ("release", "bytes", ("1",), "the name of the release that answered"),
    ("sequence", "int64", ("1",), "number of the last change to items that this list knows; 0: none yet"),
    ("query_text", "bytes", ("1",), f"UTF-8, at most {MAX_TEXT_BYTES} bytes; empty: nothing is typed"),
    ("query_image", "bytes", ("1",), "a JPEG, PNG or WebP file; empty: nothing is shown"),
    ("query_words", "float32", ("V",), "the text's vector, of length 1; 0 where there is none"),
    ("query_look", "float32", ("Z",), "the picture's vector, of length 1; 0 where there is none"),
    ("candidate_relevance", "float32", ("N",), "log odds that the item fits the query, 0 where padded"),
    ("candidate_finders", "int64", ("N",), "bits of the finders (steps/finders.py) that brought the item"),
    ("finders", "bytes", ("K",), "what brought each item, such as words,text; empty where padded"),
    ("item_id_embedding", "float32", ("E",), "the item's id row; row 0 when it is new"),
    ("item_codes", "int32", ("items C",), "category and text features, 0 = nothing"),
    ("item_values", "float32", ("items R",), "number and vector features, standardized"),
    ("item_embedding", "float32", ("D",), "the vector that recall searches"),
    ("item_features", "float32", ("F",), "the vector that the ranker sees"),
)


def _tensors(schema: Schema) -> dict[str, TensorSpec]:
    """Gives every tensor by its name, with this shop's sizes."""
    axes, batch = _axes(schema), Axis(BATCH, "batch", None)
    return {
        name: TensorSpec(name, dtype, (batch, *[axes[key] for key in keys]), meaning)
        for name, dtype, keys, meaning in _TENSORS
    }


def fingerprint(schema: Schema) -> str:
    """Gives 16 hex digits that change when any tensor, any model or the order of steps does.

    A release fits only the contract it was built for. Where a step's class lies is no part of it: moving a
    file makes no release another one.
    """
    models = members(schema)
    wiring = [(m.name, m.is_engine, [(str(t), t.dims) for t in (*m.inputs, *m.outputs)]) for m in models]
    return hashlib.sha256(repr(wiring).encode()).hexdigest()[:16]
