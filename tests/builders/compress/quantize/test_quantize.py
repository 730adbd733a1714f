"""Graphs, ranges and quantized models: tiny torch modules, exported for real, run by the real onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from small_modules import exported
from torch import nn

from builders.compress import graph
from builders.compress.quantize.calibration import calibrate, check_finite
from builders.compress.quantize.quantize import quantize
from ensemble.engines.onnx import open_session
from ensemble.errors import InvalidInput

USERS, LENGTH, WIDTH = 128, 12, 32
# Root mean square, over the outputs' deviation. Symmetric int8 codes of what is never negative use half their
# steps.
INT8_ERROR, SYMMETRIC_INT8_ERROR, FP16_ERROR, FP8_ERROR = 0.03, 0.06, 2e-3, 0.15


class Tiny(nn.Module):
    """All that the passes know: attention, a concatenation, parallel layers with ReLU, LayerNorm, a table of
    codes, softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.key, self.query, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.inside = nn.Linear(2 * WIDTH + 16, 64)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()) for _ in range(2)
        )
        self.out = nn.Linear(16, 1, bias=False)

    def forward(self, states: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """states [B, L, W], codes [B] int32 -> [B, L, 1]."""
        states = states * 2.0
        share = (self.query(states) @ self.key(states).transpose(1, 2) * WIDTH**-0.5).softmax(-1)
        mixed = self.norm(share @ self.value(states))
        known = self.table(codes)[:, None].expand(-1, states.shape[1], -1)
        hidden = torch.relu(self.inside(torch.cat([states, mixed, known], -1)))
        return self.out(sum(expert(hidden) for expert in self.experts)).sigmoid()


@pytest.fixture(scope="module")
def tiny() -> tuple[bytes, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    model = exported(Tiny(), torch.randn(3, LENGTH, WIDTH), torch.tensor([1, 2, 3], dtype=torch.int32))
    rng = np.random.default_rng(0)
    feeds = {
        "states": rng.normal(size=(USERS, LENGTH, WIDTH)).astype(np.float32),
        "codes": rng.integers(0, 40, USERS).astype(np.int32),
    }
    return model, feeds


def output(model: bytes, feeds: dict[str, np.ndarray], fuse: bool = True) -> np.ndarray:
    return open_session(model, fuse=fuse).run(None, feeds)[0]


def error(model: bytes, variant: bytes, feeds: dict[str, np.ndarray], fuse: bool = True) -> float:
    wanted = output(model, feeds)
    return float(np.sqrt(np.mean((output(variant, feeds, fuse) - wanted) ** 2)) / wanted.std())


def names_of(model: bytes) -> list[str]:
    return [block.name for block in graph.blocks(graph.load(model))]


def operations(model: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(model).graph.node]


def test_blocks_bear_the_names_of_the_modules_they_came_from(tiny):
    names = names_of(tiny[0])
    assert {"key", "query", "value", "inside", "experts.0.0", "experts.1.2", "out", "table"} <= set(names)
    assert len(set(names)) == len(names)
    by_name = {block.name: block for block in graph.blocks(graph.load(tiny[0]))}
    assert by_name["inside"].parameters == (2 * WIDTH + 16) * 64 + 64
    assert by_name["inside"].bytes == 4 * by_name["inside"].parameters
    assert by_name["table"].op == "Gather"
    assert sum(graph.sizes(tiny[0]).values()) == len(tiny[0])


def test_int8_for_the_cpu_is_close_to_fp32_at_every_batch_and_keeps_the_contract(tiny):
    model, feeds = tiny
    variant = quantize(model, dict.fromkeys(names_of(model), "int8"), calibrate(model, feeds), "onnxruntime")
    onnx.checker.check_model(variant)
    assert error(model, variant, feeds) < INT8_ERROR
    alone = np.concatenate([output(variant, {n: a[i : i + 1] for n, a in feeds.items()}) for i in range(4)])
    np.testing.assert_allclose(alone, output(variant, feeds)[:4], rtol=1e-5, atol=1e-6)
    before, after = open_session(model), open_session(variant)
    assert [(i.name, i.type) for i in before.get_inputs()] == [(i.name, i.type) for i in after.get_inputs()]
    assert [(o.name, o.type) for o in before.get_outputs()] == [(o.name, o.type) for o in after.get_outputs()]


def test_int8_for_the_cpu_is_fused_into_integer_kernels(tiny, tmp_path):
    model, feeds = tiny
    linear = {
        block.name: "int8"
        for block in graph.blocks(graph.load(model))
        if block.op != "Gather" and block.weight
    }
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(tmp_path / "optimized.onnx")
    ort.InferenceSession(
        quantize(model, linear, calibrate(model, feeds), "onnxruntime"),
        options,
        providers=["CPUExecutionProvider"],
    )
    found = operations((tmp_path / "optimized.onnx").read_bytes())
    assert found.count("QGemm") == len(linear)
    assert found.count("DequantizeLinear") == 0  # no activation goes back to floats but through a QGemm


def test_one_block_alone_changes_only_itself(tiny):
    model, feeds = tiny
    ranges = calibrate(model, feeds)
    errors = {
        name: error(model, quantize(model, {name: "int8"}, ranges, "onnxruntime"), feeds)
        for name in names_of(model)
    }
    assert all(0 < each < INT8_ERROR for each in errors.values()), errors


def test_int8_shrinks_a_model_by_what_its_blocks_weigh(tiny):
    model, feeds = tiny
    variant = quantize(model, dict.fromkeys(names_of(model), "int8"), calibrate(model, feeds), "onnxruntime")
    weights = sum(block.bytes for block in graph.blocks(graph.load(model)))
    small = sum(size for name, size in graph.sizes(variant).items() if name != "(graph)")
    assert small < 0.4 * weights


@pytest.mark.parametrize(
    ("precision", "limit"), [("fp16", FP16_ERROR), ("int8", SYMMETRIC_INT8_ERROR), ("fp8", FP8_ERROR)]
)
def test_typed_graph_for_tensorrt_runs_on_the_cpu_and_is_close_to_fp32(tiny, precision, limit):
    model, feeds = tiny
    blocks = graph.blocks(graph.load(model))
    wanted = {block.name: "fp16" if block.op == "Gather" else precision for block in blocks}
    variant = quantize(model, wanted, calibrate(model, feeds), "tensorrt")
    onnx.checker.check_model(variant, full_check=True)
    assert 0 < error(model, variant, feeds, fuse=False) < limit
    proto = onnx.load_from_string(variant)
    makers = {name: node for node in proto.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            assert constants[node.input[1]].data_type == TensorProto.FLOAT16
            assert not graph.array(constants[node.input[2]]).astype(np.float32).any()  # symmetric
        if node.op_type in ("LayerNormalization", "Softmax"):
            # normalized in fp32
            assert node.input[0] not in makers or makers[node.input[0]].op_type == "Cast"
        if node.op_type == "Add":
            # no Q/DQ at the bias
            assert all(makers[name].op_type != "DequantizeLinear" for name in node.input if name in makers)
    per_channel = [
        node
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and constants[node.input[1]].dims
    ]
    assert bool(per_channel) == (precision == "int8")


def test_blocks_left_at_fp32_stay_what_they_were(tiny):
    model, feeds = tiny
    for runtime in ("onnxruntime", "tensorrt"):
        np.testing.assert_array_equal(
            output(quantize(model, {}, calibrate(model, feeds), runtime), feeds), output(model, feeds)
        )


@pytest.mark.parametrize(
    ("runtime", "precision"), [("onnxruntime", "int8"), ("tensorrt", "fp8"), ("tensorrt", "fp16")]
)
def test_same_choice_same_bytes(tiny, runtime, precision):
    model, feeds = tiny
    wanted = {block.name: precision for block in graph.blocks(graph.load(model)) if block.op != "Gather"}
    assert quantize(model, wanted, calibrate(model, feeds), runtime) == quantize(
        model, wanted, calibrate(model, feeds), runtime
    )


class Loud(nn.Module):
    """Its first layer's output does not fit into fp16."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(16, 16), nn.Linear(16, 4)
        nn.init.constant_(self.loud.weight, 3e4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, 16] -> [B, 3, 4]."""
        return self.quiet(self.loud(x) / 1e5)


def test_fp16_that_overflows_is_refused_by_name_and_the_rest_can_still_be_fp16():
    model = exported(Loud(), torch.rand(3, 3, 16))
    feeds = {"x": np.random.default_rng(0).random((USERS, 3, 16)).astype(np.float32)}
    ranges = calibrate(model, feeds)
    with pytest.raises(InvalidInput, match=r"loud cannot be fp16: .* reaches"):
        quantize(model, {"loud": "fp16"}, ranges, "tensorrt")
    for precision in ("int8", "fp16"):  # int8 around an overflow computes in fp32
        variant = quantize(
            model, {"quiet": "fp16", **({"loud": "int8"} if precision == "int8" else {})}, ranges, "tensorrt"
        )
        assert error(model, variant, feeds, fuse=False) < INT8_ERROR


def test_a_typed_model_that_is_not_finite_is_refused_by_the_node(tiny):
    model, feeds = tiny
    variant = quantize(model, {"inside": "fp16"}, calibrate(model, feeds), "tensorrt")
    check_finite(variant, feeds)
    proto = onnx.load_from_string(variant)
    weight = next(
        tensor
        for tensor in proto.graph.initializer
        if tensor.data_type == TensorProto.FLOAT16 and len(tensor.dims) == 2
    )
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full(weight.dims, np.inf, np.float16), weight.name))
    with pytest.raises(InvalidInput, match=r"inside \(MatMul\) is not finite at float16"):
        check_finite(proto.SerializeToString(), feeds)


def test_what_cannot_be_quantized_is_refused_with_what_can(tiny):
    model, feeds = tiny
    ranges = calibrate(model, feeds)
    with pytest.raises(InvalidInput, match=r"no block tower .* it has .*experts\.0\.0"):
        quantize(model, {"tower": "int8"}, ranges, "onnxruntime")
    with pytest.raises(
        InvalidInput, match=r"table \(Gather\) cannot be fp8 on tensorrt; it can be fp16, fp32"
    ):
        quantize(model, {"table": "fp8"}, ranges, "tensorrt")
    with pytest.raises(InvalidInput, match=r"inside .* cannot be fp16 on onnxruntime; it can be int8, fp32"):
        quantize(model, {"inside": "fp16"}, ranges, "onnxruntime")
    with pytest.raises(InvalidInput, match="runtime tvm is unknown"):
        quantize(model, {"inside": "int8"}, ranges, "tvm")
    with pytest.raises(InvalidInput, match="inside has no calibrated range"):
        quantize(model, {"inside": "int8"}, {}, "onnxruntime")


def test_models_that_are_not_one_whole_file_are_refused(tiny):
    proto = onnx.load_from_string(tiny[0])
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
    proto.graph.initializer[0].external_data.add(key="location", value="../secret")
    with pytest.raises(InvalidInput, match=f"{proto.graph.initializer[0].name} lies in another file"):
        graph.load(proto.SerializeToString())
    for broken in (tiny[0][: len(tiny[0]) // 2], b"", b"no model at all"):
        with pytest.raises(InvalidInput, match="cut short"):
            graph.load(broken)


def test_too_few_calibration_users_are_refused_with_both_numbers(tiny):
    model, feeds = tiny
    with pytest.raises(InvalidInput, match="needs 128 users, 100 are given"):
        calibrate(model, {name: values[:100] for name, values in feeds.items()})
    with pytest.raises(InvalidInput, match="no feed for codes"):
        calibrate(model, {"states": feeds["states"]})


def test_calibration_refuses_a_model_that_is_not_finite(tiny):
    model, feeds = tiny
    with pytest.raises(InvalidInput, match="not finite on the calibration users"):
        calibrate(model, {**feeds, "states": np.full_like(feeds["states"], 1e38)})


def test_ranges_cover_what_was_seen_and_clip_rare_outliers(tiny):
    model, feeds = tiny
    states = feeds["states"].copy()
    states[0, 0, 0] = 40.0
    found = calibrate(model, {**feeds, "states": states})["states"]
    assert found.amplitude == 40.0
    assert found.high <= 40.0
    assert found.shape == (LENGTH, WIDTH)


# --- convolutions: what image encoders are made of


class Seen(nn.Module):
    """Convolutions, one of them of each channel alone, limited and not, with a sum around two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU6())
        self.wide = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU6())
        self.each = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU())
        self.narrow = nn.Conv2d(32, 16, 1)
        self.out = nn.Linear(16, 8)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels [B, 3, Y, X] -> [B, 8]."""
        seen = self.first(pixels)
        return self.out((seen + self.narrow(self.each(self.wide(seen)))).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def seen() -> tuple[bytes, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).random((32, 3, 16, 16), np.float32)
    return exported(Seen(), torch.from_numpy(pixels[:3])), {"pixels": pixels}


@pytest.mark.parametrize(
    ("runtime", "kind", "most"),
    [
        ("onnxruntime", "int8", INT8_ERROR),
        ("tensorrt", "int8", SYMMETRIC_INT8_ERROR),
        ("tensorrt", "fp16", FP16_ERROR),
    ],
)
def test_convolutions_are_rounded_and_hardly_change(seen, runtime, kind, most):
    model, feeds = seen
    ranges = calibrate(model, feeds, min_users=1)
    blocks = graph.blocks(graph.load(model))
    assert [block.op for block in blocks] == ["Conv"] * 4 + [blocks[-1].op]
    small = quantize(model, {block.name: kind for block in blocks}, ranges, runtime)
    onnx.checker.check_model(onnx.load_model_from_string(small), full_check=True)
    assert error(model, small, feeds, fuse=runtime == "onnxruntime") < most
    per_weight = {"int8": 1, "fp16": 2}[kind]
    weights = [t for t in onnx.load_model_from_string(small).graph.initializer if len(t.dims) == 4]
    assert len(weights) == 4
    assert all(graph.array(tensor).itemsize == per_weight for tensor in weights)


def test_onnxruntime_runs_each_convolution_on_codes_from_end_to_end(seen, tmp_path):
    model, feeds = seen
    names = [block.name for block in graph.blocks(graph.load(model))]
    small = quantize(model, dict.fromkeys(names, "int8"), calibrate(model, feeds, min_users=1), "onnxruntime")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(small, options)
    ops = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert ops.count("QLinearConv") == 4
    assert not {"Conv", "FusedConv", "ConvInteger"} & set(ops)
