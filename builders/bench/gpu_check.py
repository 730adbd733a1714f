"""Shows what the GPU path does on this machine, in rows as they come and one JSON file: `make gpu-check`.

    python -m builders.bench.gpu_check --repository DIR [--release NAME] [--parts A,B] [--json FILE] [--cpu]

Each part runs in a process of its own under a time limit, prints each row as it has it, and fails alone; the
JSON is written after every row. What cannot run here says so in its row. Without a GPU it stops with one line
and exit code 2; --cpu runs the rows that need none.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from builders.bench.gpu_rows import Row, first_line
from ensemble.engines.cuda import gpu_facts
from ensemble.errors import InvalidInput, PeregrineError, ReleaseError
from ensemble.release.release import active_release
from ensemble.release.repository import check_name
from ensemble.steps.served import ServedRelease, open_served

# Each part: what gives its rows, and how many seconds it may take: five minutes in all. In this order plans
# are there before they are served.
PARTS = {
    "compile": ("builders.bench.gpu_chain:compile_rows", 30),
    "engines": ("builders.bench.gpu_engines:engine_rows", 55),
    "onnxruntime": ("builders.bench.gpu_engines:onnxruntime_rows", 20),
    "torch": ("builders.bench.gpu_torch:torch_rows", 35),
    "faiss": ("builders.bench.gpu_faiss:faiss_rows", 55),
    "twin": ("builders.bench.gpu_chain:twin_rows", 20),
    "triton": ("builders.bench.gpu_chain:triton_rows", 85),
}
_ROW = "ROW "  # begins each line that a part's process gives; others are its libraries'
_NEEDS_GPU = ("compile",)


def main() -> None:
    """Runs the check; exit code 0, 1 if a number is off by more than its precision may be, 2 if it cannot
    start."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--repository", "-r", type=Path, default=Path("model_repository"))
    parser.add_argument("--release", help="the active one if not given")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}; all if not given"
    )
    parser.add_argument("--json", type=Path, default=None, help="write all rows here, after each one")
    parser.add_argument("--cpu", action="store_true", help="run the rows that need no GPU")
    parser.add_argument("--patience", type=float, default=1.0, help="times the parts' time limits")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # one part, in this process
    options = parser.parse_args()
    try:
        sys.exit(_run_inside(options) if options.inside else check(options))
    except PeregrineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def check(options: argparse.Namespace) -> int:
    """Runs the parts one after another, prints the table, writes the JSON."""
    machine, release = _machine(options.cpu), _release(options)
    parts = options.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise InvalidInput(
            f"--parts {options.parts}: no part {unknown[0]!r}", f"known are {', '.join(PARTS)}"
        )
    rows: list[Row] = []
    for part in parts:
        if options.cpu and part in _NEEDS_GPU:
            continue
        for row in _rows_of(part, options, release):
            rows.append(row)
            print(row, flush=True)
            _write(options.json, machine, release.name, rows)
    _print(rows, machine)
    return int(any(row.is_wrong for row in rows))


def _machine(cpu: bool) -> str:
    try:
        gpu, sm, cuda = gpu_facts()
    except ReleaseError as error:
        if not cpu:
            raise ReleaseError(f"{error}", "--cpu runs the rows that need none") from None
        return f"{platform.machine()}, no GPU"
    return f"{gpu} (SM {sm}, CUDA {cuda}), {os.cpu_count()} cores"


def _release(options: argparse.Namespace) -> ServedRelease:
    name = options.release or active_release(options.repository)
    if name is None:
        raise ReleaseError(
            f"no release is active in {options.repository}", "`make demo` builds one in demo/model_repository"
        )
    return open_served(options.repository.resolve(), check_name(name))


def _rows_of(part: str, options: argparse.Namespace, release: ServedRelease) -> Iterator[Row]:
    """Gives a part's rows as its process prints them, and why there are no more."""
    limit_s = PARTS[part][1] * options.patience
    command = [sys.executable, "-m", "builders.bench.gpu_check", "--inside", part, "--release", release.name]
    command += ["--repository", str(release.repository), *(["--cpu"] if options.cpu else [])]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    timer = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(_ROW):
                yield Row.from_json(line.removeprefix(_ROW))
    finally:
        timer.cancel()
        code = process.wait()
    took_s = time.monotonic() - started
    if took_s >= limit_s:
        yield Row(part, "stopped", "", note=f"after its {limit_s:.0f} s")
    elif code:
        yield Row(part, "failed", "", note=f"its process ended with code {code}; its last words are above")
    else:
        yield Row(part, "done", "", note=f"{took_s:.0f} s")


def _run_inside(options: argparse.Namespace) -> int:
    """Runs one part here; what libraries print goes to stderr, rows to what was stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = PARTS[options.inside][0].partition(":")
    try:
        rows: Callable[[ServedRelease, bool], Iterator[Row]] = getattr(importlib.import_module(module), name)
        for row in rows(_release(options), options.cpu):
            print(_ROW + row.to_json(), file=out, flush=True)
    except Exception as error:  # one part's fault is a row, and the next part runs
        print(
            _ROW + Row(options.inside, "failed", "", note=first_line(error)).to_json(), file=out, flush=True
        )
        if not isinstance(error, PeregrineError):
            raise
    return 0


def _write(path: Path | None, machine: str, release: str, rows: list[Row]) -> None:
    """Writes what is known by now: a machine that is taken away keeps what it has shown."""
    if path is None:
        return
    facts = {"machine": machine, "release": release, "rows": [json.loads(row.to_json()) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _print(rows: list[Row], machine: str) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = (
        "part",
        "what",
        "runtime",
        "precision",
        "batch",
        "ms",
        "users/s",
        "error",
        "may be",
        "roofline",
    )
    table = Table(*columns, "note", title=f"gpu-check on {machine}")
    for row in rows:
        numbers = (
            _text(row.ms, ".3f"),
            _text(row.rate, ",.0f"),
            _text(row.error, ".1e"),
            _text(row.tolerance, ".0e"),
            _text(row.roofline, ".1%"),
        )
        facts = asdict(row)
        start = (facts[name] for name in ("part", "what", "runtime", "precision"))
        wrong = "WRONG " if row.is_wrong else ""
        table.add_row(*start, str(row.batch or ""), *numbers, wrong + row.note)
    Console(width=max(150, shutil.get_terminal_size().columns)).print(table)


def _text(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


if __name__ == "__main__":
    main()
