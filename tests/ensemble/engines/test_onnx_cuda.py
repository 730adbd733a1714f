"""Shows that a run on tensors that stay where they are gives what a plain run gives.

All but the capture, which needs a GPU, is the same on the CPU.
"""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ensemble.engines import onnx_cuda
from ensemble.engines.onnx import CPU, OnnxEngine
from ensemble.engines.onnx_cuda import CudaOnnxEngine, open_cuda
from ensemble.errors import ReleaseError


@pytest.fixture
def path(tmp_path):
    """Saves scores [B, N] = relu(rows [B, N, 4] @ query [B, 4]): B and N vary, as a ranker's do."""
    nodes = [
        helper.make_node("Unsqueeze", ["query", "last"], ["column"]),
        helper.make_node("MatMul", ["rows", "column"], ["products"]),
        helper.make_node("Squeeze", ["products", "last"], ["flat"]),
        helper.make_node("Relu", ["flat"], ["scores"]),
    ]
    shapes = {"rows": ["B", "N", 4], "query": ["B", 4], "scores": ["B", "N"]}
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items()]
    last = numpy_helper.from_array(np.array([2]), "last")
    graph = helper.make_graph(nodes, "ranker", ends[:2], ends[2:], [last])
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def feeds(rng, batch, candidates=6):
    return {
        "rows": rng.standard_normal((batch, candidates, 4), dtype=np.float32),
        "query": rng.standard_normal((batch, 4), dtype=np.float32),
        "more": rng.standard_normal((batch, 9)),
    }


def test_batches_of_any_size_give_what_a_plain_run_gives(path, rng):
    captured, plain = CudaOnnxEngine(path, provider=CPU), OnnxEngine(path)
    assert (captured.inputs, captured.outputs) == (plain.inputs, plain.outputs)
    for batch in (1, 5, 8, 3, 7, 1):  # a smaller one after a larger one, in the same tensors
        given = feeds(rng, batch)
        answer, wanted = captured.run(given), plain.run(given)
        assert answer["scores"].shape == (batch, 6)
        np.testing.assert_allclose(answer["scores"], wanted["scores"], rtol=1e-6)


def test_an_answer_stays_when_the_next_is_computed(path, rng):
    engine = CudaOnnxEngine(path, provider=CPU)
    first = engine.run(feeds(rng, 4))["scores"]
    kept = first.copy()
    engine.run(feeds(rng, 4))
    np.testing.assert_array_equal(first, kept)


def test_another_number_of_candidates_has_tensors_of_its_own(path, rng):
    engine, plain = CudaOnnxEngine(path, provider=CPU), OnnxEngine(path)
    for candidates in (6, 2, 6):
        given = feeds(rng, 4, candidates)
        np.testing.assert_allclose(engine.run(given)["scores"], plain.run(given)["scores"], rtol=1e-6)


def test_what_cannot_be_captured_runs_node_by_node_and_is_named(path, rng, monkeypatch, capsys):
    def refuse(model, threads):
        raise ReleaseError("a node runs on the CPU")

    monkeypatch.setattr(onnx_cuda, "CudaOnnxEngine", refuse)
    monkeypatch.setattr(onnx_cuda, "OnnxEngine", lambda model, threads, provider: OnnxEngine(model))
    assert open_cuda(path).run(feeds(rng, 2))["scores"].shape == (2, 6)
    said = capsys.readouterr().err
    assert said == f"WARNING: {path} runs on the GPU node by node, not as a graph: a node runs on the CPU\n"


def test_without_cuda_it_says_so(path):
    with pytest.raises(ReleaseError, match="onnxruntime-gpu"):
        open_cuda(path)
