"""What a server runs its engines on, and from what. Choosing is tried on a pretended GPU; the mount on the
real tritonserver."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pretend
import pytest
from google.protobuf import text_format
from shops import ROOT, private_copy
from toy_repository import publish_toy
from tritonclient.grpc.model_config_pb2 import ModelConfig
from variants import answering, publish_variant

from clients.client import Client
from clients.items import ItemClient
from clients.operations import releases
from ensemble.engines.plans import EngineKey, Node, Plan, find_plans, read_plans
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.live.keeper import service_process
from ensemble.release.files import file_sha256
from ensemble.release.release import Release, open_release
from ensemble.release.repository import aliases_of, member_folders
from ensemble.server import supervisor as serving
from ensemble.server.mount import Mount, with_instances
from ensemble.server.options import ServeOptions
from ensemble.server.prepared import mount_of, prepare_release
from ensemble.server.router_files import only
from ensemble.server.running import RunningServer
from ensemble.server.runtime import Runtime

KEY = EngineKey("ab" * 32, "11.4.0", "13.1", "9.0", "Pretend 9", "fp32", (), False, False)
CHOOSE = """
import json, sys
from pathlib import Path
from ensemble.errors import PeregrineError
from ensemble.server.installation import Installation
from ensemble.server.options import ServeOptions
from ensemble.server.runtime import choose_runtime
repository, installation = Path(sys.argv[1]), Installation(Path("tritonserver"), Path(sys.argv[2]), None)
heard = []
if len(sys.argv) > 5:  # what onnxruntime says of itself
    import onnxruntime
    onnxruntime.get_available_providers = lambda: sys.argv[5].split(",")
try:
    options = ServeOptions(require=sys.argv[3] or None, fused=sys.argv[4] == "fused")
    runtime = choose_runtime(repository, "r1", installation, options, heard.append)
    print(json.dumps([runtime.engine, [plan.member for plan in runtime.plans], list(runtime.flags), heard]))
except PeregrineError as error:
    print(json.dumps([str(error)]))
"""


def chosen(
    env: dict[str, str], repository: Path, backends: Path, require: str = "", fused: str = "", **more: str
) -> list:
    done = pretend.run({**env, **more}, "-c", CHOOSE, str(repository), str(backends), require, fused)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


NO_CUDA = (
    "ONNX Runtime on the GPU: ONNX Runtime has no CUDAExecutionProvider, only AzureExecutionProvider, "
    "CPUExecutionProvider; install onnxruntime-gpu"
)


def no_rtx(more: dict[str, str]) -> str:
    """Why a release without a plan for RTX cards is not served by one, on a node such as `more` says."""
    if more.get("PRETEND_SM", "90") == "90":
        return (
            "TensorRT for RTX opens no plan on SM 9.0: it knows 7.5, 8.0, 8.6, 8.9, 12.0, 12.1 and later; "
            f"this node has {more.get('PRETEND_GPU', 'Pretend 9')}; use --flavor tensorrt, or ONNX Runtime"
        )
    return (
        "TensorRT for RTX: user_encoder: release r1 has no plan of TensorRT for RTX; build plans on this "
        "node: `peregrine compile --flavor rtx`"
    )


ON_CPU = "WARNING: engines run on ONNX Runtime on the CPU. TensorRT: user_encoder: "
COMPILE = "`peregrine compile`"
BUILD = f"; build plans on this node: {COMPILE}"


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    """A backends folder that has Triton's TensorRT backend."""
    folder = tmp_path_factory.mktemp("backends")
    (folder / "tensorrt").mkdir()
    return folder


def test_plans_that_fit_are_served_by_tritons_own_backend_where_it_has_one(gpu, compiled, native, tmp_path):
    assert chosen(gpu, compiled, native) == ["onnxruntime", ["r1_user_encoder", "r1_ranker"], [], []]
    assert chosen(gpu, compiled, native, "tensorrt") == [
        "onnxruntime",
        ["r1_user_encoder", "r1_ranker"],
        [],
        [],
    ]
    assert chosen(gpu, compiled, tmp_path) == ["tensorrt", [], [], []], (
        "no such backend: the engine steps run plans in Python"
    )
    assert chosen(gpu, compiled, native, fused="fused") == ["tensorrt", [], [], []], (
        "one process: no backend to hand to"
    )
    assert chosen(gpu, compiled, native, "onnxruntime") == ["onnxruntime", [], [], []]


