"""Serves a repository with a real tritonserver: checks, starts and watches it, and stops it without a trace.

with serve(Path("model_repository"), ServeOptions(port=0)) as server:
    Client(server.url).recommend("u1")
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from ensemble.errors import PeregrineError, ReleaseError, ServerError
from ensemble.live.items import wait_for_changes
from ensemble.release.release import open_release
from ensemble.release.repository import FUSED, aliases_of
from ensemble.release.route import Route
from ensemble.server import health
from ensemble.server.calls import drain, is_model_ready, is_open
from ensemble.server.canary_watch import CanaryWatch
from ensemble.server.checks import (
    check_address,
    check_packages,
    check_port,
    check_servable,
    warn_of_shared_memory,
)
from ensemble.server.following import Follower, route_in
from ensemble.server.http import answering
from ensemble.server.illness import Stopped
from ensemble.server.installation import (
    Installation,
    RunFolder,
    empty,
    find_tritonserver,
    make_run_folder,
    sweep_regions,
)
from ensemble.server.left_out import without_left_out
from ensemble.server.mount import Mount
from ensemble.server.mounted_route import mount_route
from ensemble.server.options import ServeOptions
from ensemble.server.predecessor import await_predecessor
from ensemble.server.process import (
    CONTROL_HEADER,
    DRAINED_EXIT_S,
    EXIT_TIMEOUT_S,
    Launch,
    TritonProcess,
    exit_words,
    memory_bytes,
)
from ensemble.server.repairs import LOOK_EVERY_S, Repairs
from ensemble.server.restarts import Restarts
from ensemble.server.router_files import only
from ensemble.server.running import Claim, RunningServer
from ensemble.server.runtime import choose_runtime
from ensemble.server.scrape import LastMinute
from ensemble.server.state import default_state
from ensemble.waiting import wait_for

# What Triton calls an error on a machine without a GPU.
_NOISE = ("CudaDriverHelper", "CUDA driver version", "Failed to initialize NVML")


class Server:
    """Watches over a tritonserver. One thread starts and ends its process: the kernel ties the process's life
    to that thread's."""

    def __init__(
        self,
        launch: Launch,
        claim: Claim,
        installation: Installation,
        run: RunFolder,
        log: Callable[[str], None],
    ) -> None:
        self.launch, self.log = launch, log
        self._claim, self._installation, self._run = claim, installation, run
        self._mount = Mount(run.path, launch.options.instances, launch.options.num_gpus)
        self._stopping = threading.Event()
        self._settled = threading.Event()  # set when it is ready for the first time, or has failed
        # Not Thread.join: once a signal has interrupted it, the next join returns at once though the thread
        # lives (CPython 3.10 to 3.12).
        self._ended = threading.Event()
        self._failure: PeregrineError | None = None
        self.starts = 0  # of tritonserver
        self.http_url: str | None = None
        self._watch = CanaryWatch(launch.repository, launch.home, run.path, log)
        self._process: TritonProcess | None = None
        self._repairs: Repairs | None = None  # of the tritonserver that is ready
        self._num_repairs = 0  # of the earlier ones
        self._last_minute = LastMinute(self.metrics_url)
        self._restarts, self._health = Restarts(), health.HealthFile(run.path)
        self._is_ready = threading.Event()  # while it answers
        self._thread = threading.Thread(target=self._supervise, name="triton-supervisor", daemon=True)

    @property
    def url(self) -> str:
        """Gives host:port of gRPC."""
        return f"{_host(self.launch.options.address)}:{self.launch.options.port}"

    @property
    def metrics_url(self) -> str | None:
        """Gives the URL that Prometheus reads; None where metrics are off."""
        options = self.launch.options
        return (
            f"http://{_host(options.address)}:{options.metrics_port}/metrics"
            if options.metrics_port
            else None
        )

    @property
    def secret(self) -> str:
        """Gives the secret that opens control calls."""
        return self.launch.secret

    @property
    def headers(self) -> dict[str, str]:
        """Gives the gRPC metadata that control and statistics calls need."""
        return {CONTROL_HEADER: self.secret}

    @property
    def pid(self) -> int:
        """Gives tritonserver's own process id, which changes when it is restarted."""
        assert self._process is not None
        return self._process.pid

    @property
    def release(self) -> str:
        """Names the main release that it serves."""
        return self._mount.route().main

    def state(self) -> str:
        """Says what it is doing instead of answering; empty while it answers."""
        if self._stopping.is_set() or self._ended.is_set():
            return "draining"
        return "" if self._is_ready.is_set() else "starting"

    def missing(self) -> dict[str, int]:
        """Counts the Python processes that each served model lacks; nothing while it does not answer."""
        repairs = self._repairs
        return repairs.missing() if repairs else {}

    def num_repairs(self) -> int:
        """Counts the times that a model's processes were replaced since `serve` began."""
        repairs = self._repairs
        return self._num_repairs + (repairs.count if repairs else 0)

    def route(self) -> Route:
        """Gives what is served."""
        return self._mount.route()

    def stubs(self) -> dict[str, list[int]]:
        """Gives the process ids of the Python stubs by model."""
        pids: dict[str, list[int]] = collections.defaultdict(list)
        for stub in self._process.stubs() if self._process else ():
            if stub.model:
                pids[stub.model].append(stub.pid)
        return dict(sorted(pids.items()))

    def memory_bytes(self) -> tuple[int, int]:
        """Gives the (resident, proportional) bytes of tritonserver and its stubs together."""
        pids = [self.pid, *(pid for pids in self.stubs().values() for pid in pids)]
        each = [memory_bytes(pid) for pid in pids]
        return sum(rss for rss, _ in each), sum(pss for _, pss in each)

    def start(self) -> None:
        """Returns when `recommend` is ready; ServerError with the log's last lines if it never is."""
        running = self._running()
        self._claim.write(running)
        self._thread.start()
        follower = Follower(running, self.launch.repository, self.launch.options.route, self.log)
        arguments = (self._stopping, self._is_ready.is_set)
        threading.Thread(target=follower.run, args=arguments, name="route-follower", daemon=True).start()
        wait_for(self._settled)
        self._watch.start(self._stopping)
        self._last_minute.start(self._stopping)
        if self._failure:
            raise self._failure

    def _running(self) -> RunningServer:
        """Gives what the release commands have to know of this server."""
        options, runtime = self.launch.options, self.launch.runtime
        return RunningServer(
            os.getpid(),
            self.url,
            self.metrics_url,
            CONTROL_HEADER,
            self.secret,
            engine=runtime.engine,
            state=str(self._run.path),
            home=str(self.launch.home),
            has_plans=bool(runtime.plans),
            instances=options.instances,
            num_gpus=options.num_gpus,
            node=dataclasses.asdict(runtime.node) if runtime.node else None,
            takes_portable=bool(runtime.flags),
            require=options.require,
            has_redis=options.redis is not None,
            is_fused=self.launch.configuration == FUSED,
        )

    def wait(self) -> None:
        """Returns when the server was stopped; ServerError if it kept dying."""
        wait_for(self._ended)
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Answers what is in flight, then ends every process and removes what they left."""
        self._stopping.set()
        self._claim.note_stopping()
        if self._thread.ident is None:
            self._clear()
        else:
            self._ended.wait()

    def _clear(self) -> None:
        """Removes what it was run from and gives the state folder free."""
        self._run.remove()
        self._health.remove()
        self._claim.drop()

    def _supervise(self) -> None:
        """Runs tritonserver, and again after each death, until we are stopped or it dies too often."""
        try:
            while not self._stopping.is_set():
                self._note(health.DOWN if self._settled.is_set() else health.STARTING)
                self._mount_route()
                self.starts += 1
                self._process = TritonProcess(self._installation, self._run, self.launch, self._forward)
                try:
                    end = self._run_once(self._process)
                finally:
                    self._is_ready.clear()
                    exit_code = self._process.exit_code
                    self._end(self._process)
                    self._drop_repairs()
                if self._stopping.is_set():
                    return
                is_without = self._watch.take_out_on_disk(f"tritonserver ended: {end}")
                if not is_without and not self._may_restart(end, exit_code):
                    return
        except PeregrineError as error:
            self._failure = error
        except Exception as error:  # a fault of ours must not leave start() waiting for ever
            self._failure = ServerError(f"the supervisor failed: {error!r}")
        finally:
            self._clear()
            self._settled.set()
            self._ended.set()

    def _mount_route(self) -> None:
        """Mounts what is to be served now; a canary that cannot be is taken out."""
        route = self._route_to_mount()
        try:
            self._mount_all(route)
        except PeregrineError as error:
            if route.canary is None:
                raise
            self._watch.take_out_on_disk(f"it cannot be mounted: {error}")
            self._mount_all(only(route.main))

    def _route_to_mount(self) -> Route:
        """Gives the home's route; after a death what was served, unless the home's needs nothing new: the
        follower turns to what does, and what has been served is sure to load."""
        launch, served = self.launch, self._mount.route()
        try:
            route = route_in(launch.repository, launch.home, launch.options.route) or served
            route = without_left_out(self._run.path, route)
        except ReleaseError:
            if not self._settled.is_set():
                raise
            return served
        is_new = self._settled.is_set() and not set(route.releases) <= set(served.releases)
        return served if is_new else route

    def _mount_all(self, route: Route) -> None:
        """Mounts a route's releases, its router and the alias."""
        is_fused = self.launch.configuration == FUSED
        mount_route(self._mount, self.launch.repository, route, self.launch.runtime, is_fused=is_fused)

    def _end(self, process: TritonProcess) -> None:
        """Ends a process: with an answer for all that is in flight if we are stopped, else at once."""
        if not self._stopping.is_set():
            process.kill()
            return
        is_drained = self._settled.is_set() and process.exit_code is None
        for pipeline in self._mount.pipelines if is_drained else ():
            is_drained = drain(self.url, self.headers, pipeline, EXIT_TIMEOUT_S) and is_drained
        process.stop(DRAINED_EXIT_S if is_drained else EXIT_TIMEOUT_S + 10)

    def _run_once(self, process: TritonProcess) -> str:
        """Watches the process until it has to be replaced (returns why) or we are stopped (returns "")."""
        problem = self._wait_until_ready(process)
        if problem or self._stopping.is_set():
            return problem
        process.note_environments()
        configuration, watch = self.launch.configuration, self._watch
        repairs = Repairs(process, self._running(), self._mount, configuration, self.log)
        self._repairs = repairs
        self._is_ready.set()
        self._settled.set()
        while not self._stopping.wait(LOOK_EVERY_S):
            if process.exit_code is not None:
                return f"tritonserver died ({exit_words(process.exit_code)})"
            problem = repairs.look(watch.is_tried, watch.note_death)
            if problem and process.exit_code is None:
                return problem
            self._note(health.READY)
        self._note(health.STOPPING)
        return ""

    def _drop_repairs(self) -> None:
        """Ends the calls to a tritonserver that has ended: cut off before, they could end it."""
        if self._repairs:
            self._num_repairs += self._repairs.count
            self._repairs.close()
            self._repairs = None

    def _wait_until_ready(self, process: TritonProcess) -> str:
        """Returns "" when all pipelines are ready or we are stopped, else what went wrong."""
        options = self.launch.options
        deadline, stopped = time.monotonic() + options.start_timeout_s, Stopped()
        while time.monotonic() < deadline and not self._stopping.is_set():
            if process.exit_code is not None:
                return f"tritonserver did not start ({exit_words(process.exit_code)}):\n{process.log_tail()}"
            # Never the server's own readiness: it says yes whatever became of the models.
            if is_open(self.url) and all(is_model_ready(self.url, one) for one in self._mount.pipelines):
                return ""
            for pid in stopped.look(process.vitals()):
                os.kill(pid, signal.SIGKILL)  # the load fails then, and is tried again
            time.sleep(0.05)
        if self._stopping.is_set():
            return ""
        limit = f"{options.start_timeout_s:.0f} s"
        return (
            f"model {' or '.join(self._mount.pipelines)} was not ready after {limit}:\n{process.log_tail()}"
        )

    def _may_restart(self, why: str, exit_code: int | None) -> bool:
        """Pauses and says yes; says no, and notes the failure, if that would not help."""
        was_ready = self._settled.is_set()
        pause_s = self._restarts.pause_s(why, was_ready=was_ready, exit_code=exit_code)
        if pause_s is None:
            self._failure = ServerError(self._restarts.failure(why, was_ready=was_ready))
            return False
        self.log(f"WARNING: {why}; starting it again in {pause_s:.1f} s")
        self._stopping.wait(pause_s)
        return True

    def _note(self, phase: str) -> None:
        """Writes how the server is."""
        restarts, repairs = self._restarts, self._repairs
        self._health.write(
            phase,
            {
                "restarts": restarts.count,
                "last_restart": restarts.last,
                "repairs": self.num_repairs(),
                "models": repairs.report() if repairs else {},
                "last_minute": self._last_minute.report(),
                "runtime": self.launch.runtime.title,
            },
        )

    def _forward(self, line: str) -> None:
        """Logs a line of tritonserver: all of them if verbose, else the errors once it is ready, and what
        steps say of requests (ensemble/request_log.py)."""
        if self.launch.options.verbose or (
            self._settled.is_set()
            and line.startswith(("E", "WARNING: "))
            and not any(noise in line for noise in _NOISE)
        ):
            self.log(line)


