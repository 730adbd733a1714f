"""Runs a measurement in a process of its own, so that it shares no GIL with what it measures.

The parent sends a JSON line; the child prepares, says "ready", waits for "go", measures, and answers with a
JSON line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ensemble.errors import PeregrineError

Measure = Callable[[], dict[str, Any]]


class MeasuringProcess:
    """Starts a child that runs one measurement of `module`, such as clients.bench.loadgen."""

    def __init__(self, module: str, spec: dict[str, Any]) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self._module = module
        self._send(json.dumps(spec))

    def ready(self) -> None:
        """Waits until the child is prepared; PeregrineError if it cannot be."""
        if (line := self._read()) != "ready":
            reason = json.loads(line)["error"] if line.startswith("{") else "it ended; see the lines above"
            raise PeregrineError(f"{self._module} could not start: {reason}")

    def go(self) -> None:
        """Lets the measurement begin; the child is prepared."""
        self._send("go")

    def result(self) -> dict[str, Any]:
        """Waits for the measurement's end and gives its figures; PeregrineError if it failed."""
        line = self._read()
        self._process.wait()
        if not line:
            raise PeregrineError("a measuring process ended without a result; see the lines above")
        result: dict[str, Any] = json.loads(line)
        if "error" in result:
            raise PeregrineError(result["error"])
        return result

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the child has ended: the next read says so

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def serve_measurement(prepare: Callable[[dict[str, Any]], Measure]) -> None:
    """Plays the child's part: prepare(spec) does all that shall not be measured, and gives what shall be."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    try:
        measure = prepare(json.loads(sys.stdin.readline()))
        print("ready", file=out, flush=True)
        if sys.stdin.readline().strip() == "go":
            print(json.dumps(measure()), file=out, flush=True)
    except PeregrineError as error:
        print(json.dumps({"error": str(error)}), file=out, flush=True)
    except KeyboardInterrupt:
        sys.exit(130)  # the parent was interrupted too, and says so


def measure_in_process(module: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Runs one measurement, start to end."""
    return measure_at_once(module, [spec])[0]


def measure_at_once(module: str, specs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs several measurements at the same time, one process each; they begin when all are prepared."""
    processes = [MeasuringProcess(module, spec) for spec in specs]
    for process in processes:
        process.ready()
    for process in processes:
        process.go()
    return [process.result() for process in processes]
