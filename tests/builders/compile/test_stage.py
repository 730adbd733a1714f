"""`compile`: plans beside the release, whole or not at all. Builders are plain functions here: TensorRT needs
a GPU."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pretend
import pytest
from onnx import TensorProto, helper, numpy_helper
from shops import ROOT, private_copy

from builders.compile import files as plan_files
from builders.compile.graph import is_sparse, precision, read_model, to_old_opset, use_every_input
from builders.compile.samples import real_feeds
from builders.compile.stage import Toolchain, compile_release, engine_models
from ensemble.engines.onnx import OnnxEngine
from ensemble.engines.plans import (
    EngineKey,
    Node,
    Range,
    find_plan,
    find_plans,
    plans_folder,
    ranges,
    read_plans,
)
from ensemble.errors import ReleaseError
from ensemble.release.files import file_sha256
from ensemble.release.manifest import sealed
from ensemble.release.repository import remove, sweep
from ensemble.steps.served import open_served

LATER = "the portable plan is for TensorRT 11.4.0 to the end of its major version, this node has"
NODE = Node("Pretend 9", "9.0", "11.4.0", "13.1")
KEY = EngineKey(
    "ab" * 32,
    "11.4.0",
    "13.1",
    "9.0",
    "Pretend 9",
    "fp16+fp32",
    (Range("x", (1, 4), (8, 4), (64, 4)),),
    False,
    False,
)


FOR_RTX = {"flavor": "rtx", "tensorrt": "1.7.1", "cuda": "", "sm": "", "gpu": ""}
RTX_NODE = {"flavor": "rtx", "tensorrt": "1.7.1", "sm": "8.9", "gpu": "NVIDIA RTX 4090"}
RTX_KNOWS = "it knows 7.5, 8.0, 8.6, 8.9, 12.0, 12.1 and later"


def tools(build=lambda request: request.onnx, node: Node = NODE) -> Toolchain:
    """A plan is the ONNX model itself, run by onnxruntime."""
    return Toolchain(node, build, lambda path: OnnxEngine(path, 1))


@pytest.fixture
def repository(tiny_repository, tmp_path):
    return private_copy(tiny_repository, tmp_path / "repository")


def listing(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leftovers(repository: Path) -> list[str]:
    """Anything a build in progress makes, and plan folders without a manifest."""
    hidden = [path.name for path in repository.iterdir() if path.name.startswith((".staging", ".new-"))]
    return hidden + [
        path.name for path in repository.glob("r1_plans/*") if not (path / "manifest.json").exists()
    ]


# --- what is made


def test_plans_lie_beside_the_release_which_does_not_change(repository):
    before = {name: digest for name, digest in listing(repository).items() if name != ".lock"}
    done = compile_release(repository, "r1", tools())
    assert [one.model for one in done] == ["user_encoder", "ranker", "item_encoder"]
    assert all(one.relative_error <= 1e-5 and not one.reused and one.size_bytes > 0 for one in done)
    after = listing(repository)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in set(after) - set(before)} <= {"r1_plans", ".lock"}
    release = open_served(repository, "r1")
    release.verify()
    plan = find_plans(release, NODE)["ranker"]
    assert plan.path == plans_folder(repository, "r1") / plan.key.digest / "r1_ranker" / "1" / "model.plan"
    assert plan.key.onnx_sha256 == file_sha256(release.member_file("ranker", "model.onnx"))
    assert plan.key.precision == "fp32"
    warm = {path.name: path.stat().st_size for path in (plan.member_folder / "warmup").iterdir()}
    assert warm == {
        t.name: int(np.prod(t.dims)) * np.dtype(t.dtype).itemsize for t in release.model("ranker").inputs
    }


def test_a_second_call_builds_nothing_and_another_gpu_everything(repository):
    compile_release(repository, "r1", tools())
    built = []
    other = dataclasses.replace(NODE, gpu="Pretend 8", sm="8.6")
    assert all(
        one.reused
        for one in compile_release(repository, "r1", tools(lambda request: built.append(1) or request.onnx))
    )
    assert built == []
    assert not any(one.reused for one in compile_release(repository, "r1", tools(node=other)))
    release = open_served(repository, "r1")
    assert {find_plan(release, "ranker", node).key.gpu for node in (NODE, other)} == {
        "Pretend 8",
        "Pretend 9",
    }


def test_the_builder_is_told_the_contracts_shapes_and_feeds_are_real(repository):
    asked = []
    compile_release(repository, "r1", tools(lambda request: asked.append(request) or request.onnx))
    release = open_served(repository, "r1")
    sizes = release.schema.sizes
    ranker = {one.name: one for one in asked[1].profile}
    assert {name: (one.least, one.usual, one.most) for name, one in ranker.items()} == {
        t.name: tuple((batch, *t.dims) for batch in (1, 8, sizes.max_batch))
        for t in release.model("ranker").inputs
    }
    assert asked[0].timing_cache == repository / ".build" / "tensorrt" / "timing-11.4.0-Pretend-9-sm9.0.cache"
    feeds = real_feeds(release, [release.model("user_encoder")], users=5)["user_encoder"]
    assert feeds["history_mask"].any(1).all(), "known users have a past"
    assert all(len(array) == 5 for array in feeds.values())


def test_the_typed_onnx_is_what_plans_are_built_from_where_there_is_one(repository):
    """Another model than model.onnx, so that the plan shows which one it was."""
    typed = repository / "r1_ranker" / "1" / "model.tensorrt.onnx"
    model = onnx.load(repository / "r1_ranker" / "1" / "model.onnx")
    model.producer_name = "typed"
    onnx.save(model, typed)
    path = repository / "r1" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["r1_ranker/1/model.tensorrt.onnx"] = {
        "sha256": file_sha256(typed),
        "bytes": typed.stat().st_size,
    }
    path.write_text(sealed(manifest))
    compile_release(repository, "r1", tools())
    assert find_plan(open_served(repository, "r1"), "ranker", NODE).key.onnx_sha256 == file_sha256(typed)


# --- faults


def test_a_plan_that_computes_something_else_is_not_kept(repository):
    def wrong(request):
        model = onnx.load_from_string(request.onnx)
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2:
                tensor.CopyFrom(
                    numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name)
                )
        return model.SerializeToString()

    with pytest.raises(
        ReleaseError,
        match=r"^user_encoder: the plan's outputs differ from onnxruntime's by .* \(fp32: at most 5e-03\); "
        r"it is not kept$",
    ):
        compile_release(repository, "r1", tools(wrong))
    assert read_plans(open_served(repository, "r1")) == []
    assert leftovers(repository) == []


def test_kill_9_leaves_nothing_half_written_and_the_next_call_goes_on(repository):
    code = (
        f"import os, signal, sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from pathlib import Path\n"
        "from builders.compile import files as f, stage as c\n"
        "from ensemble.engines.onnx import OnnxEngine\n"
        "from ensemble.engines.plans import Node\n"
        "write, count = f._write, []\n"
        "def killing(path, data):\n"
        "    write(path, data); count.append(1)\n"
        "    if 'ranker' in str(path) and len(count) > 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "f._write = killing\n"
        f"tools = c.Toolchain(Node(**{dataclasses.asdict(NODE)!r}), lambda request: request.onnx, lambda "
        "path: OnnxEngine(path, 1))\n"
        f"c.compile_release(Path({str(repository)!r}), 'r1', tools)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [plan.facts["model"] for plan in read_plans(open_served(repository, "r1"))] == ["user_encoder"]
    assert [one.reused for one in compile_release(repository, "r1", tools())] == [True, False, False]
    sweep(repository, print, min_age_s=0)
    assert leftovers(repository) == []


def test_a_full_disk_is_one_line_and_nothing_half_written(repository, monkeypatch):
    write = plan_files._write

    def full(path, data):
        if "r1_ranker" in str(path) and path.parent.name == "warmup":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    monkeypatch.setattr(plan_files, "_write", full)
    with pytest.raises(
        ReleaseError,
        match=r"^compile: no space left in .* \(\d+ MB free\); free some and run it again: it goes on$",
    ):
        compile_release(repository, "r1", tools())
    assert leftovers(repository) == []
    monkeypatch.undo()
    assert [one.reused for one in compile_release(repository, "r1", tools())] == [True, False, False]


def test_a_truncated_onnx_is_refused_by_name(repository):
    path = repository / "r1_ranker" / "1" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ReleaseError, match=r"sha256 mismatch r1_ranker/1/model\.onnx"):
        compile_release(repository, "r1", tools())
    with pytest.raises(
        ReleaseError, match=r"^ranker\.onnx is not a whole ONNX model: .*; build the release again$"
    ):
        read_model(path.read_bytes(), "ranker.onnx")
    assert not plans_folder(repository, "r1").exists()


def test_a_truncated_plan_is_refused_by_name_and_built_again_by_the_next_call(repository):
    compile_release(repository, "r1", tools())
    release = open_served(repository, "r1")
    path = find_plan(release, "ranker", NODE).path
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        ReleaseError,
        match=rf"^{path} was changed or cut short \(sha256 differs from its manifest\); remove its folder "
        r"and run",
    ):
        find_plans(release, NODE)
    assert [one.reused for one in compile_release(repository, "r1", tools())] == [True, False, True]
    find_plans(release, NODE)
    assert leftovers(repository) == []


def test_weights_in_a_file_outside_are_refused():
    tensor = numpy_helper.from_array(np.zeros((2, 2), np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    with pytest.raises(ReleaseError, match=r"outside the model|not a whole ONNX model"):
        read_model(
            _model([helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor]).SerializeToString(), "m.onnx"
        )


def test_plans_of_a_release_go_with_it(repository):
    compile_release(repository, "r1", tools())
    (repository / "recommend" / "config.pbtxt").unlink()
    (repository / ".route.json").unlink()
    remove(repository, "r1")
    assert not plans_folder(repository, "r1").exists()


# --- the key


def test_the_digest_is_stable_and_every_fact_changes_it():
    assert KEY.digest == "7ed6004642f41d53"
    others = {
        "tensorrt": "11.3.0",
        "cuda": "13.0",
        "sm": "8.6",
        "gpu": "other",
        "precision": "int8",
        "sparse": True,
        "portable": True,
        "onnx_sha256": "",
        "profile": (),
        "recipe": 3,
        "flavor": "rtx",
        "targets": ("8.9",),
    }
    assert set(others) == {field.name for field in dataclasses.fields(EngineKey)}
    assert (
        len(
            {
                KEY.digest,
                *(dataclasses.replace(KEY, **{name: value}).digest for name, value in others.items()),
            }
        )
        == len(others) + 1
    )


@pytest.mark.parametrize(
    ("key", "node", "text"),
    [
        ({}, {}, ""),
        ({}, {"cuda": "12.9"}, ""),  # the driver may be renewed
        ({}, {"gpu": "Pretend 8"}, "the plan is for GPU Pretend 9, this node has Pretend 8"),
        ({}, {"sm": "8.6"}, "the plan is for SM 9.0, this node has 8.6"),
        ({}, {"tensorrt": "11.4.1"}, "the plan is for TensorRT 11.4.0, this node has 11.4.1"),
        ({"portable": True}, {"gpu": "Pretend 8", "sm": "8.6", "tensorrt": "11.10.0"}, ""),
        (
            {"portable": True},
            {"sm": "7.5"},
            "the portable plan is for SM 8.0 and later, this node has SM 7.5",
        ),
        ({"portable": True}, {"tensorrt": "11.3.9"}, f"{LATER} 11.3.9"),
        ({"portable": True}, {"tensorrt": "12.0.0"}, f"{LATER} 12.0.0"),
        (
            {"portable": True, "precision": "fp16+fp8"},
            {"sm": "8.0"},
            "the plan does not fit: it computes in fp8, which SM 8.0 does not have (8.9 and later do)",
        ),
        ({"portable": True, "precision": "fp16+fp8"}, {"sm": "8.9"}, ""),
        ({}, {"flavor": "rtx"}, "the plan is TensorRT's, this node has TensorRT for RTX"),
        (FOR_RTX, {}, "the plan is TensorRT for RTX's, this node has TensorRT"),
        (FOR_RTX, RTX_NODE, ""),
        (FOR_RTX, {**RTX_NODE, "sm": "12.1"}, ""),
        (FOR_RTX, {**RTX_NODE, "sm": "13.0"}, ""),
        (FOR_RTX, {**RTX_NODE, "sm": "9.0"}, f"TensorRT for RTX opens no plan on SM 9.0: {RTX_KNOWS}"),
        (FOR_RTX, {**RTX_NODE, "sm": "10.0"}, f"TensorRT for RTX opens no plan on SM 10.0: {RTX_KNOWS}"),
        (
            FOR_RTX,
            {**RTX_NODE, "sm": "7.5"},
            "the portable plan is for SM 8.0 and later, this node has SM 7.5",
        ),
        ({**FOR_RTX, "targets": ("7.5",)}, {**RTX_NODE, "sm": "7.5"}, ""),
        (
            {**FOR_RTX, "targets": ("8.6", "12.0")},
            RTX_NODE,
            "the plan is for SM 8.6, 12.0, this node has 8.9",
        ),
        (
            FOR_RTX,
            {**RTX_NODE, "tensorrt": "1.8.0"},
            "the plan is for TensorRT for RTX 1.7.1, this node has 1.8.0",
        ),
        (
            {**FOR_RTX, "targets": ("7.5",), "precision": "int8"},
            {**RTX_NODE, "sm": "7.5"},
            "the plan does not fit: it computes in int8, which TensorRT for RTX does not have on SM 7.5 "
            "(on 8.0 and later it has)",
        ),
    ],
)
def test_the_fact_that_differs_is_named(key, node, text):
    assert dataclasses.replace(KEY, **key).difference(dataclasses.replace(NODE, **node)) == text


def test_of_several_plans_the_newest_recipe_and_the_last_built_is_found(repository, monkeypatch):
    release = open_served(repository, "r1")
    compile_release(repository, "r1", tools())
    first = find_plan(release, "ranker", NODE)
    monkeypatch.setattr(EngineKey, "__init__", _with_recipe(EngineKey.__init__, 9))
    compile_release(repository, "r1", tools())
    monkeypatch.undo()
    assert find_plan(release, "ranker", NODE).key == dataclasses.replace(first.key, recipe=9)
    compile_release(repository, "r1", tools(), portable=True)
    assert not find_plan(release, "ranker", NODE).key.portable, "one for just this GPU is faster"


def _with_recipe(init, recipe):
    def made(self, *arguments, **more):
        init(self, *arguments, **{"recipe": recipe, **more})

    return made


def test_a_node_without_a_fitting_plan_is_told_why(repository):
    release = open_served(repository, "r1")
    with pytest.raises(
        ReleaseError, match=r"^ranker: release r1 has no plan; build plans on this node: `peregrine compile`$"
    ):
        find_plan(release, "ranker", NODE)
    compile_release(repository, "r1", tools())
    with pytest.raises(
        ReleaseError,
        match=r"^ranker: the plan is for TensorRT 11.4.0, this node has 10.16.1; build plans on this node",
    ):
        find_plan(release, "ranker", dataclasses.replace(NODE, tensorrt="10.16.1"))
    manifest = next(plans_folder(repository, "r1").glob("*/manifest.json"))
    manifest.write_text("{}")
    with pytest.raises(ReleaseError, match=f"^{manifest} is not the manifest of a plan"):
        read_plans(release)


def test_an_axis_without_a_size_is_named(tiny_release):
    spec = tiny_release.pipeline.models[-1]
    answer = next(t for t in spec.outputs if None in t.dims)
    with pytest.raises(ReleaseError, match=f"reranking: {answer.name} .* has an axis without a size"):
        ranges(dataclasses.replace(spec, inputs=(answer,)), 8)


# --- the graph


def _model(nodes, initializers, outputs=("y",), inputs=("x",)):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 16]) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 16]) for name in outputs],
        list(initializers),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _run(model, **feeds):
    import onnxruntime

    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, feeds
    )


def test_an_input_that_nothing_reads_is_read_afterwards_and_changes_nothing(rng):
    weight = numpy_helper.from_array(rng.standard_normal((16, 16), dtype=np.float32), "w")
    model = _model([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight], inputs=("x", "unread", "also"))
    feeds = {name: rng.standard_normal((3, 16), dtype=np.float32) * 1e6 for name in ("x", "unread", "also")}
    before = _run(model, **feeds)
    assert use_every_input(model) == ["unread", "also"]
    onnx.checker.check_model(model, full_check=True)
    assert np.array_equal(_run(model, **feeds)[0], before[0])
    assert {"unread", "also"} <= {name for node in model.graph.node for name in node.input}
    assert use_every_input(model) == []


def test_operators_that_tensorrt_8_5_lacks_are_spelt_out(rng):
    scale, bias = (
        numpy_helper.from_array(rng.standard_normal(16, dtype=np.float32), name) for name in ("s", "b")
    )
    nodes = [
        helper.make_node("LayerNormalization", ["x", "s", "b"], ["h"], epsilon=1e-3),
        helper.make_node("Gelu", ["h"], ["g"]),
        helper.make_node("Gelu", ["g"], ["y"], approximate="tanh"),
    ]
    model = _model(nodes, [scale, bias])
    old = to_old_opset(model)
    onnx.checker.check_model(old)
    assert old.opset_import[0].version == 17
    assert not {"LayerNormalization", "Gelu"} & {node.op_type for node in old.graph.node}
    x = rng.standard_normal((5, 16), dtype=np.float32)
    np.testing.assert_allclose(_run(old, x=x)[0], _run(model, x=x)[0], atol=2e-6)


def test_every_engine_of_a_release_can_be_brought_down_to_opset_17(tiny_release):
    for name, feeds in real_feeds(tiny_release, engine_models(tiny_release), users=4).items():
        model = onnx.load(tiny_release.member_file(name, "model.onnx"))
        use_every_input(model)
        for new, old in zip(_run(to_old_opset(model), **feeds), _run(model, **feeds), strict=True):
            np.testing.assert_allclose(new, old, atol=1e-5)


def test_two_of_four_and_precision_are_read_from_the_weights(rng):
    dense = rng.standard_normal((16, 32), dtype=np.float32)
    sparse = dense * np.tile([1, 0, 0, 1], 8).astype(np.float32)
    for weight, found in (
        (dense, False),
        (sparse, True),
        (sparse.T.copy(), True),
        (np.zeros_like(dense), False),
    ):
        assert is_sparse(_model([], [numpy_helper.from_array(weight, "w")])) is found
    assert precision(_model([], [])) == "fp32"
    half = _model(
        [helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16)],
        [numpy_helper.from_array(np.zeros(1, np.int8), "zero")],
    )
    assert precision(half) == "fp16+fp32+int8"


# --- the command, here and on a pretended GPU


def test_without_a_gpu_the_command_is_one_line_and_exit_code_2(repository):
    done = subprocess.run(
        [sys.executable, str(ROOT / "peregrine.py"), "compile", "-r", str(repository)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        pytest.skip("this machine has a GPU and TensorRT")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith(("error: no GPU: ", "error: TensorRT is not installed here"))
    assert not plans_folder(repository, "r1").exists()


@pytest.mark.parametrize(
    ("version", "options"), [("11.4.0.106", ()), ("10.16.1.11", ("--portable",)), ("8.5.3.1", ())]
)
def test_the_whole_command_on_a_pretended_gpu(repository, tmp_path, version, options):
    env = pretend.environment(tmp_path, PRETEND_TENSORRT=version)
    done = pretend.peregrine(env, "compile", "-r", repository, "--json", *options)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["node"] == {
        "gpu": "Pretend 9",
        "sm": "9.0",
        "tensorrt": ".".join(version.split(".")[:3]),
        "cuda": "13.1",
        "flavor": "tensorrt",
    }
    assert [one["relative_error"] < 1e-5 for one in answer["plans"]] == [True] * 3
    cache = repository / ".build" / "tensorrt" / f"timing-{answer['node']['tensorrt']}-Pretend-9-sm9.0.cache"
    assert len(cache.read_text().split()) == 3, "three builds, one cache"
    assert list(cache.parent.iterdir()) == [cache]
    again = pretend.peregrine(env, "compile", "-r", repository, "--json", *options)
    assert [one["reused"] for one in json.loads(again.stdout)["plans"]] == [True] * 3


SAVES = """
import sys
from pathlib import Path
import tensorrt as trt
from builders.compile.builder import _load_timing_cache, _save_timing_cache

