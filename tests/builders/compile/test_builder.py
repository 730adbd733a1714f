"""NVIDIA's own parser and builder (the wheels of TensorRT for RTX) on every engine, without a GPU: they take
what
we write, and what is called int8, fp8 and fp16 is there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from builders.compile import builder
from builders.compile.builder import Request, build_plan, parsed, target_names
from builders.compile.graph import precision, read_model, use_every_input
from builders.compile.samples import real_feeds
from builders.compile.stage import engine_models
from builders.compress import graph
from builders.compress.quantize.calibration import calibrate
from builders.compress.quantize.quantize import PRECISIONS, choices, quantize
from ensemble.engines.flavors import RTX
from ensemble.engines.plans import Range, ranges
from ensemble.engines.tensorrt import DTYPES, logger
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.spec import ModelSpec

trt = pytest.importorskip("tensorrt_rtx_bindings", reason="the wheels tensorrt-rtx-cu13-* are not installed")
KINDS = PRECISIONS["tensorrt"]
MODELS = ("user_encoder", "ranker", "item_encoder")
QUANTIZED = {"int8": "INT8", "fp8": "FP8"}
# What may stand between a product and the codes it reads: changes of shape.
_MOVES = {"SHUFFLE", "IDENTITY", "SQUEEZE", "UNSQUEEZE"}


@dataclass(frozen=True)
class Typed:
    """An engine with every block that can be of one kind."""

    model: ModelSpec
    data: bytes
    precisions: dict[str, str]
    tables: frozenset[str]  # blocks that are no products
    max_batch: int

    @property
    def request(self) -> Request:
        proto = read_model(self.data, "the model")
        use_every_input(proto)
        profile = ranges(self.model, self.max_batch)
        return Request(proto.SerializeToString(), profile, False, False, None)


@pytest.fixture(scope="module")
def typed(tiny_release) -> dict[tuple[str, str], Typed]:
    models = engine_models(tiny_release)
    feeds, found = real_feeds(tiny_release, models, users=8), {}
    for model in models:
        data = tiny_release.member_file(model.name, "model.onnx").read_bytes()
        blocks, seen = graph.blocks(graph.load(data)), calibrate(data, feeds[model.name], min_users=1)
        for kind in KINDS:
            wanted = {b.name: kind if kind in choices(b, "tensorrt") else "fp16" for b in blocks}
            engine = data if kind == "fp32" else quantize(data, wanted, seen, "tensorrt")
            tables = frozenset(b.name for b in blocks if b.op == "Gather")
            max_batch = tiny_release.pipeline.max_batch
            found[model.name, kind] = Typed(model, engine, wanted, tables, max_batch)
    return found


@pytest.fixture
def network(typed, request) -> Iterator[tuple[Typed, Any]]:
    one = typed[request.param]
    maker = trt.Builder(logger(trt))
    made, parser = parsed(trt, maker, one.request.onnx)
    yield one, made
    del made, parser


every_engine = pytest.mark.parametrize(
    "network", [(m, k) for m in MODELS for k in KINDS], indirect=True, ids=lambda pair: "-".join(pair)
)


@every_engine
def test_the_parsed_network_has_the_contracts_tensors(network):
    one, made = network
    for wanted, count, get in (
        (one.model.inputs, made.num_inputs, made.get_input),
        (one.model.outputs, made.num_outputs, made.get_output),
    ):
        found = {tensor.name: tensor for tensor in map(get, range(count))}
        assert set(found) == {spec.name for spec in wanted}
        for spec in wanted:
            tensor = found[spec.name]
            assert DTYPES[tensor.dtype.name] == spec.dtype
            batch, *dims = tuple(tensor.shape)
            assert batch == -1
            # Where the model leaves an axis open, too (candidates), the profile closes it.
            assert all(found in (size, -1) for found, size in zip(dims, spec.dims, strict=True))
    profile = {one.name: one for one in ranges(one.model, one.max_batch)}
    for spec in one.model.inputs:
        assert profile[spec.name].most == (one.max_batch, *spec.dims)


@every_engine
def test_what_is_called_int8_fp8_and_fp16_is_there(network):
    one, made = network
    layers = [made.get_layer(place) for place in range(made.num_layers)]
    makers = {layer.get_output(at).name: layer for layer in layers for at in range(layer.num_outputs)}
    products = {layer.name: layer for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY}
    named = {name: kind for name, kind in one.precisions.items() if name not in one.tables}
    if set(named.values()) == {"fp32"}:  # as it was exported: its nodes have other names
        assert {product.get_input(0).dtype.name for product in products.values()} == {"FLOAT"}
        named = {}
    else:
        assert set(products) == set(named), "each block is one product of the network, and there is no other"
    for name, kind in named.items():
        for side in range(2):
            tensor = products[name].get_input(side)
            assert tensor.dtype.name == "HALF", (name, kind)
            if kind in QUANTIZED:
                source = _source(tensor, makers)
                assert source.type == trt.LayerType.DEQUANTIZE, (name, side, source.type)
                assert source.get_input(0).dtype.name == QUANTIZED[kind]
                coder = makers.get(source.get_input(0).name)
                assert coder is None or coder.type in (trt.LayerType.QUANTIZE, trt.LayerType.CONSTANT)
    eights = {layer.get_output(0).dtype.name for layer in layers if layer.type == trt.LayerType.QUANTIZE}
    assert eights == {QUANTIZED[kind] for kind in set(named.values()) & QUANTIZED.keys()}


def _source(tensor: Any, makers: dict[str, Any]) -> Any:
    layer = makers[tensor.name]
    while layer.type.name in _MOVES:
        layer = makers[layer.get_input(0).name]
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_every_engine_builds_and_the_builder_warns_of_nothing(typed, model, kind):
    heard: list[str] = []
    request = typed[model, kind].request
    plan = build_plan(Request(request.onnx, request.profile, False, False, None, hear=heard.append), RTX)
    assert len(plan) > 10_000
    assert heard == []


def test_what_the_cpu_alone_can_run_is_refused_by_the_nodes_name(tiny_release):
    """Asymmetric uint8 is onnxruntime's own form."""
    model = tiny_release.model("user_encoder")
    data = tiny_release.member_file(model.name, "model.onnx").read_bytes()
    feeds = real_feeds(tiny_release, [model], users=8)[model.name]
    blocks = graph.blocks(graph.load(data))
    cpu = quantize(data, {b.name: "int8" for b in blocks}, calibrate(data, feeds, min_users=1), "onnxruntime")
    with pytest.raises(ReleaseError, match=r"^TensorRT 1\.\S+ does not take node \S+ \(\w+\): "):
        build_plan(Request(cpu, ranges(model, 8), False, False, None), RTX)


