"""TensorRTEngine and what it stands on. The pretended GPU (tests/helpers/pretend.py) runs its buffers, copies
and DLPack for real."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pretend
import pytest
from shops import ROOT, private_copy

from ensemble.engines import dlpack, open_engine
from ensemble.engines.cuda import NO_GPU, gpu_facts
from ensemble.engines.dlpack import CPU, Borrowed, DeviceTensor
from ensemble.errors import InvalidInput, ReleaseError

START = """\
import sys, ctypes, json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from builders.compile.samples import real_feeds
from ensemble.engines import open_engine
from ensemble.engines.tensorrt import TensorRTEngine, this_node
from ensemble.errors import PeregrineError
from ensemble.engines.plans import find_plan
from ensemble.steps.served import open_served
release = open_served(Path(sys.argv[1]), "r1")
ranker = release.model("ranker")
feeds = real_feeds(release, [ranker])["ranker"]
onnx = open_engine(release.member_file("ranker", "model.onnx"))
driver = ctypes.CDLL("libcuda.so.1")
def plan(): return open_engine(find_plan(release, "ranker", this_node()).path)
def refusal(call, *arguments):
    try: call(*arguments)
    except PeregrineError as error: return str(error)
    raise AssertionError("not refused")
"""


def pretended(env, repository, code: str, **more: str) -> str:
    done = pretend.run({**env, **more}, "-c", START + code, str(repository))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_plan_answers_as_onnxruntime_does_at_every_batch_size_from_any_thread(gpu, compiled):
    pretended(gpu, compiled, """
engine = plan()
assert sorted(engine.inputs) == sorted((t.name, t.dtype, t.dims) for t in ranker.inputs)
assert engine.outputs == [(t.name, t.dtype, t.dims) for t in ranker.outputs]
most = release.pipeline.max_batch
assert engine.max_batch == most
for rows in (1, most // 2 + 1, most, 1):
    part = {name: array[:rows] for name, array in feeds.items()}
    for name, wanted in onnx.run(part).items():
        np.testing.assert_allclose(engine.run(part)[name], wanted, rtol=1e-5, atol=1e-6)
with ThreadPoolExecutor(1) as elsewhere:
    strided = {name: array[::-1] for name, array in feeds.items()}  # made contiguous first
    answer = elsewhere.submit(engine.run, strided).result()
for name, wanted in onnx.run(feeds).items():
    np.testing.assert_allclose(answer[name][::-1], wanted, atol=1e-5)
assert len(engine.time_ms(feeds, 3)) == 3
""")  # fmt: skip


def test_tensors_stay_on_the_gpu_between_steps_and_their_memory_comes_back(gpu, compiled):
    pretended(gpu, compiled, """
from ensemble.engines.dlpack import DeviceTensor
engine = plan()
driver.pretend_allocated.restype = ctypes.c_long
def on_gpu(array):
    array = np.ascontiguousarray(array)
    tensor = DeviceTensor(engine._gpu.allocate(array.nbytes), array.shape, array.dtype, engine._gpu.free)
    engine._gpu.upload(array, tensor.address)
    return tensor
before = driver.pretend_allocated()
given = {name: on_gpu(array) for name, array in feeds.items()}
own = dict(engine._buffers)
# a copy would write to address 0
engine._buffers = {name: 0 if name in feeds else address for name, address in own.items()}
answer = engine.run(given)
kept = engine.run_on_gpu(given)
engine._buffers = own
for name, wanted in onnx.run(feeds).items():
    np.testing.assert_allclose(answer[name], wanted, rtol=1e-5, atol=1e-6)
    out = np.empty_like(wanted)
    engine._gpu.download(kept[name].address, out)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)
assert driver.pretend_allocated() == before + len(given) + len(kept)
del given, kept
assert driver.pretend_allocated() == before, driver.pretend_allocated()
import torch
mixed = engine.run({name: torch.from_numpy(array) for name, array in feeds.items()})  # on the CPU: copied
np.testing.assert_allclose(mixed["candidate_probabilities"], answer["candidate_probabilities"], atol=1e-6)
""")  # fmt: skip


def test_wrong_feeds_are_refused_because_tensorrt_would_read_whatever_lies_there(gpu, compiled):
    pretended(gpu, compiled, """
engine = plan()
name = next(t.name for t in ranker.inputs if t.dtype == "float32" and len(t.dims) == 2)
for value, text in (
    (feeds[name].astype(np.float64), f"{name}: the plan takes float32 "),
    (feeds[name][:, :-1], f"{name}: the plan takes float32 "),
    (feeds[name][:1], "rows: the plan takes one batch of 1 to "),
):
    assert text in refusal(engine.run, {**feeds, name: value}), refusal(engine.run, {**feeds, name: value})
