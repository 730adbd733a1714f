"""Starts one tritonserver with its flags and environment, lists its stubs, and ends it without a trace."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ensemble.engines import (
    ENGINE_VARIABLE,
    HOME_VARIABLE,
    INDEX_VARIABLE,
    REPOSITORY_VARIABLE,
    SHARDS_VARIABLE,
)
from ensemble.engines.flavors import TENSORRT
from ensemble.release.repository import FUSED
from ensemble.server.installation import BACKENDS, MOUNT, TIERS, Installation, RunFolder, remove_regions
from ensemble.server.options import ServeOptions
from ensemble.server.router_files import models_to_load
from ensemble.server.runtime import Runtime
from ensemble.tiers import settings as tiers
from ensemble.tracing import TRACES_VARIABLE
from ensemble.vitals import Vitals, vitals_of

EXIT_TIMEOUT_S = 20  # what tritonserver gives requests in flight at SIGTERM
# When all are answered it ends within a second or two, unless a stub died at work (it waits for ever then)
DRAINED_EXIT_S = 6.0
CONTROL_HEADER = "triton-grpc-protocol-peregrine"
_NEVER = 2**31 - 1  # one request in so many
# PEREGRINE_REDIS may hold a password.
_NOT_FOR_CHILDREN = (TRACES_VARIABLE, "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "PEREGRINE_REDIS")
_RESTRICTED = "shared-memory,model-repository,model-config,statistics,trace,logging"
# Runs in the child before it becomes tritonserver: no core dumps (they hold users' features), and the kernel
# sends it SIGTERM when we die without having stopped it. Not preexec_fn: forking a process with gRPC threads
# can deadlock.
_LAUNCHER = (
    "import ctypes, os, resource, sys; ctypes.CDLL(None).prctl(1, 15); "
    "resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True)
class Launch:
    """Holds what one tritonserver is started with: the options, their ports chosen, and the runtime."""

    repository: Path
    options: ServeOptions
    runtime: Runtime = field(default_factory=Runtime)
    secret: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    @property
    def home(self) -> Path:
        """Names the folder of route and catalogue log."""
        return self.options.catalogue or self.repository

    @property
    def configuration(self) -> str | None:
        """Names configs/<this>.pbtxt, which models that have it use instead of config.pbtxt; None: none."""
        if self.runtime.plans:
            return TENSORRT
        return FUSED if self.options.fused else None


def command_line(installation: Installation, run: RunFolder, launch: Launch) -> list[str]:
    """Gives tritonserver and its flags: what is not needed is off, and models are loaded on demand only."""
    options, metrics = launch.options, ["--allow-metrics=false"]
    if options.metrics_port is not None:
        metrics = [
            f"--metrics-address={options.address}",
            f"--metrics-port={options.metrics_port}",
            "--metrics-config=summary_latencies=true",  # each model's quantiles, for the alert on p99
            "--metrics-config=summary_quantiles=0.5:0.05,0.99:0.001",
        ]
    chosen = [f"--model-config-name={launch.configuration}"] if launch.configuration else []
    models = models_to_load(run.path / MOUNT, fused=launch.configuration == FUSED)
    restricted = f"{_RESTRICTED}:{CONTROL_HEADER.removeprefix('triton-grpc-protocol-')}"
    return [
        str(installation.binary),
        f"--model-repository={run.path / MOUNT}",
        f"--backend-directory={run.path / BACKENDS}",
        f"--backend-config=python,shm-region-prefix-name={run.region_prefix}",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in models),
        "--disable-auto-complete-config",
        "--strict-readiness=false",
        "--allow-http=false",
        f"--grpc-address={options.address}",
        f"--grpc-port={options.port}",
        *metrics,
        *launch.runtime.flags,
        *chosen,
        *_traces(options),
        f"--grpc-restricted-protocol={restricted}={launch.secret}",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        "--grpc-keepalive-time=30000",
        "--grpc-http2-min-recv-ping-interval-without-data=5000",
        f"--log-verbose={int(options.verbose)}",
    ]


def _traces(options: ServeOptions) -> list[str]:
    """Gives the flags of Triton's traces: a request that brings a trace is in it, of the others a share."""
    if options.traces is None:
        return []
    every = min(_NEVER, round(1 / options.trace_share)) if options.trace_share else _NEVER
    return [
        "--trace-config=mode=opentelemetry",
        "--trace-config=level=TIMESTAMPS",
        f"--trace-config=rate={every}",
        f"--trace-config=opentelemetry,url={options.traces}",
        "--trace-config=opentelemetry,resource=service.name=peregrine",
        "--trace-config=opentelemetry,bsp_schedule_delay=500",
    ]


def _environment(installation: Installation, launch: Launch) -> dict[str, str]:
    """Gives the child's environment: one thread a process, since the instances are the parallelism."""
    libraries = [str(path) for path in installation.libraries] + [os.environ.get("LD_LIBRARY_PATH", "")]
    # The stub finds its standard library by PATH.
    path = [str(Path(sys.base_prefix) / "bin"), os.environ.get("PATH", os.defpath)]
    ours = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # glibc gives buffers over 128 kB back to the kernel at each free, and every batch would fault its
        # pages in again.
        "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        ENGINE_VARIABLE: launch.runtime.engine,
        INDEX_VARIABLE: launch.options.index,
        SHARDS_VARIABLE: str(launch.options.shards),
        REPOSITORY_VARIABLE: str(launch.repository),
        HOME_VARIABLE: str(launch.home),
        # Images set it; python_model.py knows old stubs by it.
        "TRITON_SERVER_VERSION": str(installation.level or ""),
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        "PATH": ":".join(path),
        **({TRACES_VARIABLE: launch.options.traces} if launch.options.traces else {}),
    }
    return {**{k: v for k, v in os.environ.items() if k not in _NOT_FOR_CHILDREN}, **ours}


