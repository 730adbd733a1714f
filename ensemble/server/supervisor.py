"""A repository served by a real tritonserver: checked, started, watched, and stopped without a trace.

with serve(Path("model_repository"), port=0) as server:
    Client(server.url).recommend("u1")
"""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ensemble import contract
from ensemble.engines import CPU
from ensemble.errors import PeregrineError, ServerError
from ensemble.release.repository import FUSED
from ensemble.server.calls import drain, is_model_ready
from ensemble.server.checks import check_address, check_index, check_port, check_servable
from ensemble.server.installation import Installation, find_tritonserver, make_run_folder, sweep_run_folders
from ensemble.server.process import CONTROL_HEADER, EXIT_TIMEOUT_S, Launch, TritonProcess, memory_bytes
from ensemble.server.running import Claim, RunningServer
from ensemble.server.runtime import OVERLAY, Overlay, choose_runtime
from ensemble.tiers.connection import check_installed
from ensemble.tiers.settings import TierSettings

MAX_DEATHS, DEATHS_WINDOW_S = 5, 60.0  # more deaths than that in this time: give up, and say so
_WATCH_EVERY_S = 1.0
# what Triton calls an error on a machine without a GPU
_NOISE = (
    "CudaDriverHelper",
    "CUDA driver version",
    "Failed to initialize NVML",
)