assert "one batch of 1 to" in refusal(engine.run, {n: np.concatenate([a, a]) for n, a in feeds.items()})
assert "one batch of 1 to" in refusal(engine.run, {n: a[:0] for n, a in feeds.items()})
missing = refusal(engine.run, {}).removeprefix("the plan takes ").removesuffix(", which was not given")
assert set(missing.split(", ")) == set(feeds)
""")  # fmt: skip


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"PRETEND_GPU": "Pretend 8"}, "the plan is for GPU Pretend 9, this node has Pretend 8"),
        ({"PRETEND_SM": "86"}, "the plan is for SM 9.0, this node has 8.6"),
        ({"PRETEND_TENSORRT": "10.16.1.11"}, "the plan is for TensorRT 11.4.0, this node has 10.16.1"),
        ({"PRETEND_GPUS": "0"}, "no GPU: the NVIDIA driver is there, but finds no device"),
    ],
)
def test_a_plan_of_another_node_is_refused_naming_the_fact(gpu, compiled, more, text):
    code = (
        'path = next(release.repository.glob("r1_plans/*/r1_ranker/1/model.plan"))\n'
        "print(refusal(open_engine, path))\nprint(refusal(plan))"
    )
    direct, found = pretended(gpu, compiled, code, **more).splitlines()
    assert text in direct
    assert text in found


def test_a_truncated_plan_is_refused_and_one_that_tensorrt_does_not_take_says_so(gpu, compiled, tmp_path):
    repository = private_copy(compiled, tmp_path / "repository")
    path = next(repository.glob("r1_plans/*/r1_ranker/1/model.plan"))
    path.write_bytes(path.read_bytes()[:-1])
    refused = (
        'print(refusal(open_engine, next(release.repository.glob("r1_plans/*/r1_ranker/1/model.plan"))))'
    )
    assert pretended(gpu, repository, refused).startswith(f"{path} was changed or cut short (sha256 differs")
    path.write_bytes(b"not a plan")
    forge = (
        "import builders.compile.files as c\n"
        "folder = next(release.repository.glob('r1_plans/*/r1_ranker')).parent\n"
        "facts = json.loads((folder / 'manifest.json').read_text())\n"
        "del facts['files']; c.seal(folder, facts)\n"
    )
    answer = pretended(gpu, repository, forge + refused)
    assert (
        answer
        == f"cannot open {path}: magic tag does not match; build it again on this node: `peregrine compile`"
    )


def test_the_local_twin_answers_alike_on_plans_and_on_onnx(gpu, compiled):
    code = """
