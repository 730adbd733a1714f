"""ONNX Runtime's engine: a file and its bytes answer alike, and what cannot be opened is named."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ensemble.engines.onnx import CUDA, OnnxEngine, adds_exactly
from ensemble.errors import InvalidInput, ReleaseError


@pytest.fixture(scope="module")
def model() -> bytes:
    """A model of y [B, 3] = 2 x [B, 3]."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 3])],
    )
    opset = helper.make_opsetid("", 18)
    built: onnx.ModelProto = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    return built.SerializeToString()


def test_a_file_and_its_bytes_are_the_same_engine(model, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    feeds = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    for engine in (OnnxEngine(path), OnnxEngine(model), OnnxEngine(model, fuse=False)):
        assert (engine.inputs, engine.outputs) == ([("x", "float32", (3,))], [("y", "float32", (3,))])
        np.testing.assert_array_equal(engine.run(feeds)["y"], 2 * feeds["x"])


def test_feeds_that_the_model_does_not_take_are_left_out(model):
    answer = OnnxEngine(model).run({"x": np.ones((1, 3), np.float32), "other": np.ones(1)})
    assert set(answer) == {"y"}


@pytest.mark.parametrize(
    ("flags", "exact"),
    [("avx2 avx512f", False), ("avx512f avx512_vnni", True), ("avx2 avx_vnni", True), (None, False)],
)
def test_exact_kernels_are_asked_for_only_where_the_fast_ones_overflow(flags, exact, tmp_path):
    """With VNNI they give the same numbers, in twice the time."""
    path = tmp_path / "cpuinfo"
    if flags is not None:
        path.write_text(f"processor : 0\nflags : fpu {flags}\n\nprocessor : 1\n")
    assert adds_exactly(path) is exact


def test_what_cannot_be_opened_is_named(model, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(ReleaseError, match=rf"^onnxruntime cannot open {path}: .*No such file"):
        OnnxEngine(path)
    path.write_bytes(b"not a model")
    with pytest.raises(ReleaseError, match=rf"^onnxruntime cannot open {path}: "):
        OnnxEngine(path)
    with pytest.raises(InvalidInput, match=r"^onnxruntime cannot open the model: "):
        OnnxEngine(b"not a model")
    with pytest.raises(ReleaseError, match=rf"^the model: {CUDA} was asked for, active are "):
        OnnxEngine(model, provider=CUDA)
