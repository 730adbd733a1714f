"""What the house forbids: who may import whom, what a model.py may say, and how files may be read."""

from __future__ import annotations

import ast
import dataclasses
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from shops import ROOT

from builders.publish.triton_config import MODEL_PY, alias_config, config_text, ensemble_config, member_config
from ensemble import contract
from ensemble.errors import WiringError
from ensemble.spec import Axis, ModelSpec, PipelineSpec, TensorSpec

PACKAGES = ("ensemble", "builders", "clients")
OFFLINE = {"torch", "builders", "clients", "pydantic", "pyarrow", "onnx", "onnxscript", "tensorrt"}
HEAVY = (
    "torch",
    "onnxruntime",
    "faiss",
    "pydantic",
    "pyarrow",
    "pandas",
    "matplotlib",
    "PIL",
    "redis",
    "onnx",
)
CLIENTS_MAY = {"numpy", "tritonclient", "grpc", "google", "ensemble", "clients", "typer", "rich"}
CLIENTS_OF_ENSEMBLE = {"arrays", "budget", "contract", "spec", "schema", "errors", "options", "id_rule"}
LIBRARY = ("client", "aio", "errors", "results", "transport", "wire")  # what an application imports


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def sources(*packages: str) -> Iterator[tuple[Path, ast.Module]]:
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, parsed(path)


def imported(tree: ast.AST) -> set[str]:
    """Modules named by import statements, wherever they stand, but for those only a type checker reads."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def imported_at_import(tree: ast.Module) -> set[str]:
    """The same for statements that run when the module is imported."""
    outside = [
        node
        for node in tree.body
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not _for_types_only(node)
    ]
    return set().union(*map(imported, outside), set())


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def modules_after(statement: str) -> set[str]:
    """Names in sys.modules of a fresh Python that ran `statement`."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {statement}; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


# --- imports


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Modules of the three packages, and which of them each names in an import anywhere, for a type checker
    too."""
    trees = {module_of(path): tree for path, tree in sources(*PACKAGES)}
    return {module: (imported(tree) & trees.keys()) - {module} for module, tree in trees.items()}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of nodes that reach each other."""

    def reach(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            waiting += graph[node := waiting.pop()] - seen
            seen |= graph[node]
        return seen

    reached = {node: reach(node) for node in graph}
    around = {node: {other for other in reached[node] if node in reached[other]} for node in graph}
    return [set(names) for names in {frozenset(names) for names in around.values() if names}]


def test_no_modules_import_each_other_in_a_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}], "the test itself finds one"
    assert circles(import_graph()) == []


FLOORS = ["", "release", "engines", "content", "tiers", "live", "index", "steps", "server", "cli"]
# They run what the floors hold
ABOVE_ALL_STEPS = {"ensemble.local", "ensemble.python_model", "ensemble.router_model"}


def test_each_floor_of_the_online_path_stands_on_those_below():
    """The words at the root know no floor; whatever is live, searched or served knows only what lies under
    it."""

    def floor(module: str) -> int:
        room = module.split(".")[1] if module.startswith("ensemble.") else ""
        return FLOORS.index(room) if room in FLOORS else 0

    graph = import_graph()
    above = [
        (module, other)
        for module, others in graph.items()
        for other in others - ABOVE_ALL_STEPS
        if module.startswith("ensemble.") and module not in ABOVE_ALL_STEPS and floor(other) > floor(module)
    ]
    assert above == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "ensemble").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_ensemble_names_nothing_of_the_offline_path(path):
    roots = {name.partition(".")[0] for name in imported(parsed(path))}
    assert not roots & (OFFLINE - {"tensorrt"})
    if path.name not in ("python_model.py", "router_model.py"):
        assert "triton_python_backend_utils" not in roots, "the adapters are its only users"


TENSORRT_IN = {"ensemble/engines/tensorrt.py", "builders/compile/builder.py"}


def test_tensorrt_is_spoken_to_in_two_files_only():
    """The name stands where the package is imported; `trt` is what both call it."""
    found = {
        str(path.relative_to(ROOT))
        for path, tree in sources(*PACKAGES)
        if {name.partition(".")[0] for name in imported(tree)}
        & {"tensorrt", "tensorrt_bindings", "polygraphy"}
        or any(
            isinstance(node, ast.Attribute) and ast.unparse(node).startswith("trt.")
            for node in ast.walk(tree)
        )
    }
    assert found == TENSORRT_IN