@pytest.mark.parametrize(
    ("more", "fact"),
    [
        ({"PRETEND_GPU": "Pretend 8"}, "the plan is for GPU Pretend 9, this node has Pretend 8"),
        ({"PRETEND_SM": "86"}, "the plan is for SM 9.0, this node has 8.6"),
        ({"PRETEND_TENSORRT": "11.3.0.1"}, "the plan is for TensorRT 11.4.0, this node has 11.3.0"),
    ],
)
def test_plans_of_another_node_mean_onnx_said_loudly_or_a_refusal(gpu, compiled, native, more, fact):
    engine, plans, flags, heard = chosen(gpu, compiled, native, **more)
    assert (engine, plans, flags) == ("onnxruntime", [], [])
    assert heard == [f"{ON_CPU}{fact}{BUILD}. {no_rtx(more)}. {NO_CUDA}"]
    (refusal,) = chosen(gpu, compiled, native, "tensorrt", **more)
    assert (
        refusal == f"--require tensorrt: user_encoder: {fact}; build plans on this node: `peregrine compile`"
    )


def test_a_cut_plan_means_onnx_said_loudly(gpu, compiled, native, tmp_path):
    repository = private_copy(compiled, tmp_path / "repository")
    path = next(repository.glob("r1_plans/*/r1_ranker/1/model.plan"))
    path.write_bytes(path.read_bytes()[:100])
    engine, plans, _, (line,) = chosen(gpu, repository, native)
    assert (engine, plans) == ("onnxruntime", [])
    assert line.startswith(
        f"WARNING: engines run on ONNX Runtime on the CPU. TensorRT: {path} was changed or cut short"
    )


def test_no_plans_are_said_where_there_is_a_gpu_and_not_where_there_is_none(gpu, tiny_repository, native):
    assert chosen(gpu, tiny_repository, native)[3] == [
        f"{ON_CPU}release r1 has no plan{BUILD}. {no_rtx({})}. {NO_CUDA}"
    ]
    assert chosen(gpu, tiny_repository, native, PRETEND_GPUS="0") == ["onnxruntime", [], [], []]


def test_portable_plans_need_a_flag_of_the_backend(gpu, tiny_repository, native, tmp_path):
    repository = private_copy(tiny_repository, tmp_path / "repository")
    assert pretend.peregrine(gpu, "compile", "-r", repository, "--portable").returncode == 0
    _, plans, flags, _ = chosen(
        gpu, repository, native, PRETEND_GPU="Pretend 8", PRETEND_SM="86", PRETEND_TENSORRT="11.9.0.1"
    )
    assert (len(plans), flags) == (2, ["--backend-config=tensorrt,version-compatible=true"])


@pytest.fixture(scope="module")
def for_rtx(gpu, tiny_repository, tmp_path_factory) -> Path:
    """A repository whose release has plans for RTX cards, built ahead of them."""
    repository = private_copy(tiny_repository, tmp_path_factory.mktemp("rtx") / "repository")
    done = pretend.peregrine(
        {**gpu, "PRETEND_GPUS": "0"}, "compile", "-r", repository, "--flavor", "rtx", "--ahead"
    )
    assert done.returncode == 0, done.stderr
    return repository


RTX_CARD = {"PRETEND_SM": "89", "PRETEND_GPU": "NVIDIA RTX 4090"}


def test_plans_for_rtx_cards_are_opened_by_the_engine_steps_and_it_is_said_why(gpu, for_rtx, native):
    engine, plans, flags, (line,) = chosen(gpu, for_rtx, native, **RTX_CARD)
    assert (engine, plans, flags) == ("rtx", [], [])
    assert line == (f"engines run on TensorRT for RTX. TensorRT: user_encoder: release r1 has no plan{BUILD}")
    assert chosen(gpu, for_rtx, native, "rtx", **RTX_CARD) == ["rtx", [], [], []]
    (refusal,) = chosen(gpu, for_rtx, native, "tensorrt", **RTX_CARD)
    assert refusal.startswith("--require tensorrt: user_encoder: release r1 has no plan; build")


def test_plans_of_tensorrt_are_taken_before_those_for_rtx_cards(gpu, for_rtx, native, tmp_path):
    repository = private_copy(for_rtx, tmp_path / "repository")
    env = {**gpu, **RTX_CARD}
    assert pretend.peregrine(env, "compile", "-r", repository, "--flavor", "tensorrt").returncode == 0
    assert chosen(env, repository, native)[1] == ["r1_user_encoder", "r1_ranker"]
    assert chosen(env, repository, native, "rtx") == ["rtx", [], [], []]