from ensemble.local import LocalPipeline
twin = LocalPipeline(release)
answer = twin.recommend([user.decode() for user in release.user_ids.sorted_ids[:11].tolist()], {"top_k": 5})
engines = sorted({type(step.engine).__name__ for step in twin.steps.values() if hasattr(step, "engine")})
ids = [[item.decode() for item in row] for row in answer["item_ids"].tolist()]
print(json.dumps({"ids": ids, "engines": engines}))
"""
    on_plans = json.loads(pretended(gpu, compiled, code, PEREGRINE_ENGINE="tensorrt"))
    on_onnx = json.loads(pretended(gpu, compiled, code))
    assert (on_plans["engines"], on_onnx["engines"]) == (["TensorRTEngine"], ["OnnxEngine"])
    assert on_plans["ids"] == on_onnx["ids"]


def test_without_a_driver_the_error_says_so():
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    with pytest.raises(ReleaseError, match=f"^{re.escape('; '.join(NO_GPU))}$|finds no device"):
        gpu_facts()


def test_a_provider_that_is_not_active_is_an_error_and_says_what_is(tiny_release):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed: its provider may be active")
    path = tiny_release.member_file("ranker", "model.onnx")
    with pytest.raises(
        ReleaseError,
        match=rf"^{path}: CUDAExecutionProvider was asked for, active are .*CPUExecutionProvider; install "
        r"onnxruntime-gpu",
    ):
        open_engine(path, gpu=True)


def test_an_unknown_runtime_is_refused(tiny_release, monkeypatch):
    from ensemble.engines import EngineStep

    monkeypatch.setenv("PEREGRINE_ENGINE", "openvino")
    with pytest.raises(
        ReleaseError,
        match=r"^PEREGRINE_ENGINE=openvino: known are tensorrt, rtx, onnxruntime-gpu, onnxruntime$",
    ):
        EngineStep(tiny_release.model("ranker"), tiny_release)


# --- DLPack, on the CPU's memory


def given_away(array: np.ndarray, freed: list[int]) -> DeviceTensor:
    keep = array  # lives as long as the function that frees it
    return DeviceTensor(
        keep.ctypes.data, keep.shape, keep.dtype, lambda address: freed.append(len(keep) and address), CPU
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32", "uint8", "bool"])
def test_torch_takes_our_tensors_without_a_copy_and_gives_them_back(rng, dtype):
    torch = pytest.importorskip("torch")
    array, freed = (rng.random((3, 4, 5)) * 9).astype(dtype), []
    taken = torch.from_dlpack(given_away(array, freed))
    assert np.array_equal(taken.numpy(), array)
    assert taken.data_ptr() == array.ctypes.data
    assert freed == []
    del taken
    gc.collect()
    assert freed == [array.ctypes.data]
    assert dlpack._exported == {}


def test_a_capsule_that_nobody_takes_lets_go_of_its_tensor(rng):
    freed: list[int] = []
    capsule = given_away(rng.random(4), freed).__dlpack__()
    assert freed == []
    del capsule
    gc.collect()
    assert len(freed) == 1
    assert dlpack._exported == {}


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
def test_tensors_of_torch_are_borrowed_in_place(rng, dtype):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy((rng.random((2, 6)) * 9).astype(dtype))[:, :]
    borrowed = Borrowed(tensor)
    assert (borrowed.device, borrowed.shape, borrowed.dtype, borrowed.address) == (
        CPU,
        (2, 6),
        np.dtype(dtype),
        tensor.data_ptr(),
    )
    assert np.array_equal(borrowed.array(), tensor.numpy())
    assert Borrowed(tensor[1:]).address == tensor[1:].data_ptr()


def test_what_cannot_be_read_in_place_is_refused(rng):
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidInput, match=r"strides \[1, 2\]; give it contiguous"):
        Borrowed(torch.zeros(6, 2).T)
    with pytest.raises(InvalidInput, match="DLPack type"):
        _ = Borrowed(torch.zeros(2, dtype=torch.complex64)).dtype


def test_the_structures_have_dlpacks_sizes():
    """dlpack.h on a 64-bit machine: DLTensor 48 bytes, DLManagedTensor 64."""
    assert (ctypes.sizeof(dlpack._Tensor), ctypes.sizeof(dlpack._Managed)) == (48, 64)


# --- plans for RTX cards


@pytest.fixture(scope="module")
def on_card(gpu, tiny_repository, tmp_path_factory):
    """(environment of a process on an RTX card, repository with plans for such cards)."""
    repository = private_copy(tiny_repository, tmp_path_factory.mktemp("rtx") / "repository")
    done = pretend.peregrine(gpu, "compile", "-r", repository, "--ahead")
    assert done.returncode == 0, done.stderr
    return {**gpu, "PRETEND_SM": "89", "PRETEND_GPU": "NVIDIA RTX 4090"}, repository


RTX_PLAN = 'path = find_plan(release, "ranker", this_node("rtx")).path\n'


def test_a_plan_for_rtx_cards_answers_as_onnxruntime_does_and_keeps_its_kernels(on_card, tmp_path):
    env, repository = on_card
    code = (
        RTX_PLAN
        + """
engine = open_engine(path)
assert sorted(engine.inputs) == sorted((t.name, t.dtype, t.dims) for t in ranker.inputs)
for name, wanted in onnx.run(feeds).items():
    np.testing.assert_allclose(engine.run(feeds)[name], wanted, rtol=1e-5, atol=1e-6)
"""
    )
    for count in ("1", "2"):
        pretended(env, repository, code, XDG_CACHE_HOME=str(tmp_path))
        (kernels,) = (tmp_path / "peregrine" / "rtx").iterdir()
        assert kernels.read_text() == count, "what was compiled before is read at the next start"
    # Nowhere to write: the plan runs all the same.
    pretended(env, repository, code, XDG_CACHE_HOME="/dev/null")


def test_the_engine_step_opens_the_flavour_that_the_server_chose(on_card):
    env, repository = on_card
    code = """
from ensemble.engines import EngineStep
from ensemble.options import default_options
step = EngineStep(ranker, release)
rows = len(next(iter(feeds.values())))
answer = step.run(default_options(rows), **feeds)["candidate_probabilities"]
np.testing.assert_allclose(answer, onnx.run(feeds)["candidate_probabilities"], atol=1e-6)
print(type(step.engine).__name__)
"""
    assert pretended(env, repository, code, PEREGRINE_ENGINE="rtx") == "TensorRTEngine"
    refused = (
        "import os; os.environ['PEREGRINE_ENGINE'] = 'rtx'\n"
        "from ensemble.engines import EngineStep\nprint(refusal(EngineStep, ranker, release))"
    )
    answer = pretended(env, repository, refused, PRETEND_RTX="1.8.0.1")
    assert answer.startswith(
        "ranker: the plan is for TensorRT for RTX 1.7.1, this node has 1.8.0; build plans"
    )
    answer = pretended(env, repository, refused, PRETEND_SM="100")
    assert answer.startswith("TensorRT for RTX opens no plan on SM 10.0: it knows 7.5, ")


def test_the_rtx_wheels_find_their_own_libraries():
    pytest.importorskip("tensorrt_rtx_bindings", reason="the wheels tensorrt-rtx-cu13-* are not installed")
    env = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    code = "from ensemble.engines.tensorrt import tensorrt_version; print(tensorrt_version('rtx'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"1\.\d+\.\d+\n", done.stdout)