def test_ensemble_loads_nothing_of_the_offline_path():
    steps = "import ensemble.local, ensemble.steps.features, ensemble.steps.recall, ensemble.steps.reranking"
    steps += "; import ensemble.release.release, ensemble.server.supervisor"
    steps += "; import ensemble.engines.onnx, ensemble.engines.tensorrt"
    assert not {name.partition(".")[0] for name in modules_after(steps)} & OFFLINE


def test_clients_never_import_builders():
    for path, tree in sources("clients"):
        assert not {
            name for name in imported(tree) if name.split(".")[0] in ("builders", "torch", "pydantic")
        }, path


@pytest.mark.parametrize("module", LIBRARY)
def test_the_client_library_needs_numpy_and_tritonclient_only(module):
    tree = parsed(ROOT / "clients" / f"{module}.py")
    for name in imported_at_import(tree):
        root, _, rest = name.partition(".")
        assert root in CLIENTS_MAY | sys.stdlib_module_names, name
        if root == "ensemble" and rest:
            assert rest.partition(".")[0] in CLIENTS_OF_ENSEMBLE, name


def test_importing_the_client_loads_no_runtime():
    loaded = {name.partition(".")[0] for name in modules_after("from clients import Client, AsyncClient")}
    assert not loaded & {"torch", "faiss", "onnxruntime", "pydantic", "typer", "rich", "builders"}


def test_the_command_line_starts_without_the_heavy_parts():
    assert not {name.partition(".")[0] for name in modules_after("import peregrine")} & {
        *HEAVY,
        "numpy",
        "typer",
    }
    for module in (
        "builders.cli.build",
        "builders.cli.compile",
        "ensemble.cli.serve",
        "clients.cli.recommend",
        "clients.cli.release",
        "clients.cli.bench",
        "clients.cli.events",
        "ensemble.cli.features",
        "ensemble.cli.options",
    ):
        loaded = {name.partition(".")[0] for name in modules_after(f"import {module}")}
        assert not loaded & set(HEAVY), module