def test_what_fits_but_does_not_open_is_passed_over(gpu, for_rtx, native, tmp_path):
    repository = private_copy(for_rtx, tmp_path / "repository")
    path = next(repository.glob("r1_plans/*/r1_ranker/1/model.plan"))
    path.write_bytes(b"not a plan")
    manifest = path.parents[2] / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["files"]["r1_ranker/1/model.plan"] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    manifest.write_text(json.dumps(facts))
    engine, _, _, (line,) = chosen(gpu, repository, native, **RTX_CARD)
    assert engine == "onnxruntime"
    refused = f"cannot open {path}: magic tag does not match; build it again on this node: {COMPILE}"
    assert f"TensorRT for RTX: {refused}" in line
    assert chosen(gpu, repository, native, "rtx", **RTX_CARD) == [f"--require rtx: {refused}"]


def test_onnxruntime_on_the_gpu_is_tried_and_not_only_named(gpu, tiny_repository, native):
    """An onnxruntime-gpu whose CUDA libraries are missing lists its provider all the same."""
    providers = "CUDAExecutionProvider,CPUExecutionProvider"
    done = pretend.run(gpu, "-c", CHOOSE, str(tiny_repository), str(native), "", "", providers)
    assert done.returncode == 0, done.stderr
    engine, _, _, (line,) = json.loads(done.stdout)
    assert engine == "onnxruntime"
    assert "ONNX Runtime on the GPU: " in line
    assert "CUDAExecutionProvider was asked for, active are AzureExecutionProvider, CPU" in line


def test_a_gpu_that_opens_no_rtx_plan_is_named_at_once(gpu, for_rtx, native):
    engine, _, _, (line,) = chosen(gpu, for_rtx, native)
    assert engine == "onnxruntime"
    assert f"{no_rtx({})}. {NO_CUDA}" in line
    (refusal,) = chosen(gpu, for_rtx, native, "rtx")
    assert refusal == f"--require rtx: {no_rtx({})}"


