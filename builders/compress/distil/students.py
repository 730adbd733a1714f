"""Makes students: modules of the same contract and other widths, which distillation trains.

They start with the teacher's numbers wherever name and shape are the same, as DistilBERT does (Sanh et al.
2019 "DistilBERT, a distilled version of BERT"): the ranker's path past the network, its scales and
calibration, whole layers of an encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import nn

from builders.encoders.models import Block, UserEncoder
from builders.ranker.model import Ranker, RankerConfig
from ensemble.errors import InvalidInput
from ensemble.schema import Schema

_Student = TypeVar("_Student", bound=nn.Module)


def student_ranker(
    teacher: Ranker, schema: Schema, config: RankerConfig, widths: Mapping[str, Any], seed: int = 0
) -> Ranker:
    """Makes a ranker of the teacher's `config` but for `widths` (RankerConfig's fields)."""
    _check_names("ranker", widths, {field.name for field in fields(config)})
    for name, size in widths.items():
        if isinstance(size, int) is isinstance(getattr(config, name), tuple):
            raise InvalidInput(
                f"student of ranker: {name} = {size!r}; the teacher's is {getattr(config, name)}"
            )
    sizes = replace(config, **widths)
    if sizes.attention % sizes.heads:
        raise InvalidInput(
            f"student of ranker: attention = {sizes.attention} over heads = {sizes.heads}: want a multiple "
            "of heads"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _start_at(teacher, Ranker(schema, sizes))


def student_user_encoder(teacher: UserEncoder, widths: Mapping[str, int], seed: int = 0) -> UserEncoder:
    """Makes a user encoder of the teacher's sizes but for `layers`, `heads` and `feed`.

    Its embedding's width is the contract's.
    """
    _check_names("user_encoder", widths, set(encoder_sizes(teacher)))
    dim, sizes = len(teacher.default), {**encoder_sizes(teacher), **widths}
    if min(sizes.values()) < 1 or dim % sizes["heads"]:
        raise InvalidInput(
            f"student of user_encoder: {sizes} does not fit width {dim}; sizes are at least 1, and heads "
            f"divides {dim}"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = UserEncoder(
            dim=dim,
            num_user_codes=teacher.codes.table.num_embeddings,
            user_code_slices=teacher.codes.slices,
            num_user_values=teacher.values.in_features,
            interests=teacher.interests,
            temperature=teacher.length**-2,
            max_history=teacher.max_history,
            dropout=teacher.dropout.threshold / 256,
            layers=sizes["layers"],
            heads=sizes["heads"],
            feed=sizes["feed"],
        )
        return _start_at(teacher, encoder)


def encoder_sizes(encoder: UserEncoder) -> dict[str, int]:
    """Gives the sizes that a student of this encoder may have smaller."""
    blocks = [block for block in encoder.blocks if isinstance(block, Block)]
    feed = len(blocks[0].feed.get_submodule("0").get_parameter("weight"))
    return {"layers": len(blocks), "heads": blocks[0].heads, "feed": feed}


def _start_at(teacher: nn.Module, student: _Student) -> _Student:
    """Copies what has the same name and shape; the rest keeps its random start."""
    known = teacher.state_dict()
    same = {
        name: known[name].clone()
        for name, tensor in student.state_dict().items()
        if name in known and known[name].shape == tensor.shape
    }
    student.load_state_dict({**student.state_dict(), **same})
    return student.eval()


def _check_names(model: str, widths: Mapping[str, Any], known: set[str]) -> None:
    for name, value in widths.items():
        if name not in known:
            raise InvalidInput(
                f"student of {model}: {name} = {value!r} is no width of it; known: {', '.join(sorted(known))}"
            )
