"""Shows what the GPU path does on this machine, in one table and one JSON file: `make gpu-check`.

    python -m builders.bench.gpu_check --repository DIR [--release NAME] [--json FILE] [--cpu]

Three parts: every engine in every precision and runtime against onnxruntime; Faiss on the GPU against the
CPU; the whole chain on Triton. What cannot run here says so in its row. Without a GPU it stops with one line
and exit code 2; --cpu runs the rows that need none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from builders.bench.gpu_engines import Case, Row, engine_rows, wall_ms
from builders.bench.gpu_torch import torch_rows
from builders.compile.samples import real_feeds
from builders.compile.stage import Toolchain, engine_models, tensorrt_toolchain
from ensemble.engines.cuda import gpu_facts
from ensemble.errors import PeregrineError, ReleaseError
from ensemble.release.release import active_release
from ensemble.steps.served import ServedRelease, open_served

FAISS_SIZES = (12_000, 1_000_000, 10_000_000)
CPU_FAISS_SIZES = (12_000, 100_000)  # --cpu is for seeing that the rows run
_QUERIES, _NEIGHBOURS, _DIMS = 64, 256, 128
_CHAIN_S, _CPU_CHAIN_S = 3.0, 0.5  # of each of the twenty measurements of the chain


def main() -> None:
    """Runs the check; exit code 0, 1 if a number is off by more than its precision may be, 2 if it cannot
    start."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--repository", "-r", type=Path, default=Path("model_repository"))
    parser.add_argument("--release", help="the active one if not given")
    parser.add_argument("--json", type=Path, default=None, help="write all rows here")
    parser.add_argument("--cpu", action="store_true", help="run the rows that need no GPU")
    options = parser.parse_args()
    try:
        sys.exit(check(options))
    except PeregrineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def check(options: argparse.Namespace) -> int:
    """Runs all parts, prints the table, writes the JSON."""
    machine = _machine(options.cpu)
    name = options.release or active_release(options.repository)
    if name is None:
        raise ReleaseError(
            f"no release is active in {options.repository}", "`make demo` builds one in demo/model_repository"
        )
    release = open_served(options.repository.resolve(), name)
    rows = []
    for row in _all_rows(release, options.cpu):
        rows.append(row)
        print(f"{row.part} {row.what} {row.runtime} {row.precision} {row.batch or ''}", file=sys.stderr)
    _print(rows, machine)
    if options.json:
        facts = {"machine": machine, "release": name, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return int(any(row.is_wrong for row in rows))


def _machine(cpu: bool) -> str:
    try:
        gpu, sm, cuda = gpu_facts()
    except ReleaseError as error:
        if not cpu:
            raise ReleaseError(f"{error}", "--cpu runs the rows that need none") from None
        return f"{platform.machine()}, no GPU"
    return f"{gpu} (SM {sm}, CUDA {cuda})"


def _all_rows(release: ServedRelease, cpu: bool) -> Iterator[Row]:
    models = engine_models(release)
    feeds = real_feeds(release, models, users=64)
    tools, why_not = _tools()
    for model in models:
        case = Case(release, model, feeds[model.name])
        yield from _guarded("engine", model.name, partial(engine_rows, case, tools, why_not))
        yield from _guarded("engine", model.name, partial(torch_rows, case))
    for size in CPU_FAISS_SIZES if cpu else FAISS_SIZES:
        yield from _guarded("faiss", f"{size:,} vectors", partial(_faiss_rows, size))
    yield from _guarded("chain", release.name, partial(_chain_rows, release, cpu))


def _tools() -> tuple[Toolchain | None, str]:
    try:
        return tensorrt_toolchain(), ""
    except PeregrineError as error:
        return None, error.fact


def _guarded(part: str, what: str, rows: Any) -> Iterator[Row]:
    """Gives the rows; a part that fails says why in a row of its own, and the next one runs."""
    try:
        yield from rows()
    except Exception as error:  # a check goes on, whatever a runtime throws
        yield Row(
            part,
            what,
            "failed",
            note=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}",
        )


