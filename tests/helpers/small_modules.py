"""Small trained modules of the contract, and feeds for whatever inputs it names: material for tests of
compression."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import onnx
import torch
from torch import nn

from builders.compress.finetune import batches_from_feeds, finetune
from builders.encoders.models import ItemEncoder, ItemRows, UserEncoder
from builders.ranker.model import ItemFeatures, Ranker, RankerConfig
from ensemble import contract
from ensemble.schema import Feature, Schema, Sizes, Table, Task
from ensemble.spec import ModelSpec

SIZES = Sizes(seen=20, history=8, embedding=32, candidates=12, item_features=16, user_features=16)
ITEMS = Table((Feature("brand", "category", 0, 1, 1, 7), Feature("price", "number", 0, 1)))
USERS = Table((Feature("style", "category", 0, 1, 1, 5),))
SCHEMA = Schema(
    "toy", ITEMS, USERS, (Task("click", "binary"), Task("dwell", "regression", "click", 0.1)), SIZES
)
CONFIG = RankerConfig(
    codes=16, attention=32, heads=2, products=32, hidden=64, experts=2, expert=(64, 32), tower=32, dropout=0.1
)
ITEM_ENCODER = contract.item_encoder(SCHEMA)
USER_ENCODER = contract.recommend(SCHEMA).model("user_encoder")
RANKER = contract.recommend(SCHEMA).model("ranker")


def feeds_for(model: ModelSpec, users: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of a model by name, masks left-padded."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in model.inputs:
        shape = (users, *(size or 1 for size in spec.dims))
        if spec.dtype == "bool":
            feeds[spec.name] = np.arange(shape[1])[::-1] < rng.integers(1, shape[1] + 1, (users, 1))
        elif spec.dtype == "int32":
            feeds[spec.name] = rng.integers(0, 6, shape).astype(np.int32)
        else:
            feeds[spec.name] = rng.normal(size=shape).astype(np.float32)
    return feeds


def tensors(feeds: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()}


def ranker_labels(feeds: dict[str, np.ndarray], noise: float = 1.0) -> np.ndarray:
    """Clicks and dwell [B, N, 2] that depend on how user and candidate fit; dwell only where clicked."""
    rng = np.random.default_rng(7)
    mix = rng.normal(size=(SIZES.item_features, SIZES.user_features)) / 4
    fit = (
        np.einsum("bnf,fu,bu->bn", feeds["candidate_features"], mix, feeds["user_features"])
        + feeds["candidate_scores"][..., 0]
    )
    click = (fit + noise * rng.logistic(size=fit.shape) > 0).astype(np.float32)
    return np.stack([click, np.where(click > 0, fit, np.nan)], -1).astype(np.float32)


@cache
def trained_ranker() -> Ranker:
    """Trained in seconds until it clearly orders candidates. Shared: copy it to change it."""
    torch.manual_seed(0)
    ranker = Ranker(SCHEMA, CONFIG)
    feeds = feeds_for(RANKER, 512)

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        found = module.logits(*(batch[spec.name] for spec in RANKER.inputs))
        labels, known = batch["labels"], ~batch["labels"].isnan()
        click = nn.functional.binary_cross_entropy_with_logits(found[..., 0], labels[..., 0])
        return click + (found[..., 1] - labels[..., 1])[known[..., 1]].square().mean()

    finetune(
        ranker,
        loss,
        batches_from_feeds({**feeds, "labels": ranker_labels(feeds)}, 48),
        steps=100,
        learning_rate=5e-3,
    )
    return ranker


@cache
def trained_user_encoder() -> UserEncoder:
    """Trained to point to the mean of the last three items. Shared: copy it to change it."""
    torch.manual_seed(0)
    encoder = UserEncoder(
        dim=SIZES.embedding,
        num_user_codes=6,
        user_code_slices=((0, 1),),
        layers=2,
        heads=4,
        feed=64,
        max_history=SIZES.history,
    )

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        found = module(*(batch[spec.name] for spec in USER_ENCODER.inputs))[:, 0]
        history, mask = batch["history_embeddings"] * batch["history_mask"][..., None], batch["history_mask"]
        wanted = history[:, -3:].sum(1) / mask[:, -3:].sum(1, keepdim=True).clamp(min=1)
        return 1 - nn.functional.cosine_similarity(found, wanted).mean()

    finetune(
        encoder, loss, batches_from_feeds(feeds_for(USER_ENCODER, 512), 64), steps=100, learning_rate=3e-3
    )
    return encoder


def item_rows() -> ItemRows:
    """The item_encoder engine's module, every layer at random."""
    torch.manual_seed(0)
    encoder = ItemEncoder(dim=SIZES.embedding, num_codes=8, code_slices=((0, 1),))
    rows = ItemRows(encoder, ItemFeatures(SCHEMA, CONFIG), SIZES.embedding).eval()
    for parameter in rows.parameters():
        nn.init.normal_(parameter, std=0.2)
    return rows


def exported(module: nn.Module, *arguments: torch.Tensor) -> bytes:
    """The dynamo exporter's ONNX with an open batch axis, in memory."""
    batch = torch.export.Dim("B", min=1, max=4096)
    shapes = tuple({0: batch} for _ in arguments)
    with torch.no_grad():
        program = torch.onnx.export(
            module.eval(), arguments, dynamo=True, dynamic_shapes=shapes, optimize=True, verbose=False
        )
    assert program is not None
    file = io.BytesIO()
    onnx.save(program.model_proto, file)
    return file.getvalue()
