"""Triton's perf_analyzer: where its binary is, how to get it, how to run it, what it says.

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


@dataclass(frozen=True)
class PerfAnalyzer:
    """A perf_analyzer that starts on this machine."""

    binary: Path
    libraries: Path | None  # folder for LD_LIBRARY_PATH

    def environment(self) -> dict[str, str]:
        paths = [str(self.libraries)] if self.libraries else []
        return {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
        }


def cache_folder() -> Path:
    """$PEREGRINE_PERF_ANALYZER if it is a folder, else ~/.cache/peregrine/perf_analyzer."""
    named = os.environ.get(VARIABLE)
    return (
        Path(named)
        if named and Path(named).is_dir()
        else Path.home() / ".cache" / "peregrine" / "perf_analyzer"
    )


def find() -> PerfAnalyzer | None:
    """$PEREGRINE_PERF_ANALYZER (binary or folder), what install() made, or PATH; None if there is none that
    starts."""
    named, on_path = os.environ.get(VARIABLE), shutil.which("perf_analyzer")
    folder = cache_folder()
    candidates = [Path(named)] if named and Path(named).is_file() else []
    candidates += [folder / "perf_analyzer"] + ([Path(on_path)] if on_path else [])
    for binary in candidates:
        found = PerfAnalyzer(binary, binary.parent if (binary.parent / "libcudart.so.12").exists() else None)
        if binary.is_file() and why_not(found) is None:
            return found
    return None


def why_not(found: PerfAnalyzer) -> str | None:
    """Why it does not start, in one line; None if it does."""
    try:
        result = subprocess.run(
            [str(found.binary), "--version"],
            env=found.environment(),
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    text = (result.stderr + result.stdout).strip().splitlines()
    return (
        None
        if any("Version" in line for line in text)
        else (text[0] if text else f"exit code {result.returncode}")
    )


def install(folder: Path | None = None) -> PerfAnalyzer:
    """Fetches the wheels that carry it by name, and unpacks binary and library into the cache folder."""
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
            *_WHEELS,
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise PeregrineError(
                f"pip could not download {', '.join(_WHEELS)}: "
                f"{(result.stderr.strip().splitlines() or ['no reason given'])[-1]}"
            )
        for wheel in Path(scratch).glob("*.whl"):
            _unpack(wheel, folder)
    found = PerfAnalyzer(folder / "perf_analyzer", folder)
    reason = why_not(found)
    if reason:
        raise PeregrineError(f"{found.binary} does not start: {reason}; on Debian: apt-get install libb64-0d")
    return found


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(_PATTERNS):
                target = folder / Path(name).name
                target.write_bytes(archive.read(name))
                target.chmod(0o755)


@dataclass(frozen=True)
class Sweep:
    """A closed-loop sweep over concurrencies."""

    url: str
    headers: Mapping[str, str]
    user_ids: Sequence[str]
    concurrency: int
    seconds: float
    batch_size: int = 1
    parameters: Mapping[str, Any] | None = None


def measure(found: PerfAnalyzer, sweep: Sweep) -> dict[str, Any]:
    """One concurrency: throughput, latencies (from each request's own times), and perf_analyzer's view of the
    server."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "input.json").write_text(
            json.dumps({"data": [{"user_id": [user]} for user in sweep.user_ids]})
        )
        result = subprocess.run(
            [str(found.binary), *arguments(sweep, folder)],
            env=found.environment(),
            capture_output=True,
            text=True,
            timeout=120 + 20 * sweep.seconds,
        )
        if result.returncode or not (folder / "out.csv").exists():
            lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
            raise PeregrineError(
                f"perf_analyzer ended with code {result.returncode}: "
                f"{lines[-1] if lines else 'it said nothing'}"
            )
        return {**row_from_csv((folder / "out.csv").read_text()), **_exported(folder / "profile.json")}


def arguments(sweep: Sweep, folder: Path) -> list[str]:
    """perf_analyzer's command line. It measures three windows; whether they agree is left to the reader of
    the percentiles, because where other work runs beside it they never do, and it would end without a
    figure."""
    options = [
        "-m",
        PIPELINE,
        "-u",
        sweep.url,
        "-i",
        "grpc",
        "--input-data",
        str(folder / "input.json"),
        "-b",
        str(sweep.batch_size),
    ]
    options += [
        "--concurrency-range",
        str(sweep.concurrency),
        "-p",
        str(int(sweep.seconds * 1000 / 3)),
        "-s",
        "999",
    ]
    options += ["-f", str(folder / "out.csv"), "--profile-export-file", str(folder / "profile.json")]
    for name, value in sweep.headers.items():
        options += ["-H", f"{name}:{value}"]
    for name, value in (sweep.parameters or {}).items():
        kind = {bool: "bool", int: "int", float: "double"}.get(type(value), "string")
        options += ["--request-parameter", f"{name}:{str(value).lower() if kind == 'bool' else value}:{kind}"]
    return options


def row_from_csv(text: str) -> dict[str, Any]:
    """The last row of perf_analyzer's CSV; its latencies are microseconds, ours milliseconds."""
    rows = list(csv.DictReader(text.splitlines()))
    if not rows:
        raise InvalidInput(
            "perf_analyzer's CSV has no row: no measurement window was stable; try a longer --seconds"
        )
    row = rows[-1]
    result: dict[str, Any] = {
        "concurrency": int(row["Concurrency"]),
        "achieved_per_s": float(row["Inferences/Second"]),
    }
    for name, column in (
        ("p50_ms", "p50 latency"),
        ("p95_ms", "p95 latency"),
        ("p99_ms", "p99 latency"),
        ("mean_ms", "Avg latency"),
    ):
        if row.get(column):
            result[name] = float(row[column]) / 1000
    return result


def _exported(path: Path) -> dict[str, Any]:
    """p99.9 and failures, which the CSV has not, from the exported requests."""
    if not path.exists():
        return {}
    requests = [
        request
        for experiment in json.loads(path.read_text())["experiments"]
        for request in experiment["requests"]
    ]
    answered = [request for request in requests if request.get("response_timestamps")]
    latencies_ms = (
        np.array([request["response_timestamps"][-1] - request["timestamp"] for request in answered]) / 1e6
    )
    return {
        "p999_ms": latency_summary(latencies_ms)["p999_ms"],
        "failed": len(requests) - len(answered),
        "requests": len(requests),
    }