def _faiss_rows(size: int) -> Iterator[Row]:
    """Searches random unit vectors by a flat inner product: the same neighbours, and the time of a batch."""
    import faiss

    rng = np.random.default_rng(0)
    vectors = np.empty((size, _DIMS), np.float32)
    for start in range(0, size, 1 << 20):
        vectors[start : start + (1 << 20)] = rng.standard_normal(
            (min(1 << 20, size - start), _DIMS), dtype=np.float32
        )
    faiss.normalize_L2(vectors)
    queries = (
        vectors[rng.integers(0, size, _QUERIES)]
        + rng.standard_normal((_QUERIES, _DIMS), dtype=np.float32) * 0.05
    )
    cpu = faiss.IndexFlatIP(_DIMS)
    cpu.add(vectors)
    what = f"{size:,} vectors, {_NEIGHBOURS} neighbours"
    wanted = cpu.search(queries, _NEIGHBOURS)[1]
    yield Row("faiss", what, "faiss CPU", "fp32", _QUERIES, wall_ms(lambda: cpu.search(queries, _NEIGHBOURS)))
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        yield Row(
            "faiss", what, "faiss GPU", note="this Faiss has no GPU part, or sees none; install faiss-gpu"
        )
        return
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(256 << 20)
    gpu = faiss.index_cpu_to_gpu(resources, 0, cpu)
    found = gpu.search(queries, _NEIGHBOURS)[1]
    differing = 1 - float(
        np.mean([len(np.intersect1d(a, b)) / _NEIGHBOURS for a, b in zip(found, wanted, strict=True)])
    )
    yield Row(
        "faiss",
        what,
        "faiss GPU",
        "fp32",
        _QUERIES,
        wall_ms(lambda: gpu.search(queries, _NEIGHBOURS)),
        differing,
        5e-3,
    )


def _chain_rows(release: ServedRelease, cpu: bool) -> Iterator[Row]:
    """Runs `peregrine serve` and `peregrine bench` as a user does: open loop, and the share of each step."""
    command = [sys.executable, "-m", "peregrine"]
    repository = ["--repository", str(release.repository)]
    require = [] if cpu else ["--require", "tensorrt"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "bench.json"
        with (Path(folder) / "serve.log").open("w+") as log:
            server = subprocess.Popen(
                [*command, "serve", *repository, "--port", "0", "--metrics-port", "0", *require],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            try:
                assert server.stdout is not None
                if not server.stdout.readline().startswith("serving release"):
                    log.seek(0)
                    yield Row(
                        "chain",
                        "recommend",
                        "Triton",
                        note=(log.read().strip().splitlines() or ["the server did not start"])[-1],
                    )
                    return
                measured = [
                    "bench",
                    *repository,
                    "--seconds",
                    str(_CPU_CHAIN_S if cpu else _CHAIN_S),
                    "--concurrency",
                    "1,16,64",
                    "--no-perf-analyzer",
                    "--json",
                    str(report),
                ]
                done = subprocess.run([*command, *measured], capture_output=True, text=True, check=False)
            finally:
                server.terminate()
                server.wait(60)
        if done.returncode:
            yield Row(
                "chain",
                "recommend",
                "Triton",
                note=(done.stderr.strip().splitlines() or ["bench failed"])[-1],
            )
            return
        yield from _chain_table(json.loads(report.read_text()))


def _chain_table(report: dict[str, Any]) -> Iterator[Row]:
    """Gives the open loop's p50 at each rate, the throughput, and each step's time when busiest."""
    for row in report["open"]:
        yield Row(
            "chain",
            "recommend, open loop",
            "Triton",
            batch=1,
            ms=row["p50_ms"],
            note=f"{row['rate']:.0f} requests/s; p99 {row['p99_ms']:.2f} ms",
        )
    best = max(report["closed"], key=lambda row: row["achieved_per_s"])
    yield Row(
        "chain",
        "recommend, closed loop",
        "Triton",
        batch=1,
        ms=best["p50_ms"],
        note=f"{best['achieved_per_s']:.0f} requests/s at most",
    )
    for name, step in best["steps"].items():
        phases = ", ".join(
            f"{phase.removesuffix('_ms')} {step[phase]:.2f} ms" for phase in step if phase.endswith("_ms")
        )
        yield Row("chain", name, "Triton", batch=round(step["mean_batch"]), note=phases)


def _print(rows: list[Row], machine: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "part",
        "what",
        "runtime",
        "precision",
        "batch",
        "ms",
        "error",
        "may be",
        "roofline",
        "note",
        title=f"gpu-check on {machine}",
    )
    for row in rows:
        numbers = (
            _text(row.ms, ".3f"),
            _text(row.error, ".1e"),
            _text(row.tolerance, ".0e"),
            _text(row.roofline, ".1%"),
        )
        wrong = "WRONG " if row.is_wrong else ""
        table.add_row(
            row.part, row.what, row.runtime, row.precision, str(row.batch or ""), *numbers, wrong + row.note
        )
    Console(width=max(150, shutil.get_terminal_size().columns)).print(table)


def _text(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


if __name__ == "__main__":
    main()