# --- what the builder says


def clamped(low: float) -> bytes:
    """x [B, 4] in fp16, at least `low`."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], "to_half", to=TensorProto.FLOAT16),
        helper.make_node("Clip", ["half", "low"], ["kept"], "the_clamp"),
        helper.make_node("Cast", ["kept"], ["y"], "to_full", to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 4]) for name in "xy"]
    constants = [numpy_helper.from_array(np.array(low, np.float16), "low")]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()


PROFILE = (Range("x", (1, 4), (8, 4), (64, 4)),)


def test_a_warning_that_native_code_prints_names_its_node(capfd):
    heard: list[str] = []
    build_plan(Request(clamped(0.5), PROFILE, False, False, None, hear=heard.append), RTX)
    assert len(heard) == 1, heard
    assert "the_clamp" in heard[0]
    assert "precision-lose casting" in heard[0]
    assert capfd.readouterr() == ("", ""), "a warning in the output of --json would spoil it"


def test_only_warnings_are_kept_from_what_is_printed(capfd):
    heard: list[str] = []
    with builder._overheard(heard.append):
        print("ours")
        sys.stdout.flush()
        os.write(1, b"WARNING: node m overflows\n")
        os.write(2, b"a bar of progress\nWARNING: node n lost its digits\nhalf a line")
    os.write(2, b", and its end\n")
    assert set(heard) == {"WARNING: node n lost its digits", "WARNING: node m overflows"}
    assert capfd.readouterr() == ("ours\n", "a bar of progress\nhalf a line, and its end\n")
    with pytest.raises(ValueError), builder._overheard(heard.append):
        raise ValueError
    os.write(2, b"still there\n")
    assert capfd.readouterr().err == "still there\n"


def test_the_log_is_one_a_process_and_keeps_its_last_lines_only():
    log = logger(trt)
    assert logger(trt) is log, "TensorRT writes to the first it was given"
    for number in range(1000):
        log.log(trt.ILogger.WARNING, f"line {number}\nmore")
    assert len(log.lines) == 200
    assert log.last_line() == "line 999"
    count = log.count
    assert log.since(count) == []
    log.log(trt.ILogger.INFO, "of no weight")
    log.log(trt.ILogger.ERROR, "what failed")
    assert log.since(count) == ["what failed"]
    assert len(log.since(0)) == 200


# --- targets


def test_plans_are_built_for_named_cards_and_no_others():
    assert target_names("sm120, SM89,sm89") == ("8.9", "12.0")
    for text, missing in (("sm90", "sm90"), ("sm89,8.6", "8.6"), ("", "nothing"), ("current", "current")):
        with pytest.raises(
            InvalidInput, match=rf"^--for {text}: {missing} is no target; known: sm75, sm80, "
        ):
            target_names(text)
    one, all_of_them = (
        build_plan(Request(clamped(0.5), PROFILE, False, False, None, targets), RTX)
        for targets in (("8.9",), ())
    )
    assert one != all_of_them


def test_a_model_is_named_by_the_types_it_computes_in(typed):
    assert [precision(read_model(typed["ranker", kind].data, "")) for kind in KINDS] == [
        "fp16+fp32+int8", "fp16+fp32+fp8", "fp16+fp32", "fp32"
    ]  # fmt: skip