@pytest.mark.parametrize("require", ["tensorrt", "rtx", "onnxruntime-gpu", "openvino"])
def test_what_is_required_and_not_there_is_one_line_and_exit_code_2(tiny_repository, require):
    if require != "openvino" and shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    command = [
        sys.executable,
        str(ROOT / "peregrine.py"),
        "serve",
        "-r",
        str(tiny_repository),
        "--port",
        "0",
        "--metrics-port",
        "0",
        "--require",
        require,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "tritonserver not found" in done.stderr:
        pytest.skip("no tritonserver")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith(
        f"error: --require {require}: " + ("known are tensorrt" if require == "openvino" else "no GPU")
    )


def test_a_mount_has_copies_of_what_is_small_and_links_to_what_is_large(compiled, tmp_path):
    release = open_release(compiled, "r1")
    before = digests(compiled)
    mount = Mount(tmp_path)
    for _ in range(2):  # again, over what is there
        mount.add(release)
        mount.point(only("r1"), aliases_of(compiled, "r1"))
    assert mount.has(release)
    links = {
        path.relative_to(mount.folder): path.readlink()
        for path in mount.folder.rglob("*")
        if path.is_symlink()
    }
    assert links == {
        Path(f"r1_{model}/1/model.onnx"): compiled / f"r1_{model}/1/model.onnx"
        for model in ("user_encoder", "ranker", "item_encoder")
    }
    for copied in ("r1_recall/1/model.py", "r1_recall/config.pbtxt", "r1_recommend/configs/fused.pbtxt"):
        assert (mount.folder / copied).read_text() == (compiled / copied).read_text()
    assert (mount.folder / "recommend/config.pbtxt").read_text() == (compiled / "r1/alias.pbtxt").read_text()
    assert {path.name for path in mount.folder.iterdir()} == {
        "recommend",
        *(path.name for path in member_folders(compiled, "r1") if path.name != "r1_plans"),
    }
    plan = read_plans(release)[0]
    assert not mount.has_plan(plan)
    mount.add(release, [plan])
    assert mount.has_plan(plan)
    assert (
        mount.folder / plan.member / "1" / "model.plan"
    ).readlink() == plan.member_folder / "1" / "model.plan"
    assert (mount.folder / plan.member / "configs" / "tensorrt.pbtxt").is_file()
    assert not (mount.folder / plan.member / "1" / "model.py").exists()
    mount.remove("r1")
    assert not mount.has(release)
    assert [path.name for path in mount.folder.iterdir()] == ["recommend"]
    assert digests(compiled) == before, "nothing is written into a release"


def test_a_release_whose_code_is_not_ours_is_not_mounted(tmp_path):
    publish_toy(tmp_path / "models", "r1", tmp_path)
    with pytest.raises(ReleaseError, match=r"1/model\.py is code that Peregrine did not write"):
        Mount(tmp_path / "state").add(open_release(tmp_path / "models", "r1"))


def digests(folder: Path) -> dict[str, str]:
    return {str(path): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.triton
def test_models_without_a_tensorrt_configuration_fall_back_on_a_server_without_that_backend(
    tiny_repository, twin, tmp_path, monkeypatch
):
    """The real server on its mount, with --model-config-name=tensorrt; the plan's folder holds an
    ONNX member instead. The next release has no plan at all, which is said, or refused."""
    repository = private_copy(tiny_repository, tmp_path / "repository")
    plan = Plan(tmp_path / "plans", "r1_ranker", KEY, {})
    shutil.copytree(repository / "r1_ranker", plan.member_folder)
    monkeypatch.setattr(serving, "choose_runtime", lambda *_: Runtime(plans=(plan,)))
    before = set(repository.iterdir())
    with serving.serve(repository, ServeOptions(port=0, metrics_port=None)) as server:
        command = Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")
        assert "--model-config-name=tensorrt" in command
        mounted = Path(
            next(part for part in command if part.startswith("--model-repository=")).partition("=")[2]
        )
        assert (mounted / "r1_ranker/1/model.onnx").readlink() == plan.member_folder / "1" / "model.onnx"
        users = [user.decode() for user in twin.release.user_ids.sorted_ids[:3].tolist()]
        with Client(server.url) as client:
            found = client.recommend_many(users, top_k=5)
        wanted = twin.recommend(users, {"top_k": 5})
        for one, ids in zip(found, wanted["item_ids"], strict=True):
            assert [item.encode() for item in one.item_ids] == ids[ids != b""].tolist()
        _fall_back(repository, mounted, tmp_path)
        _change_an_item(repository, server.url)
    assert not mounted.exists()
    written = {path.name for path in set(repository.iterdir()) - before if not path.name.startswith("r2")}
    assert written <= {".audit.jsonl", ".live", ".lock", ".names.json", ".route.json", ".servers"}
    assert all(path.exists() for path in (repository / "r1_ranker", plan.member_folder)), (
        "removing the links leaves what they led to"
    )


def test_a_number_of_instances_stands_in_the_mounts_configurations(tiny_repository, tmp_path):
    release = open_release(tiny_repository, "r1")
    mount = Mount(tmp_path, instances=7)
    mount.add(release)
    step, ensemble = (mount.folder / name for name in ("r1_recall", "r1_recommend"))
    assert "count: 7" in (step / "config.pbtxt").read_text()
    assert "count" not in (ensemble / "config.pbtxt").read_text(), "an ensemble has no instances"
    assert "count: 7" in (ensemble / "configs" / "fused.pbtxt").read_text()
    assert "count: 2" in (tiny_repository / "r1_recall" / "config.pbtxt").read_text()


def test_engines_of_tritons_own_backend_are_on_every_gpu():
    one = text_format.Parse("instance_group { kind: KIND_GPU count: 2 gpus: 0 }", ModelConfig())
    text = text_format.MessageToString(one)
    assert with_instances(text, None, 1) == text
    group = text_format.Parse(with_instances(text, 7, 3), ModelConfig()).instance_group[0]
    assert (list(group.gpus), group.count) == ([0, 1, 2], 2)


@pytest.mark.parametrize("count", [0, -1, 129])
def test_a_number_of_instances_that_cannot_be_is_refused(count):
    with pytest.raises(InvalidInput, match=f"^--instances {count}: can be 1 to 128$"):
        ServeOptions(instances=count)


def _change_an_item(repository: Path, url: str) -> None:
    """Deletes what the first user is shown first: the steps find the change beside their members."""
    with service_process(repository), Client(url) as client, ItemClient(repository, wait_s=10) as items:
        deadline = time.monotonic() + 30
        while not (repository / ".live" / "writer.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first = client.recommend("u1").item_ids[0]
        assert items.delete(first).done
        assert first not in client.recommend("u1").item_ids


def _fall_back(repository: Path, mounted: Path, scratch: Path) -> None:
    """Activates a release without plans, right after it was published."""
    publish_variant(repository, "r1", "r2", scratch)
    with pytest.raises(ReleaseError, match=r"^--require tensorrt: (no GPU|TensorRT)"):
        releases.activate(repository, "r2", "tensorrt")
    assert answering(repository) == "r1"
    done = releases.activate(repository, "r2")
    assert answering(repository) == "r2"
    assert len(done.notes) == 1
    assert done.notes[0].startswith("release r2 runs on onnxruntime instead of TensorRT: ")
    assert (mounted / "r2_ranker/1/model.onnx").readlink() == repository / "r2_ranker/1/model.onnx"


# --- plans of a release that is activated while a server runs


@pytest.fixture
def two(compiled, tmp_path) -> tuple[Release, Release, RunningServer]:
    """r1 with plans, r2 without, and a server whose own backend runs plans on the pretended GPU."""
    repository = private_copy(compiled, tmp_path / "repository")
    publish_variant(repository, "r1", "r2", tmp_path)
    r1, r2 = open_release(repository, "r1"), open_release(repository, "r2")
    key = read_plans(r1)[0].key
    node = {name: getattr(key, name) for name in ("gpu", "sm", "tensorrt", "cuda")}
    server = RunningServer(1, "", None, "", "", str(tmp_path / "state"), has_plans=True, node=node)
    return r1, r2, server


NO_PLAN = "user_encoder: release r2 has no plan; build plans on this node: `peregrine compile`"


def test_a_release_with_plans_is_loaded_from_them(two):
    r1, _, server = two
    assert prepare_release(server, r1, "tensorrt") == ""
    assert all(mount_of(server).has_plan(plan) for plan in find_plans(r1, Node(**server.node)).values())
    assert (mount_of(server).folder / "r1_recall" / "1" / "model.py").is_file()
    assert prepare_release(server, r1, None, is_loaded=True) == ""


def test_a_release_without_plans_says_what_it_runs_on_or_is_refused(two):
    _, r2, server = two
    assert (
        prepare_release(server, r2, None) == f"release r2 runs on onnxruntime instead of TensorRT: {NO_PLAN}"
    )
    mounted = mount_of(server).folder / "r2_ranker" / "1" / "model.onnx"
    assert mounted.readlink() == r2.repository / "r2_ranker" / "1" / "model.onnx"
    assert prepare_release(server, r2, "onnxruntime").endswith(NO_PLAN)
    for asked, of_the_server in (("tensorrt", None), (None, "tensorrt")):
        with pytest.raises(ReleaseError, match=f"^--require tensorrt: {re.escape(NO_PLAN)}$"):
            prepare_release(dataclasses.replace(server, require=of_the_server), r2, asked)
    steps = dataclasses.replace(server, has_plans=False, engine="tensorrt")
    with pytest.raises(ReleaseError, match=f"runs plans in its engine steps, and {re.escape(NO_PLAN)}$"):
        prepare_release(steps, r2, None)


def test_a_release_that_was_loaded_without_its_plans_says_so(two):
    r1, _, server = two
    mount_of(server).add(r1)
    said = prepare_release(server, r1, None, is_loaded=True)
    assert said == (
        "release r1 runs on onnxruntime instead of TensorRT: r1_user_encoder is loaded without its plan; "
        "activate another release and this one again, or start `peregrine serve` again"
    )
    assert (mount_of(server).folder / "r1_ranker" / "1" / "model.onnx").exists(), "it is in use"


def test_plans_that_the_server_at_work_cannot_use_are_told(two):
    r1, r2, server = two
    onnx = dataclasses.replace(server, has_plans=False, node=None)
    assert prepare_release(onnx, r1, None) == (
        "release r1 has plans, and the server at work runs engines on onnxruntime: start "
        "`peregrine serve` again where they shall be used"
    )
    assert prepare_release(onnx, r2, None) == prepare_release(onnx, r1, "onnxruntime") == ""
    with pytest.raises(ReleaseError, match="--require tensorrt: the server at work runs engines on onnx"):
        prepare_release(onnx, r1, "tensorrt")
    other = dataclasses.replace(server, node={**server.node, "gpu": "Pretend 8"})
    assert "instead of TensorRT: user_encoder: the plan is for GPU" in prepare_release(other, r1, None)


def test_a_release_just_published_is_mounted_with_the_servers_number_of_instances(two):
    _, r2, server = two
    overlay = mount_of(server).folder
    server = dataclasses.replace(server, has_plans=False, instances=7)
    for _ in range(2):  # what is mounted stays
        assert prepare_release(server, r2, None) == ""
        assert "count: 7" in (overlay / "r2_recall" / "config.pbtxt").read_text()
        assert (overlay / "r2_ranker" / "1" / "model.onnx").resolve() == r2.member_file(
            "ranker", "model.onnx"
        )