def _log_nothing(line: str) -> None:
    """Takes a line of the server's log and drops it."""


@contextlib.contextmanager
def serve(
    repository: Path,
    options: ServeOptions,
    log: Callable[[str], None] = _log_nothing,
    beside: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[Server]:
    """Serves a repository's active release while the block runs; `log` hears warnings, a line at a time.

    ServerError, ReleaseError or InvalidInput says what is in the way before anything is started. `beside`
    runs from then on, before the steps start, until they have ended.
    """
    server = _prepared(Path(repository).resolve(), options, log)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(beside())
        finally:  # also where that fails
            stack.callback(server.stop)
        release = open_release(server.launch.repository, server.release, server.launch.home)
        if missing := wait_for_changes(release, 0.0):
            log(f"WARNING: {missing}")
        address, port = options.address, options.http_port
        server.http_url = stack.enter_context(answering(server, address, port))
        server.start()
        yield server


def _prepared(repository: Path, options: ServeOptions, log: Callable[[str], None]) -> Server:
    """Checks the machine and the release, chooses the runtime and free ports, claims the state folder and
    mounts the release there."""
    check_packages(options)
    installation = find_tritonserver()
    check_address(options, installation)
    home = options.catalogue or repository
    name = check_servable(repository, log, home, options.route)
    state = options.state or default_state(repository)
    await_predecessor(state, log)
    runtime = choose_runtime(repository, name, installation, options, log)
    port, metrics = check_port(options.address, options.port), options.metrics_port
    metrics = None if metrics is None else check_port(options.address, metrics)
    sweep_regions()
    warn_of_shared_memory(open_release(repository, name), options, log)
    launch = Launch(repository, dataclasses.replace(options, port=port, metrics_port=metrics), runtime)
    claim = Claim(state, repository, home)
    try:
        run = make_run_folder(installation, claim.path.parent)
        mount = Mount(run.path, options.instances, options.num_gpus)
        mount.add(open_release(repository, name), runtime.plans)
        mount.point(
            only(name), aliases_of(repository, name)
        )  # what else the route has is mounted at the start
    except BaseException:
        empty(claim.path.parent)
        claim.drop()
        raise
    return Server(launch, claim, installation, run, log)


def _host(address: str) -> str:
    """Writes an address as it stands in a URL."""
    return f"[{address}]" if ":" in address else address
