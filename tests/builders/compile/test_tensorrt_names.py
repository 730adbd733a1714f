"""Every TensorRT name that the code uses exists in TensorRT 10.16, 11.4 and TensorRT for RTX: held against
NVIDIA's own Python bindings.

TensorRT's bindings are a wheel without the libraries; with stubs in their place they import on any machine,
and all names are real. They go to a cache folder, never into the environment.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pretend import compiler
from shops import ROOT

from ensemble.engines.tensorrt import DTYPES

SOURCES = (ROOT / "ensemble" / "engines" / "tensorrt.py", ROOT / "builders" / "compile" / "builder.py")
VERSIONS = ("10.16", "11.4")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peregrine"
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)
# What objects the code's variables are: their attributes are names of these classes.
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "own": "ITimingCache",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "error": "ParserError",
    "self._engine": "ICudaEngine",
    "self._context": "IExecutionContext",
    "self._runtime": "Runtime",
    "self.config": "IRuntimeConfig",
    "self._cache": "IRuntimeCache",
}
# Functions about TensorRT 8.5 alone.
OLD_ONLY = ("_old_network_flags", "_old_onnx", "_old_settings")
# Functions and classes about TensorRT for RTX alone.
RTX_ONLY = ("_rtx_settings", "target_names", "_KernelCache")


def used_names(leave_out: tuple[str, ...] = (*OLD_ONLY, *RTX_ONLY)) -> set[str]:
    """ "BuilderFlag.SPARSE_WEIGHTS", "IBuilderConfig.set_flag" …: attributes of `trt` and of the variables in
    CLASSES."""
    found = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        tops = [node for node in tree.body if getattr(node, "name", "") not in leave_out]
        for function in (inner for node in tops for inner in ast.walk(node)):
            if isinstance(function, ast.FunctionDef):
                texts = [ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Attribute)]
                found |= {text.removeprefix("trt.") for text in texts if text.startswith("trt.")}
                found |= {
                    f"{CLASSES[owner]}.{name}"
                    for owner, _, name in (text.rpartition(".") for text in texts)
                    if owner in CLASSES
                }
    return found | {f"DataType.{name}" for name in DTYPES} | {"DataType.FLOAT.name"}


def test_the_names_are_found_at_all():
    names = used_names()
    assert {
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "IExecutionContext.execute_async_v3",
        "OnnxParser.parse",
        "Runtime",
        "ParserError.desc",
    } <= names
    assert {
        "BuilderFlag.VERSION_COMPATIBLE",
        "HardwareCompatibilityLevel.AMPERE_PLUS",
        "IBuilderConfig.create_timing_cache",
        "ITimingCache.combine",
    } <= names
    assert not {name for name in names if "FP16" in name or "EXPLICIT_BATCH" in name}, (
        "removed in TensorRT 11"
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_exists_in_the_real_bindings(version, tmp_path):
    bindings = fetched(version)
    stubs = stub_libraries(tmp_path, version.partition(".")[0])
    code = (
        "import sys, tensorrt_bindings as trt\n"
        "def there(name):\n"
        "    owner = trt\n"
        "    for part in name.split('.'):\n"
        "        owner = getattr(owner, part, None)\n"
        "    return owner is not None\n"
        "print(trt.__version__, *(name for name in sys.argv[1:] if not there(name)))"
    )
    env = {
        **os.environ,
        "LD_LIBRARY_PATH": str(stubs),
        "PYTHONPATH": str(bindings),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *sorted(used_names()), "BuilderFlag.NO_SUCH_FLAG"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, *missing = done.stdout.split()
    assert found.startswith(version + ".")
    assert missing == ["BuilderFlag.NO_SUCH_FLAG"]


def test_every_name_exists_in_tensorrt_for_rtx():
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="the wheels tensorrt-rtx-cu13-* are missing")

    def is_there(name: str) -> bool:
        owner = trt
        for part in name.split("."):
            owner = getattr(owner, part, None)
        return owner is not None

    names = used_names(OLD_ONLY)
    assert {"CudaGraphStrategy.WHOLE_GRAPH_CAPTURE", "IRuntimeConfig.create_runtime_cache"} <= names
    assert [name for name in (*names, "BuilderFlag.NONE_SUCH") if not is_there(name)] == [
        "BuilderFlag.NONE_SUCH"
    ]


def fetched(version: str) -> Path:
    """The bindings' folder, fetched once; the test is skipped where pip cannot."""
    folder = CACHE / f"tensorrt-{version}"
    if not (folder / "tensorrt_bindings").is_dir():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--retries=1",
            "--timeout=10",
            "--no-deps",
            "--no-compile",
            "--only-binary=:all:",
            "--target",
            str(folder),
        ]
        done = subprocess.run(
            [*command, f"tensorrt-cu13-bindings=={version}.*"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            pytest.skip(
                f"pip cannot fetch tensorrt-cu13-bindings {version}: "
                f"{done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no reason'}"
            )
    return folder


def stub_libraries(folder: Path, major: str) -> Path:
    """Three libraries that have the functions the bindings are linked to; calling one gives nothing."""
    source = folder / "stub.c"
    source.write_text("\n".join(f"void *{symbol}(void) {{ return 0; }}" for symbol in SYMBOLS))
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        file = f"lib{name}.so.{major}"
        subprocess.run(
            [compiler(), "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", str(folder / file), str(source)],
            check=True,
        )
    return folder
