"""gpu-check ends with one line where there is no GPU, and its rows mean what they say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pretend
import pytest
from shops import ROOT, private_copy

from builders.bench.gpu_check import PARTS
from builders.bench.gpu_engines import BATCHES, Case
from builders.bench.gpu_roofline import Peak
from builders.bench.gpu_rows import Row
from builders.compile.samples import real_feeds


def test_without_a_gpu_it_is_one_line_and_exit_code_2(tiny_repository, tmp_path):
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    command = [
        sys.executable,
        "-m",
        "builders.bench.gpu_check",
        "-r",
        str(tiny_repository),
        "--json",
        str(tmp_path / "rows.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: no GPU: ")
    assert "--cpu" in done.stderr
    assert not (tmp_path / "rows.json").exists()


def test_a_number_off_by_more_than_its_precision_may_be_is_wrong_and_so_is_nan():
    def row(error: float | None) -> Row:
        return Row("engine", "ranker", "TensorRT", "fp16", 8, 0.1, error, 2e-2)

    assert [row(error).is_wrong for error in (None, 0.0, 2e-2, 2.1e-2, float("nan"), float("inf"))] == [
        False,
        False,
        False,
        True,
        True,
        True,
    ]


def test_arithmetic_and_bytes_are_counted_from_the_graph(tiny_release):
    model = tiny_release.pipeline.model("user_encoder")
    case = Case(tiny_release, model, real_feeds(tiny_release, [model], users=4)["user_encoder"])
    flops, ends = case.work
    import onnx

    products = {
        node.input[1] for node in onnx.load(case.path).graph.node if node.op_type in ("MatMul", "Gemm")
    }
    in_products = sum(
        int(np.prod(t.dims)) for t in onnx.load(case.path).graph.initializer if t.name in products
    )
    assert flops >= 2 * in_products, "every weight of a product is multiplied and added at least once a user"
    assert ends == sum(array[0].nbytes for array in case.feeds.values()) + sum(
        array[0].nbytes for array in case.wanted.values()
    )
    peak = Peak(flops=100e12, bytes=1e12)
    least_s = max(64 * flops / peak.flops, (64 * ends + 5e6) / peak.bytes)
    assert case.roofline(peak, 64, 2.0, 5_000_000) == pytest.approx(least_s / 2e-3)
    assert case.roofline(None, 64, 2.0, 5_000_000) is None
    assert {name: array.shape[0] for name, array in case.part(7).items()} == dict.fromkeys(case.feeds, 7)


def test_plans_are_built_compared_and_timed_in_every_precision_on_a_pretended_gpu(tiny_repository, tmp_path):
    code = """
import dataclasses, json, sys
from pathlib import Path
from builders.compile.stage import tensorrt_toolchain
from builders.bench.gpu_engines import Case, _typed_rows, variants
from builders.compile.samples import real_feeds
from ensemble.steps.served import open_served
release = open_served(Path(sys.argv[1]), "r1")
model = release.model("user_encoder")
case = Case(release, model, real_feeds(release, [model], users=8)["user_encoder"])
from builders.bench.gpu_roofline import Peak
found, peak = variants(case), Peak(1e15, 4e12)
tools = {"tensorrt": (tensorrt_toolchain(), "")}
rows = list(_typed_rows(case, "fp32", found["fp32"], tools, peak))
for name in ("fp16", "int8", "fp8"):
    rows += _typed_rows(case, name, found[name], {"tensorrt": (None, "no GPU")}, None)
print(json.dumps([dataclasses.asdict(row) | {"wrong": row.is_wrong} for row in rows]))
"""
    done = pretend.run(
        pretend.environment(tmp_path), "-c", code, str(private_copy(tiny_repository, tmp_path / "repository"))
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["batch"] for row in rows if row["runtime"].startswith("TensorRT, ")} == {64}
    plans = [row for row in rows if row["runtime"] == "TensorRT" and not row["note"].startswith("no GPU")]
    assert [row["batch"] for row in plans] == list(BATCHES)
    assert all(row["ms"] == 0.5 and row["error"] < 1e-5 and 0 < row["roofline"] < 1 for row in plans)
    typed = {row["note"]: row for row in rows if row["runtime"] == "onnxruntime CPU, typed"}
    assert set(typed) == {"fp16", "int8", "fp8"}
    assert not any(row["wrong"] for row in rows)
    assert typed["fp16"]["error"] < typed["fp8"]["error"], "fp8 keeps 3 bits of mantissa, fp16 10"


def test_rows_travel_as_strict_json():
    row = Row("engines", "ranker", "TensorRT", "fp16", 8, 0.1, float("nan"), 2e-2, note="built")
    back = Row.from_json(row.to_json())
    assert back.is_wrong
    assert "NaN" not in row.to_json()
    assert str(back).startswith("WRONG engines · ranker · TensorRT · fp16 · batch 8 · 0.100 ms")


def test_each_part_runs_by_itself_under_a_limit_and_what_is_known_is_written_at_once(
    tiny_repository, tmp_path
):
    def check(*options: str) -> tuple[int, list[str], list[dict]]:
        out = tmp_path / "rows.json"
        command = [sys.executable, "-m", "builders.bench.gpu_check", "--cpu", "-r", str(tiny_repository)]
        command += ["--json", str(out), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        rows = json.loads(out.read_text())["rows"] if out.exists() else []
        return done.returncode, done.stdout.splitlines(), rows

    code, lines, rows = check("--parts", "twin,faiss", "--patience", "0.001")
    assert code == 0
    assert [(row["part"], row["what"]) for row in rows] == [("twin", "stopped"), ("faiss", "stopped")]
    assert lines[0] == "twin · stopped · after its 0 s"
    code, lines, rows = check("--parts", "twin")
    assert code == 0
    assert [row["batch"] for row in rows] == [1, 64, 0]
    assert rows[0]["rate"] > 0
    assert check("--parts", "twin,twn")[0] == 2


def test_every_part_names_what_gives_its_rows():
    import importlib

    for name, _ in PARTS.values():
        module, _, function = name.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
