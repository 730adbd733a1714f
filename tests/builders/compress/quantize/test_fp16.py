"""Typed models stay finite on whatever they are given, and no constant is changed by a cast to fp16."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_modules import SCHEMA, SIZES, USER_ENCODER, exported, feeds_for, tensors

from builders.compile.samples import real_feeds
from builders.compile.stage import engine_models
from builders.compress import graph
from builders.compress.quantize.calibration import calibrate
from builders.compress.quantize.fp16 import is_changed
from builders.compress.quantize.quantize import PRECISIONS, choices, quantize
from builders.encoders.models import UserEncoder
from builders.layers import code_slices
from ensemble.arrays import Tensors
from ensemble.engines.onnx import OnnxEngine
from ensemble.errors import InvalidInput

KINDS = PRECISIONS["tensorrt"]


def typed(model: bytes, kind: str, ranges) -> bytes:
    """The model with every block that can be of this kind."""
    blocks = graph.blocks(graph.load(model))
    return quantize(
        model, {b.name: kind for b in blocks if kind in choices(b, "tensorrt")}, ranges, "tensorrt"
    )


def hard(feeds: Tensors) -> Iterator[tuple[str, Tensors]]:
    """What a shop's worst day brings, made of usual feeds."""
    floats = [name for name, array in feeds.items() if array.dtype == np.float32]
    yield "usual", feeds
    yield "zero vectors", {**feeds, **{name: np.zeros_like(feeds[name]) for name in floats}}
    yield "nothing at all", {name: np.zeros_like(array) for name, array in feeds.items()}
    masks = {name: np.zeros_like(array) for name, array in feeds.items() if array.dtype == bool}
    yield "all masked", {**feeds, **masks}
    signs = np.random.default_rng(0)
    for text, sign in (("1e4", lambda _: 1), ("-1e4", lambda _: -1)):
        yield text, {**feeds, **{n: np.full_like(feeds[n], 1e4 * sign(n)) for n in floats}}
    mixed = {n: signs.choice([-1e4, 1e4], feeds[n].shape).astype(np.float32) for n in floats}
    yield "1e4 of mixed signs", {**feeds, **mixed}
    for name in floats:
        yield f"1e4 in {name}", {**feeds, name: np.full_like(feeds[name], 1e4)}


def not_finite(model: bytes, kind: str, feeds: Tensors) -> list[str]:
    engine = OnnxEngine(model, 1, fuse=kind == "fp32")
    return [
        f"{name}: {output}"
        for name, hard_feeds in hard(feeds)
        for output, array in engine.run(hard_feeds).items()
        if not np.isfinite(array).all()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_of_a_release_stays_finite(tiny_release, kind):
    models = engine_models(tiny_release)
    feeds = real_feeds(tiny_release, models, users=8)
    for model in models:
        data = tiny_release.member_file(model.name, "model.onnx").read_bytes()
        ranges = calibrate(data, feeds[model.name], min_users=1)
        assert not_finite(typed(data, kind, ranges), kind, feeds[model.name]) == [], model.name


@pytest.fixture(scope="module")
def blank_encoder() -> bytes:
    """An untrained encoder: the default of who has no history is 0, and so are the rows of codes here."""
    torch.manual_seed(0)
    encoder = UserEncoder(
        dim=SIZES.embedding, num_user_codes=SCHEMA.users.num_codes,
        user_code_slices=code_slices(SCHEMA.users), layers=1, heads=2, max_history=SIZES.history,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in (*encoder.codes.parameters(), *encoder.values.parameters()):
            parameter.zero_()
    return exported(encoder, *tensors(feeds_for(USER_ENCODER, 16)).values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_of_whom_nothing_is_known_has_a_finite_embedding(blank_encoder, kind):
    """The L2 norm of a zero vector divides by its own limit, 1e-12, which fp16 does not have."""
    feeds = feeds_for(USER_ENCODER, 16)
    engine = typed(blank_encoder, kind, calibrate(blank_encoder, feeds, min_users=1))
    assert not_finite(engine, kind, feeds) == []


@pytest.mark.parametrize(
    ("values", "op", "changed"),
    [
        ([1e-12], "Clip", True),
        ([1e-12], "Add", True),
        ([1e5], "Mul", True),
        ([-np.inf], "Where", True),
        ([3e-6], "Mul", True),  # fp16 keeps 6 of 11 digits
        ([0.1], "Mul", False),
        ([0.0], "Clip", False),
        ([1.0, 1e-9], "MatMul", False),  # a weight beside larger ones
        ([1.0, 1e-9], "Max", True),  # a limit of its own
        ([1e-6, 2e-6], "MatMul", True),
        ([], "Add", False),
    ],
)
def test_constants_that_a_cast_changes_are_known(values, op, changed):
    assert is_changed(np.array(values, np.float32), op) is changed


def chain(nodes, constants: dict[str, np.ndarray], width: int = 4) -> bytes:
    """A model from x [B, width] to y [B, width]."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", width]) for n in "xy"]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()


def test_a_block_that_fp16_would_round_to_nothing_is_refused_and_its_neighbours_are_right(rng):
    tiny = (1e-7 * rng.standard_normal((4, 4))).astype(np.float32)
    usual = rng.standard_normal((4, 4)).astype(np.float32)
    scale = np.array(1e7, np.float32)
    model = chain(
        [
            helper.make_node("MatMul", ["x", "tiny"], ["a"], "small"),
            helper.make_node("Mul", ["a", "scale"], ["b"], "grown"),
            helper.make_node("MatMul", ["b", "usual"], ["y"], "plain"),
        ],
        {"tiny": tiny, "usual": usual, "scale": scale},
    )
    feeds = {"x": rng.standard_normal((32, 4)).astype(np.float32)}
    ranges = calibrate(model, feeds, min_users=1)
    with pytest.raises(InvalidInput, match="small cannot be fp16: tiny has nothing above"):
        quantize(model, {"small": "fp16"}, ranges, "tensorrt")
    wanted = OnnxEngine(model).run(feeds)["y"]
    for precisions in ({"plain": "fp16"}, {"plain": "fp16", "small": "int8"}, {"small": "fp8"}):
        found = OnnxEngine(quantize(model, precisions, ranges, "tensorrt"), fuse=False).run(feeds)["y"]
        assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max(), precisions


def test_what_cannot_overflow_is_not_cut_and_what_can_is_cut_far_out(rng):
    weight = rng.standard_normal((4, 4)).astype(np.float32)
    square = chain(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
            helper.make_node("Mul", ["a", "a"], ["b"], "square"),
            helper.make_node("Mul", ["b", "b"], ["c"], "fourth"),
            helper.make_node("MatMul", ["c", "w"], ["y"], "last"),
        ],
        {"w": weight},
    )
    feeds = {"x": rng.uniform(-1, 1, (32, 4)).astype(np.float32)}
    ranges = calibrate(square, feeds, min_users=1)
    engine = quantize(square, {"first": "fp16", "last": "fp16"}, ranges, "tensorrt")
    clips = [n.output[0] for n in onnx.load_from_string(engine).graph.node if n.op_type == "Clip"]
    assert clips[0] == "x_saturated"
    assert "c" in clips
    assert "a" not in clips, "16 times the inputs stay far inside fp16"
    wanted = OnnxEngine(square).run(feeds)["y"]
    np.testing.assert_allclose(OnnxEngine(engine, fuse=False).run(feeds)["y"], wanted, rtol=2e-2, atol=0.1)
    far = {"x": np.full((1, 4), 3e38, np.float32)}
    assert np.isfinite(OnnxEngine(engine, fuse=False).run(far)["y"]).all()
