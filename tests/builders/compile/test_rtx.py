"""`compile --flavor rtx`: plans for RTX cards are built without one, and compared on one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pretend
import pytest
from pretend import compiler
from shops import private_copy

from builders.compile.graph import check_constants, drop_int8_activations
from builders.compile.samples import real_feeds
from builders.compile.stage import Toolchain, compile_release, toolchain
from builders.compress import graph
from builders.compress.quantize.calibration import calibrate
from builders.compress.quantize.quantize import choices, quantize
from ensemble.engines.flavors import version_from_text
from ensemble.engines.onnx import OnnxEngine
from ensemble.engines.plans import TYPED_ONNX, Node, find_plan, read_plans
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release.files import file_sha256
from ensemble.release.manifest import sealed
from ensemble.steps.served import open_served

CARD = {"PRETEND_SM": "89", "PRETEND_GPU": "NVIDIA RTX 4090"}
NODE = Node("NVIDIA RTX 4090", "8.9", "1.7.1", "13.1", "rtx")


@pytest.fixture
def repository(tiny_repository, tmp_path):
    return private_copy(tiny_repository, tmp_path / "repository")


def refusal(env, repository, *options: str) -> str:
    done = pretend.peregrine(env, "compile", "-r", repository, *options)
    assert done.returncode == 2, done.stdout
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr.strip()


def test_plans_built_ahead_are_compared_by_the_first_call_on_a_card(gpu, repository):
    nowhere = {**gpu, "PRETEND_GPUS": "0"}
    done = pretend.peregrine(nowhere, "compile", "-r", repository, "--ahead", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["node"] == {"gpu": "", "sm": "", "tensorrt": "1.7.1", "cuda": "", "flavor": "rtx"}
    assert [(one["relative_error"], one["reused"]) for one in answer["plans"]] == [(None, False)] * 3
    release = open_served(repository, "r1")
    assert all(plan.facts["relative_error"] is None for plan in read_plans(release))
    plan = find_plan(release, "ranker", NODE)
    assert not (plan.member_folder / "configs").exists(), "Triton's own backend must not find it"
    again = pretend.peregrine({**gpu, **CARD}, "compile", "-r", repository, "--flavor", "rtx", "--json")
    assert again.returncode == 0, again.stderr
    plans = json.loads(again.stdout)["plans"]
    assert [one["reused"] for one in plans] == [True] * 3
    assert all(one["relative_error"] < 1e-5 for one in plans)
    assert all(plan.facts["relative_error"] < 1e-5 for plan in read_plans(release))
    for plan in read_plans(release):
        plan.verify()
    other = pretend.peregrine(nowhere, "compile", "-r", repository, "--ahead", "--for", "sm120", "--json")
    assert [one["reused"] for one in json.loads(other.stdout)["plans"]] == [False] * 3
    assert find_plan(release, "ranker", NODE).key.targets == ()


def test_a_gpu_that_opens_no_such_plan_is_one_line(gpu, repository):
    assert refusal(gpu, repository, "--flavor", "rtx") == (
        "error: TensorRT for RTX opens no plan on SM 9.0: it knows 7.5, 8.0, 8.6, 8.9, 12.0, 12.1 and later; "
        "this node has Pretend 9; use --flavor tensorrt, or ONNX Runtime"
    )


def test_what_cannot_be_is_refused_by_name(repository):
    with pytest.raises(InvalidInput, match=r"^--ahead: TensorRT builds on the GPU"):
        toolchain("tensorrt", ahead=True)
    with pytest.raises(InvalidInput, match=r"^--flavor onnx: known are auto, tensorrt, rtx$"):
        toolchain("onnx")
    with pytest.raises(InvalidInput, match=r"^--portable is TensorRT's"):
        compile_release(repository, "r1", tools(NODE), portable=True)
    with pytest.raises(InvalidInput, match=r"^--for is for RTX cards"):
        compile_release(repository, "r1", tools(Node("Pretend 9", "9.0", "11.4.0", "13.1")), targets=("8.9",))


@pytest.mark.parametrize("flavor", ["auto", "tensorrt", "rtx"])
def test_without_a_gpu_the_way_to_build_all_the_same_is_named(flavor):
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    with pytest.raises(ReleaseError, match=r"^no GPU: .*, those for RTX cards anywhere: --ahead$"):
        toolchain(flavor)


def test_auto_takes_tensorrt_where_it_is_installed(gpu):
    code = "from builders.compile.stage import toolchain; print(toolchain().node.flavor)"
    done = pretend.run({**gpu, **CARD}, "-c", code)
    assert done.stdout == "tensorrt\n", done.stderr


def test_bindings_of_another_version_than_tritons_library_build_nothing(gpu, repository, tmp_path):
    """Triton would refuse their plans at start, on the node, in production."""
    env = {**gpu, "LD_LIBRARY_PATH": f"{tmp_path}:{gpu['LD_LIBRARY_PATH']}"}
    _make_nvinfer(tmp_path, 110300)
    assert refusal(env, repository, "--flavor", "tensorrt") == (
        "error: Python's tensorrt is 11.4.0, the libnvinfer that Triton loads is 11.3.0: plans of one do not "
        "open in the other; pip install tensorrt-cu13-bindings==11.3.0.* (of your CUDA), or the image's own"
    )
    _make_nvinfer(tmp_path, 110400)
    code = "from ensemble.engines.tensorrt import check_bindings; print(check_bindings().__name__)"
    assert pretend.run(env, "-c", code).stdout == "tensorrt\n"


def _make_nvinfer(folder: Path, number: int) -> None:
    """Makes a libnvinfer that says this of its version."""
    source = folder / "nvinfer.c"
    source.write_text(f"int getInferLibVersion(void) {{ return {number}; }}")
    library = folder / "libnvinfer.so.11"
    subprocess.run([compiler(), "-shared", "-fPIC", "-o", str(library), str(source)], check=True)


def test_versions_are_told_apart_by_flavour(gpu, repository):
    line = refusal({**gpu, "PRETEND_TENSORRT": "10.11.0.33"}, repository, "--flavor", "tensorrt")
    assert line == "error: TensorRT 10.11.0.33 is none that plans are built with; use 10.12 or newer"
    for flavor, text, old, supported in (
        ("tensorrt", "8.5.3.1", True, True),
        ("tensorrt", "8.4.1", True, False),
        ("tensorrt", "9.3.0.1", False, False),
        ("tensorrt", "10.16.1.11", False, True),
        ("tensorrt", "11.4.0.106", False, True),
        ("rtx", "1.7.1.116", False, True),
        ("rtx", "8.5.0", False, True),
    ):
        version = version_from_text(flavor, text)
        assert (version.is_old, version.is_supported) == (old, supported), (flavor, text)


# --- precisions that a GPU does not have


@pytest.fixture
def typed(repository, tiny_release):
    """A repository whose ranker has a model of this precision for TensorRT."""

    def made(kind: str):
        model = tiny_release.model("ranker")
        data = tiny_release.member_file("ranker", "model.onnx").read_bytes()
        seen = calibrate(data, real_feeds(tiny_release, [model], users=8)["ranker"], min_users=1)
        blocks = graph.blocks(graph.load(data))
        precisions = {b.name: kind for b in blocks if kind in choices(b, "tensorrt")}
        path = repository / "r1_ranker" / "1" / TYPED_ONNX
        path.write_bytes(quantize(data, precisions, seen, "tensorrt"))
        manifest = json.loads((repository / "r1" / "manifest.json").read_text())
        entry = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        manifest["files"][f"r1_ranker/1/{TYPED_ONNX}"] = entry
        (repository / "r1" / "manifest.json").write_text(sealed(manifest))
        return repository

    return made


def tools(node: Node) -> Toolchain:
    return Toolchain(node, lambda request: request.onnx, lambda path: OnnxEngine(path, 1, fuse=False))


def test_a_gpu_without_fp8_is_named_before_anything_is_built(typed):
    repository = typed("fp8")
    old = Node("Pretend 8", "8.6", "11.4.0", "13.1")
    lacking = "ranker: it computes in fp8, which SM 8.6 does not have"
    for node, targets in ((old, ()), (NODE, ("8.6", "12.0"))):
        with pytest.raises(ReleaseError, match=rf"^{lacking} .*; compress with a recipe"):
            compile_release(repository, "r1", tools(node), targets=targets)
    assert all(plan.facts["model"] == "user_encoder" for plan in read_plans(open_served(repository, "r1")))
    done = compile_release(repository, "r1", tools(NODE), targets=("8.9", "12.0"))
    assert [one.precision for one in done] == ["fp32", "fp16+fp32+fp8", "fp32"]


def test_that_int8_is_of_weights_only_on_rtx_cards_stands_in_the_report(typed):
    repository = typed("int8")
    done = {one.model: one.notes for one in compile_release(repository, "r1", tools(NODE))}
    assert done["user_encoder"] == ()
    assert [note.partition(":")[0] for note in done["ranker"]] == ["int8 saves memory, not arithmetic"]
    kept = {one.model: one.notes for one in compile_release(repository, "r1", tools(NODE))}
    assert kept == done, "a plan that is there says it again"
    tensorrt = compile_release(repository, "r1", tools(Node("Pretend 9", "9.0", "11.4.0", "13.1")))
    assert all(one.notes == () for one in tensorrt)


def test_on_rtx_cards_activations_are_not_rounded_to_int8_and_weights_stay(typed):
    path = typed("int8") / "r1_ranker" / "1" / TYPED_ONNX
    model = onnx.load(path)
    ops = [node.op_type for node in model.graph.node]
    weights = ops.count("DequantizeLinear") - ops.count("QuantizeLinear")
    assert drop_int8_activations(model) > 5
    onnx.checker.check_model(model, full_check=True)
    left = [node.op_type for node in model.graph.node]
    assert left.count("QuantizeLinear") == 0
    assert 0 < left.count("DequantizeLinear") <= weights + 5
    release = open_served(path.parents[2], "r1")
    feeds = real_feeds(release, [release.model("ranker")], users=16)["ranker"]
    exact = OnnxEngine(release.member_file("ranker", "model.onnx")).run(feeds)["candidate_probabilities"]
    rounded, weights_only = (
        np.abs(OnnxEngine(data, fuse=False).run(feeds)["candidate_probabilities"] - exact).mean()
        for data in (path.read_bytes(), model.SerializeToString())
    )
    assert weights_only < rounded
    assert drop_int8_activations(model) == 0


def test_fp8_activations_stay_on_rtx_cards(typed):
    model = onnx.load(typed("fp8") / "r1_ranker" / "1" / TYPED_ONNX)
    before = model.SerializeToString()
    assert drop_int8_activations(model) == 0
    assert model.SerializeToString() == before


def test_a_constant_that_a_cast_broke_is_named(tiny_release):
    model = onnx.load(tiny_release.member_file("user_encoder", "model.onnx"))
    assert check_constants(model, "m.onnx") == []
    broken = next(
        t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2
    )
    values = onnx.numpy_helper.to_array(broken).copy()
    values[0, 0] = float("nan")
    broken.CopyFrom(onnx.numpy_helper.from_array(values, broken.name))
    with pytest.raises(ReleaseError, match=rf"^m.onnx: {broken.name}, which node \S+ reads, is NaN"):
        check_constants(model, "m.onnx")
    values = np.full(3, -np.inf, np.float16)
    broken.CopyFrom(onnx.numpy_helper.from_array(values, broken.name))
    (note,) = check_constants(model, "m.onnx")
    assert f"reads {broken.name}, which is infinite in fp16" in note