def _tiers(run: RunFolder, launch: Launch) -> dict[str, str]:
    """Writes the tiers' settings into a file of the run folder that only we may read, and names it in a
    variable."""
    if launch.options.redis is None:
        return {}
    path = run.path / TIERS
    tiers.write_settings(path, tiers.TierSettings(launch.options.redis))
    return {tiers.VARIABLE: str(path)}


class TritonProcess:
    """Holds a running tritonserver with its stubs, in a process group of its own, and its last lines."""

    def __init__(
        self, installation: Installation, run: RunFolder, launch: Launch, on_line: Callable[[str], None]
    ) -> None:
        self.run, self.log = run, collections.deque[str](maxlen=400)
        self._on_line = on_line
        self._before, self._environments = _environments(), set[Path]()
        launcher = [sys.executable, "-S", "-E", "-c", _LAUNCHER, str(os.getpid())]
        self._process = subprocess.Popen(
            [*launcher, *command_line(installation, run, launch)],
            env=_environment(installation, launch) | _tiers(run, launch),
            cwd=run.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, name="triton-log", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.log.append(line.rstrip())
            self._on_line(line.rstrip())

    def note_environments(self) -> None:
        """Notes, once it is ready, its folder for packed Python environments, which stays if it is killed."""
        self._environments = _environments() - self._before

    def log_tail(self) -> str:
        """Gives its last errors and tracebacks, without the banner of flags."""
        said = [line for line in self.log if line and line[0] not in "+|I"]
        return "\n".join((said or list(self.log))[-12:])

    @property
    def exit_code(self) -> int | None:
        """Gives its exit code, minus the signal's number where one killed it; None while it runs."""
        return self._process.poll()

    def stop(self, limit_s: float) -> int:
        """Lets it answer the requests in flight for at most `limit_s`, kills what is left of the group, and
        gives its exit code."""
        if self.exit_code is None:
            # Not to the group: stubs that die first would fail the requests in flight.
            os.kill(self.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(limit_s)
        self._end_group()
        return self._process.wait()

    def kill(self) -> None:
        """Ends it and its stubs at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._end_group()

    def _end_group(self) -> None:
        """Waits for the orphaned stubs, most of which end within a second, and kills the rest."""
        if self.exit_code is not None:
            self._wait_for_stubs(2.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._wait_for_stubs(5.0)
        remove_regions(self.run.region_prefix)
        if self._process.wait() != 0:
            for folder in self._environments or _environments() - self._before:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # ours is empty: we pack no environment

    def _wait_for_stubs(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while any(self.stubs()) and time.monotonic() < deadline:
            time.sleep(0.05)

    def vitals(self) -> dict[int, Vitals]:
        """Says how it and its stubs are."""
        pids = [self.pid, *(stub.pid for stub in self.stubs())]
        return {pid: one for pid in pids if (one := vitals_of(pid))}

    def stubs(self) -> Iterator[Stub]:
        """Lists the group's living stub processes."""
        return _stubs(self.pid)


def _environments() -> set[Path]:
    """Lists Triton's folders for packed Python environments; they lie in /tmp whatever TMPDIR says."""
    return set(Path("/tmp").glob("python_env_*"))


@dataclass(frozen=True)
class Stub:
    """Names one Python process of the backend: an instance of a model. Both are empty while it starts."""

    pid: int
    model: str
    instance: str


def _stub(pid: int, command: list[str]) -> Stub:
    """Reads a stub's command line: triton_python_backend_stub <repository>/<model>/<version>/model.py …
    <instance> <runtime directory> and a final empty word."""
    if not command[0].endswith("triton_python_backend_stub"):
        return Stub(pid, "", "")
    model = Path(command[1]).parent.parent.name
    return Stub(pid, model, next((word for word in command[2:] if word.startswith(f"{model}_")), ""))


def _processes() -> Iterator[tuple[int, int, int]]:
    """Lists what lives on this machine: process id, parent's id, group."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            state, parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if state != "Z":
                yield int(folder.name), int(parent), int(group)


def _stubs(server: int) -> Iterator[Stub]:
    """Lists the living stub processes in the group of a tritonserver."""
    for pid, _, group in _processes():
        with contextlib.suppress(OSError, IndexError):
            if group == server != pid:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                yield _stub(pid, command.split("\0"))


def kill_stubs(supervisor: int, release: str) -> list[str]:
    """Kills the stubs of a release under the tritonserver that process `supervisor` watches; gives their
    instances.

    Requests in them fail then, and their models can be unloaded.
    """
    killed = []
    for server in [pid for pid, parent, group in _processes() if parent == supervisor and group == pid]:
        for stub in list(_stubs(server)):
            if stub.model.startswith(f"{release}_"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stub.pid, signal.SIGKILL)
                    killed.append(stub.instance)
    return killed


def exit_words(code: int) -> str:
    """Says how a process ended, in words."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def memory_bytes(pid: int) -> tuple[int, int]:
    """Gives a process's (resident, proportional) bytes; summed over processes, the second counts pages that
    they share, such as a mapped snapshot, once."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0, 0
    kilobytes = dict(re.findall(r"^(Rss|Pss):\s+(\d+) kB", text, re.MULTILINE))
    return int(kilobytes.get("Rss", 0)) * 1024, int(kilobytes.get("Pss", 0)) * 1024