def test_importing_any_module_touches_nothing(tmp_path):
    """No file written, no thread started, no output, no GPU asked for."""
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in PACKAGES
        for p in (ROOT / package).rglob("*.py")
    ]
    for adapter in ("ensemble.python_model", "ensemble.router_model"):  # live inside Triton only
        names.remove(adapter)
    code = (
        f"import sys, os, threading; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True\n"
        f"import importlib; [importlib.import_module(n) for n in {sorted(names)!r}]\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert 'torch' not in sys.modules or not sys.modules['torch'].cuda.is_initialized()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


# --- how files may be read


FORBIDDEN = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("package", [*PACKAGES, "peregrine.py"])
def test_nothing_reads_what_could_run_code(package):
    files = [(ROOT / package, parsed(ROOT / package))] if package.endswith(".py") else sources(package)
    for path, tree in files:
        assert not {name.partition(".")[0] for name in imported(tree)} & FORBIDDEN, path
        for name, call in calls(tree):
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert name not in ("eval", "exec", "__import__", "os.system", "yaml.load"), f"{path}: {name}"
            assert name != "torch.load" or keywords.get("weights_only") == "True", f"{path}: {name}"
            assert keywords.get("allow_pickle", "False") == "False", f"{path}: {name}"
            assert keywords.get("shell", "False") == "False", f"{path}: {name}"


def test_numpy_files_are_never_unpickled():
    """allow_pickle is off by default since numpy 1.16.3; the online path says so itself."""
    for path, tree in sources("ensemble"):
        for name, call in calls(tree):
            if name in ("np.load", "numpy.load"):
                assert {k.arg: ast.unparse(k.value) for k in call.keywords}.get("allow_pickle") == "False", (
                    path
                )


MAY_DUMP = {"clients/cli/bench.py", "clients/cli/items.py"}  # one value of a line, which json_text prints


def test_what_commands_print_for_programs_is_strict_json():
    """json.dumps writes NaN, which no JSON has: commands, reports and manifests go through json_text."""
    dumps = {
        str(path.relative_to(ROOT))
        for path, tree in sources(*PACKAGES)
        for name, call in calls(tree)
        if name == "json.dumps"
        and not any(k.arg == "allow_nan" for k in call.keywords)
        and (path.parent.name == "cli" or "report" in ast.unparse(call) or "manifest" in path.name)
    } | {
        str(path.relative_to(ROOT))
        for path in (ROOT / "builders").rglob("*.py")
        if "print(json.dumps(" in path.read_text()
    }
    writers = {"builders/ranker/checkpoint.py"}  # a stage's own file, which the stage reads again
    assert dumps - MAY_DUMP - writers == {"ensemble/release/manifest.py"}, "its digest of what it lists"


# --- the release


def members(repository: Path) -> list[Path]:
    return sorted(path for path in repository.glob("r1_*") if path.is_dir())


def test_model_py_has_no_logic(tiny_repository):
    files = [path / "1" / "model.py" for path in members(tiny_repository) if path.name != "r1_recommend"]
    assert len(files) == 6
    for file in files:
        assert file.read_text() == MODEL_PY
    lines = MODEL_PY.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("import triton_python_backend_utils")
    assert lines[1].startswith("from ensemble.python_model import PythonModel as TritonPythonModel")


def test_every_config_is_what_the_spec_gives(tiny_repository, tiny_release):
    """Byte for byte: nobody edits a config.pbtxt."""
    pipeline = tiny_release.pipeline
    configs = {
        f"r1_{model.name}": member_config(model, "r1", pipeline.max_batch)
        for model in (*pipeline.models, contract.item_encoder(tiny_release.schema))
    }
    configs |= {"r1_recommend": ensemble_config(pipeline, "r1"), "recommend": alias_config(pipeline, "r1")}
    assert {path.parent.name for path in tiny_repository.glob("*/config.pbtxt")} == set(configs)
    for name, config in configs.items():
        assert (tiny_repository / name / "config.pbtxt").read_text() == config_text(config), name


def test_an_ensemble_never_names_a_runtime(tiny_repository):
    for name in ("recommend", "r1_recommend"):
        text = (tiny_repository / name / "config.pbtxt").read_text().lower()
        for runtime in ("onnx", "tensorrt", "plan", "python", "backend", "kind_"):
            assert runtime not in text, f"{name} names {runtime}"
        inside = {p.name for p in (tiny_repository / name / "1").iterdir()}
        assert inside <= {"__pycache__", "model.py"}, "model.py is for configs/fused.pbtxt"


# --- wrong wiring


B, D, N = Axis("B", "batch", None), Axis("D", "embedding", 8), Axis("N", "candidates", 4)
USER, VECTOR, ROWS = (
    TensorSpec("user_id", "bytes", (B, N), ""),
    TensorSpec("vector", "float32", (B, D), ""),
    TensorSpec("rows", "int64", (B, N), ""),
)
FIRST, SECOND = (
    ModelSpec("first", "m:First", (USER,), (VECTOR,)),
    ModelSpec("second", "m:Second", (VECTOR,), (ROWS,)),
)


def pipeline(*models: ModelSpec, outputs: tuple[TensorSpec, ...] = (ROWS,)) -> PipelineSpec:
    return PipelineSpec("p", (USER,), models, outputs, 8)


def test_right_wiring_is_accepted():
    assert pipeline(FIRST, SECOND).model("second") is SECOND


WRONG = {
    "an input that nothing gives": ((SECOND,), {}, "p: second takes vector [B, D] float32, which nothing "
                                                   "before it gives; known: user_id"),
    "steps in the wrong order": ((SECOND, FIRST), {}, "p: second takes vector [B, D] float32, which nothing "
                                                      "before it gives; known: user_id"),
    "two sources of one tensor": (
        (FIRST, dataclasses.replace(FIRST, name="again")), {}, "p: again gives vector, which exists "
                                                               "already; a tensor has one source"),
    "a step that gives the request's tensor": (
        (ModelSpec("echo", "m:Echo", (USER,), (USER,)),), {}, "p: echo gives user_id, which exists already; "
                                                              "a tensor has one source"),
    "another dtype": (
        (FIRST, ModelSpec("second", "m:S", (dataclasses.replace(VECTOR, dtype="int64"),), (ROWS,))), {},
        "p: second takes vector [B, D] int64, but its source gives vector [B, D] float32"),
    "another axis": (
        (FIRST, ModelSpec("second", "m:S", (dataclasses.replace(VECTOR, axes=(B, N)),), (ROWS,))), {},
        "p: second takes vector [B, N] float32, but its source gives vector [B, D] float32"),
    "an answer that nobody gives": ((FIRST,), {}, "p: the answer takes rows [B, N] int64, which nothing "
                                                  "before it gives; known: user_id, vector"),
}  # fmt: skip


@pytest.mark.parametrize(("models", "more", "text"), WRONG.values(), ids=WRONG)
def test_wrong_wiring_is_refused_when_it_is_built(models, more, text):
    with pytest.raises(WiringError) as caught:
        pipeline(*models, **more)
    assert str(caught.value) == text


def test_a_tensor_without_a_batch_axis_is_refused():
    with pytest.raises(WiringError, match=r"^tensor x: the first axis must be B, got \['D'\]$"):
        TensorSpec("x", "float32", (D,), "")


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(WiringError, match=r"^p has no model 'third'; it has first, second$"):
        pipeline(FIRST, SECOND).model("third")


def test_no_tensor_of_the_contract_has_two_names_or_two_shapes(tiny_release):
    """Every tensor of every model is one object of contract.py's table."""
    every: dict[str, TensorSpec] = {}
    for model in (*tiny_release.pipeline.models, contract.item_encoder(tiny_release.schema)):
        for tensor in (*model.inputs, *model.outputs):
            assert every.setdefault(tensor.name, tensor) == tensor
    meanings = [
        tensor.meaning
        for tensor in every.values()
        if "0 = nothing" not in tensor.meaning and "standardized" not in tensor.meaning
    ]
    assert len(set(meanings) - {"bits of contract.Degraded"}) == len(
        [m for m in meanings if m != "bits of contract.Degraded"]
    )


def test_the_engines_tensors_are_the_contracts(tiny_release):
    from ensemble.engines import check_signature, open_engine

    for model in (*tiny_release.pipeline.models, contract.item_encoder(tiny_release.schema)):
        if model.is_engine:
            path = tiny_release.member_file(model.name, "model.onnx")
            check_signature(open_engine(path), model, path)


def test_moving_a_steps_file_makes_no_release_another_contract(tiny_release, monkeypatch):
    schema, before = tiny_release.schema, contract.fingerprint(tiny_release.schema)
    built = contract.recommend(schema)
    moved = dataclasses.replace(
        built,
        models=tuple(
            dataclasses.replace(m, step=m.step if m.is_engine else "elsewhere:Step") for m in built.models
        ),
    )
    monkeypatch.setattr(contract, "recommend", lambda schema: moved)
    assert contract.fingerprint(schema) == before
    monkeypatch.setattr(
        contract, "recommend", lambda schema: dataclasses.replace(moved, models=moved.models[:2], outputs=())
    )
    assert contract.fingerprint(schema) != before


# --- the offline path


STAGES = ["shop", "data", "encoders", "index", "ranker", "export", "compress", "verify", "publish"]


def test_no_stage_imports_a_later_stage():
    """What two stages share lies in the earlier one, or at the root of builders/."""

    def place(module: str) -> int:
        room = module.split(".")[1] if module.count(".") else ""
        return STAGES.index(room) if module.startswith("builders.") and room in STAGES else -1

    later = [
        (module, other)
        for module, others in import_graph().items()
        for other in others
        if 0 <= place(module) < place(other)
    ]
    assert later == []


def test_no_stage_reads_what_a_later_one_wrote(tmp_path):
    """As the table of build.py says, with and without compression."""
    from builders.build import BuildOptions, publication, table
    from builders.compress.recipe import read_recipe
    from builders.presets import preset

    for recipe in ("none", "small"):
        before = {"shop", "catalogue"}
        options = BuildOptions(tmp_path, tmp_path, preset("tiny"), recipe=read_recipe(recipe))
        for stage in table(options):
            assert {*stage.reads, *stage.verified} <= before, stage.name
            before.add(stage.name)
        for is_refit in (False, True):
            assert {*publication(options, is_refit=is_refit).reads} <= before
        assert ("compress" in before) == ("refit_compress" in before) == (recipe != "none")


def test_only_activating_a_built_release_and_measuring_one_need_the_clients():
    """`peregrine build --activate` does what `peregrine release activate` does, gpu-check what bench does."""
    users = [
        (str(path.relative_to(ROOT)), ast.unparse(node))
        for path, tree in sources("builders")
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and any(name.split(".")[0] == "clients" for name in imported(node))
    ]
    line = "from clients.operations.releases import activate as activate_release"
    measuring = [user for user in users if user[0] == "builders/bench/gpu_chain.py"]
    assert all(text.startswith("from clients.bench.") for _, text in measuring)
    assert [user for user in users if user not in measuring] == [("builders/cli/build.py", line)]