class Server:
    """tritonserver under watch. All its process handling is in one thread, which the kernel ties the
    process's life to."""

    def __init__(
        self,
        launch: Launch,
        claim: Claim,
        installation: Installation,
        log: Callable[[str], None],
        start_timeout_s: float,
    ) -> None:
        self.launch, self.log = launch, log
        self._claim, self._installation, self._start_timeout_s = claim, installation, start_timeout_s
        # settled: ready for the first time, or failed
        self._stopping, self._settled = (
            threading.Event(),
            threading.Event(),
        )
        # Not Thread.join: a signal that interrupts it makes the next join return at once (CPython 3.10 to
        # 3.12), thread alive.
        self._ended = threading.Event()
        self._failure: PeregrineError | None = None
        self._run = make_run_folder(installation)
        plans = launch.runtime.plans
        self._overlay = Overlay(self._run.path / OVERLAY, launch.repository, plans) if plans else None
        self._process: TritonProcess | None = None
        self._instances: dict[str, str] = {}  # instance -> model
        self._thread = threading.Thread(target=self._supervise, name="triton-supervisor", daemon=True)

    @property
    def url(self) -> str:
        """host:port of gRPC."""
        return f"{_host(self.launch.address)}:{self.launch.port}"

    @property
    def metrics_url(self) -> str | None:
        return (
            f"http://{_host(self.launch.address)}:{self.launch.metrics_port}/metrics"
            if self.launch.metrics_port
            else None
        )

    @property
    def secret(self) -> str:
        return self.launch.secret

    @property
    def headers(self) -> dict[str, str]:
        """gRPC metadata for control and statistics calls."""
        return {CONTROL_HEADER: self.secret}

    @property
    def pid(self) -> int:
        """Of tritonserver itself; changes when it is restarted."""
        assert self._process is not None
        return self._process.pid

    def stubs(self) -> dict[str, list[int]]:
        """Process ids of the Python stubs by model."""
        found: dict[str, list[int]] = collections.defaultdict(list)
        for stub in self._process.stubs() if self._process else ():
            if stub.model:
                found[stub.model].append(stub.pid)
        return dict(sorted(found.items()))

    def memory_bytes(self) -> tuple[int, int]:
        """(resident, proportional) bytes of tritonserver and its stubs together."""
        each = [
            memory_bytes(pid) for pid in (self.pid, *(pid for pids in self.stubs().values() for pid in pids))
        ]
        return sum(rss for rss, _ in each), sum(pss for _, pss in each)

    def start(self) -> None:
        """Returns when `recommend` is ready; ServerError with the log's last lines if it does not become
        so."""
        self._claim.write(RunningServer(os.getpid(), self.url, self.metrics_url, CONTROL_HEADER, self.secret))
        self._thread.start()
        self._settled.wait()
        if self._failure:
            raise self._failure

    def wait(self) -> None:
        """Returns when the server was stopped; ServerError if it kept dying."""
        self._ended.wait()
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Answers what is in flight, then ends every process and removes what they left."""
        self._stopping.set()
        if self._thread.ident is None:
            self._clear()
        else:
            self._ended.wait()

    def _clear(self) -> None:
        self._run.remove()
        self._claim.drop()

    def _supervise(self) -> None:
        deaths: collections.deque[float] = collections.deque(maxlen=MAX_DEATHS)
        try:
            while not self._stopping.is_set():
                self._process = TritonProcess(self._installation, self._run, self.launch, self._hear)
                try:
                    end = self._run_once(self._process)
                finally:
                    self._end(self._process)
                if self._stopping.is_set() or not self._may_restart(end, deaths):
                    return
        except PeregrineError as error:
            self._failure = error
        except Exception as error:  # a fault of ours must not leave start() waiting for ever
            self._failure = ServerError(f"the supervisor failed: {error!r}")
        finally:
            self._clear()
            self._settled.set()
            self._ended.set()

    def _end(self, process: TritonProcess) -> None:
        if not self._stopping.is_set():
            process.kill()
            return
        if self._settled.is_set() and process.exit_code is None:
            drain(self.url, self.headers, contract.PIPELINE, EXIT_TIMEOUT_S)
        process.stop()

    def _run_once(self, process: TritonProcess) -> str:
        """Until the process has to be replaced (returns why) or we are stopped (returns nothing)."""
        self._instances = {}
        problem = self._wait_until_ready(process)
        if problem:
            return problem
        process.note_environments()
        self._settled.set()
        while not self._stopping.wait(_WATCH_EVERY_S):
            if process.exit_code is not None:
                return f"tritonserver died ({_exit_words(process.exit_code)})"
            if self._overlay:
                self._overlay.refresh()
            problem = self._check_stubs(process)
            if problem:
                return problem
        return ""

    def _wait_until_ready(self, process: TritonProcess) -> str:
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline and not self._stopping.is_set():
            if process.exit_code is not None:
                return f"tritonserver did not start ({_exit_words(process.exit_code)}):\n{process.log_tail()}"
            # never the server's own readiness: it says yes whatever became of the models
            if _is_open(self.launch.address, self.launch.port) and is_model_ready(
                self.url, contract.PIPELINE
            ):
                return ""
            time.sleep(0.05)
        return (
            ""
            if self._stopping.is_set()
            else f"model {contract.PIPELINE} was not ready after {self._start_timeout_s:.0f} "
            f"s:\n{process.log_tail()}"
        )

    def _check_stubs(self, process: TritonProcess) -> str:
        """Triton never restarts a dead stub, and says that its model is ready: one lost is reported, the last
        one lost is cured."""
        now = {stub.instance: stub.model for stub in process.stubs() if stub.instance}
        lost = {instance: model for instance, model in self._instances.items() if instance not in now}
        self._instances.update(now)
        for instance, model in lost.items() if process.exit_code is None else ():
            del self._instances[instance]
            if is_model_ready(self.url, model):  # else it was unloaded on purpose
                left = sum(other == model for other in now.values())
                if not left:
                    return f"every instance of {model} died"
                self.log(
                    f"WARNING: {instance} died, {left} left of {model}; Triton does not start it again: "
                    "restart `peregrine serve` soon"
                )
        return ""

    def _may_restart(self, why: str, deaths: collections.deque[float]) -> bool:
        if not self._settled.is_set():
            self._failure = ServerError(why)
            return False
        now = time.monotonic()
        deaths.append(now)
        if len(deaths) == MAX_DEATHS and now - deaths[0] < DEATHS_WINDOW_S:
            self._failure = ServerError(
                f"tritonserver died {MAX_DEATHS} times within {DEATHS_WINDOW_S:.0f} s; the last time: {why}"
            )
            return False
        pause_s = 0.1 * 2 ** len([death for death in deaths if now - death < DEATHS_WINDOW_S])
        self.log(f"WARNING: {why}; starting it again in {pause_s:.1f} s")
        self._stopping.wait(pause_s)
        return True

    def _hear(self, line: str) -> None:
        if self.launch.verbose or (
            self._settled.is_set() and line.startswith("E") and not any(noise in line for noise in _NOISE)
        ):
            self.log(line)


@contextlib.contextmanager
def serve(
    repository: Path,
    port: int = 8001,
    metrics_port: int | None = 8002,
    address: str = "127.0.0.1",
    *,
    log: Callable[[str], None] = lambda line: None,
    verbose: int = 0,
    start_timeout_s: float = 300.0,
    fused: bool = False,
    require: str | None = None,
    index: str = CPU,
    redis: str | None = None,
) -> Iterator[Server]:
    """Serves a repository's active release while the block runs. Port 0: a free one; metrics_port None: no
    metrics.

    fused: all steps of a request in one Python process, instead of the ensemble. require: a runtime of the
    engines (server_plans.REQUIREMENTS), or an error; None: the best there is, and `log` hears why not
    TensorRT. index: "cpu" or "gpu", where the main index is searched. redis: URL for feature rows.
    """
    repository = Path(repository).resolve()
    if redis is not None:  # refused here rather than in every step
        TierSettings(redis)
        check_installed()
    check_index(index)
    installation = find_tritonserver()
    check_address(address, installation)
    runtime = choose_runtime(repository, check_servable(repository), installation, require, fused, log)
    ports = [check_port(address, number) for number in (port, metrics_port) if number is not None]
    sweep_run_folders()
    claim = Claim(repository)
    chosen = FUSED if fused else None
    launch = Launch(
        repository,
        address,
        ports[0],
        (*ports, None)[1],
        verbose=verbose,
        configuration=chosen,
        runtime=runtime,
        index=index,
        redis=redis,
    )
    server = Server(launch, claim, installation, log, start_timeout_s)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _is_open(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 1.0).close()
    except OSError:
        return False
    return True


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _exit_words(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