def build(entry):  # what happens between: another build begins
    config = trt.Config(None)
    _load_timing_cache(config, path)
    config.cache.entries.add(entry)
    return config

path = Path(sys.argv[1])
one, two = build("one"), build("two")
_save_timing_cache(one, path)
_save_timing_cache(two, path)
print(path.read_text())
for text in ("damaged", "another-gpu"):
    path.write_text(text)
    _save_timing_cache(build("three"), path)
    print(path.read_text())
print(*path.parent.iterdir())
"""


def test_builds_of_two_pods_add_to_one_file_of_timings(tmp_path):
    path = tmp_path / "cache" / "timing"
    done = pretend.run(pretend.environment(tmp_path), "-c", SAVES, str(path))
    assert done.stdout.splitlines() == ["one two", "three", "three", str(path)], done.stderr


def test_a_volume_of_timings_that_cannot_be_written_costs_no_plan(repository, tmp_path):
    (repository / ".build").mkdir(exist_ok=True)
    (repository / ".build" / "tensorrt").write_text("a file where the folder should be")
    done = pretend.peregrine(pretend.environment(tmp_path), "compile", "-r", repository, "--json")
    assert done.returncode == 0, done.stderr
    notes = [note for one in json.loads(done.stdout)["plans"] for note in one["notes"]]
    assert sum(note.startswith("what was timed is not kept: ") for note in notes) == 3


def test_tensorrt_8_5_makes_no_portable_plan(repository, tmp_path):
    done = pretend.peregrine(
        pretend.environment(tmp_path, PRETEND_TENSORRT="8.5.3.1"), "compile", "-r", repository, "--portable"
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: TensorRT 8.5.3.1 has neither portable plans nor fp8 and bf16; use 10.12 or newer\n"
    )


def test_a_tensorrt_that_does_not_start_says_why(repository, tmp_path):
    done = pretend.peregrine(
        pretend.environment(tmp_path, PRETEND_CUDA_FAILS="1"), "compile", "-r", repository
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: TensorRT does not start: CUDA initialization failure with error: 35; does `nvidia-smi` "
        "show the GPU?\n"
    )
