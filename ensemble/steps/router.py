"""Asks the releases of a route for a request's users, and stands in for the canary where it fails.

Nothing here knows Triton: whoever opens a router says how a release is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from ensemble.arrays import Array, Tensors
from ensemble.errors import InvalidArgument, PeregrineError
from ensemble.options import parameters_of, read_parameters
from ensemble.release.route import Route
from ensemble.request_log import told
from ensemble.steps.routing import Counts, Part, flagged, joined, parts_of, wait_s
from ensemble.telemetry import Metric

# Calls at once, of the 32 that Triton's Python backend has threads for in an instance; a canary that hangs
# keeps its own only
MAIN_CALLS, CANARY_CALLS = 20, 8
# The id of the request that is answered, which the releases' own log lines name; threads of calls are told it
REQUEST_ID = contextvars.ContextVar("request_id", default="")


class CallFailed(PeregrineError):
    """Says that a release did not answer, with the code and message of what asked it."""

    def __init__(self, message: str, code: Any = None) -> None:
        super().__init__(message)
        self.code = code


# (release, its users' inputs [b, C] object, their parameters) -> the answer; CallFailed where there is none.
Ask = Callable[[str, Array, Mapping[str, Any]], Tensors]
# The same arguments; InvalidArgument for what the release would refuse.
Check = Callable[[str, Array, Mapping[str, Any]], None]


class Request(NamedTuple):
    """Holds what a caller sent: the pipeline's inputs [B, C] object, users' ids in the first column,
    parameters as JSON, a budget or 0, the request's id or ""."""

    inputs: Array
    parameters: str
    budget_us: int = 0
    request_id: str = ""


class Router:
    """Answers requests of mixed users, each release asked once for its part, both at the same time.

    Its methods run in one event loop, the calls in threads of their own.
    """

    def __init__(
        self, route: Route, ask: Ask, check: Check, calls: tuple[int, int] = (MAIN_CALLS, CANARY_CALLS)
    ) -> None:
        self.route, self._ask, self._check, self._calls = route, ask, check, calls
        self.counts = [Counts() for _ in route.releases]
        self._pools = [ThreadPoolExecutor(most, "route") for most in calls]
        self._lock = threading.Lock()  # of the counts, which threads and loop change
        self._overdue = 0  # calls of the canary that nobody waits for any more

    def start_main(self, request: Request, done: Callable[[Any], None]) -> bool:
        """Asks the main release for a request of its users alone, in one thread from end to end, and calls
        `done` with the answer or the error; False where a user is the canary's, and nothing was begun.

        Most requests are such, and each hop to another thread costs what a step does.
        """
        if self.route.places(request.inputs[:, 0].tolist()).any():
            return False

        def run() -> None:
            counts, started = self.counts[0], time.perf_counter()
            REQUEST_ID.set(request.request_id)
            try:
                raw = read_parameters(request.parameters)
                self._check(self.route.main, request.inputs, raw)
                answer = self._ask(self.route.main, request.inputs, raw)
            except Exception as error:
                with self._lock:
                    counts.refusal() if isinstance(error, InvalidArgument) else counts.failure()
                done(error)
                return
            done(answer)
            with self._lock:
                counts.answer(time.perf_counter() - started, answer, wait_s(request.budget_us))

        self._pools[0].submit(run)
        return True

    async def answer(
        self, inputs: Array, parameters: str, budget_us: int = 0, request_id: str = ""
    ) -> Tensors:
        """Answers the users of one request: inputs [B, C] object, users' ids first -> the answer's [B, …].

        InvalidArgument or CallFailed if the request is wrong or the main release fails.
        """
        REQUEST_ID.set(request_id)
        raw = read_parameters(parameters)
        parts = parts_of(self.route.places(inputs[:, 0].tolist()))
        if len(parts) == 1:
            return await self._part(parts[0], inputs, raw, budget_us)
        asked = [
            self._part(
                part, inputs[part.users], parameters_of(raw, part.users.tolist(), len(inputs)), budget_us
            )
            for part in parts
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        errors = [one for one in answers if isinstance(one, BaseException)]
        if errors:
            raise errors[0]
        return joined(parts, [one for one in answers if not isinstance(one, BaseException)])

    async def _part(self, part: Part, inputs: Array, raw: Mapping[str, Any], budget_us: int) -> Tensors:
        """Gives the answer of the part's own release, or the main one's with a flag."""
        counts = self.counts[part.place]
        try:
            self._check(self.route.releases[part.place], inputs, raw)
        except InvalidArgument:
            with self._lock:
                counts.refusal()
            raise
        if part.place == 0:
            return await self._asked(0, inputs, raw, counts, wait_s(budget_us))
        with contextlib.suppress(CallFailed):
            return await self._asked(1, inputs, raw, counts, wait_s(budget_us))
        self._check(self.route.main, inputs, raw)
        # What the main release does in the canary's place is none of its own counts
        return flagged(await self._asked(0, inputs, raw, Counts(), wait_s(budget_us)))

    async def _asked(
        self,
        place: int,
        inputs: Array,
        raw: Mapping[str, Any],
        counts: Counts,
        limit_s: float,
    ) -> Tensors:
        """Asks a release, and counts what it does; CallFailed if it fails, or the canary is late."""
        started = time.perf_counter()
        try:
            answer = await self._call(place, inputs, raw, limit_s if place else None)
        except CallFailed:
            with self._lock:
                counts.failure()
            raise
        with self._lock:
            counts.answer(time.perf_counter() - started, answer, limit_s)
        return answer

    async def _call(
        self, place: int, inputs: Array, raw: Mapping[str, Any], limit_s: float | None
    ) -> Tensors:
        """Waits for a release's answer, within a limit if there is one; not at all while its calls hang."""
        if limit_s is not None and self._overdue >= self._calls[1]:
            raise CallFailed("all calls to the canary hang")
        release = self.route.releases[place]
        call = self._pools[place].submit(contextvars.copy_context().run, self._ask, release, inputs, raw)
        waiting = asyncio.wrap_future(call)
        done, _ = await asyncio.wait({waiting}, timeout=limit_s)
        if not done:
            self._give_up(call, waiting)
            raise CallFailed(f"the canary did not answer within {(limit_s or 0) * 1e3:.0f} ms")
        try:
            return waiting.result()
        except CallFailed:
            raise
        except Exception as error:  # of whatever kind: a release that fails is not the router's failure
            raise CallFailed(f"{release}: {told(error)}") from error

    def _give_up(self, call: Future[Tensors], waiting: asyncio.Future[Tensors]) -> None:
        """Waits no longer for a call, which nobody can end once it runs: it is counted while it does."""
        if call.cancel():
            return
        self._overdue += 1

        def ended(done: asyncio.Future[Tensors]) -> None:
            self._overdue -= 1
            done.cancelled() or done.exception()

        waiting.add_done_callback(ended)

    def metrics(self) -> list[Metric]:
        """Lists what each release did so far."""
        return metrics_of(self.route, self.counts)


class Pipeline(Protocol):
    """Is a release's whole pipeline in this process."""

    def prepare(self, inputs: Array, parameters: Mapping[str, Any]) -> Any:
        """Checks users' inputs [b, C] object and their parameters; InvalidArgument where they are wrong."""

    def run(self, prepared: Sequence[Any]) -> list[Tensors]:
        """Answers what was prepared, as one batch; PeregrineError if it fails."""


class _Job(NamedTuple):
    """Is a part of a request of the batch, with what it was asked."""

    request: int
    part: Part
    inputs: Array
    parameters: Mapping[str, Any]
    prepared: Any
    limit_s: float  # for the canary


class FusedRouter:
    """Answers batches of requests in this process, by the pipeline of each release of a route.

    The canary's runs in a thread of its own beside the main one's; while it hangs, the main one answers all.
    """

    def __init__(self, route: Route, pipelines: Sequence[Pipeline]) -> None:
        self.route, self._pipelines = route, pipelines
        self.counts = [Counts() for _ in route.releases]
        self._aside: Future[list[Tensors]] | None = None
        self._worker: threading.Thread | None = None
        self._work_to_do = queue.SimpleQueue[tuple[Future[list[Tensors]], list[Any]]]()

    def answer(self, requests: Sequence[Request]) -> list[Tensors | PeregrineError]:
        """Answers each request, or says why not: InvalidArgument, or CallFailed if the main release fails."""
        started, errors = time.perf_counter(), dict[int, PeregrineError]()
        jobs = self._jobs(requests, errors)
        main, tried = ([job for job in jobs if job.part.place == place] for place in (0, 1))
        aside = self._start_aside([job.prepared for job in tried])
        answers = self._run_main(main, errors)
        if tried:
            limit_s = min(job.limit_s for job in tried)
            answers += self._of_canary(tried, aside, started, limit_s, errors)
        return [errors[i] if i in errors else _request_answer(i, answers) for i in range(len(requests))]

    def _jobs(self, requests: Sequence[Request], errors: dict[int, PeregrineError]) -> list[_Job]:
        """Cuts requests into parts; notes the error of those that are wrong, and leaves them out."""
        jobs = list[_Job]()
        for i, (inputs, parameters, budget_us, _) in enumerate(requests):
            place, mine = 0, list[_Job]()
            try:
                raw = read_parameters(parameters)
                parts = parts_of(self.route.places(inputs[:, 0].tolist()))
                for part in parts:
                    place, users = part.place, part.users.tolist()
                    asked = raw if len(parts) == 1 else parameters_of(raw, users, len(inputs))
                    ids = inputs[part.users]
                    prepared = self._pipelines[place].prepare(ids, asked)
                    mine.append(_Job(i, part, ids, asked, prepared, wait_s(budget_us)))
            except InvalidArgument as error:
                self.counts[place].refusal()
                errors[i] = error
                continue
            jobs += mine
        return jobs

    def _start_aside(self, prepared: list[Any]) -> Future[list[Tensors]] | None:
        """Begins to run the canary's pipeline; None where there is nothing to do, or it hangs already."""
        if not prepared or (self._aside is not None and not self._aside.done()):
            return None
        future = self._aside = Future[list[Tensors]]()
        if self._worker is None:  # always the same thread: engines on a GPU keep what they captured by thread
            self._worker = threading.Thread(target=self._work, name="canary", daemon=True)
            self._worker.start()
        self._work_to_do.put((future, prepared))
        return future

    def _work(self) -> None:
        """Runs the canary's pipeline whenever there is something for it."""
        while True:
            future, prepared = self._work_to_do.get()
            try:
                future.set_result(self._pipelines[1].run(prepared))
            except BaseException as error:
                future.set_exception(error)

    def _run_main(
        self, jobs: list[_Job], errors: dict[int, PeregrineError], *, is_standing_in: bool = False
    ) -> list[tuple[_Job, Tensors]]:
        """Runs the main release's pipeline; what it does for the canary is none of its own counts."""
        counts, started = Counts() if is_standing_in else self.counts[0], time.perf_counter()
        if not jobs:
            return []
        try:
            answers = self._pipelines[0].run([job.prepared for job in jobs])
        except Exception as error:  # of whatever kind: no request brings down its batch-mates of the canary
            failed = CallFailed(told(error))
            failed.__cause__ = error
            for job in jobs:
                counts.failure()
                errors[job.request] = failed
            return []
        for job, answer in zip(jobs, answers, strict=True):
            counts.answer(time.perf_counter() - started, answer, job.limit_s)
        return list(zip(jobs, answers, strict=True))

    def _of_canary(
        self,
        jobs: list[_Job],
        aside: Future[list[Tensors]] | None,
        started: float,
        limit_s: float,
        errors: dict[int, PeregrineError],
    ) -> list[tuple[_Job, Tensors]]:
        """Gives the canary's answers; where it failed or is late, the main release's, with a flag."""
        counts = self.counts[1]
        try:
            if aside is None:
                raise TimeoutError
            answers = aside.result(max(0.0, started + limit_s - time.perf_counter()))
        except Exception:  # of whatever kind: it is the release that is tried
            for _ in jobs:
                counts.failure()
            return [
                (job, flagged(answer))
                for job, answer in self._run_main(self._for_main(jobs, errors), errors, is_standing_in=True)
            ]
        for job, answer in zip(jobs, answers, strict=True):
            counts.answer(time.perf_counter() - started, answer, job.limit_s)
        return list(zip(jobs, answers, strict=True))

    def _for_main(self, jobs: list[_Job], errors: dict[int, PeregrineError]) -> list[_Job]:
        """Prepares the canary's jobs for the main release, whose columns may be others."""
        again = []
        for job in jobs:
            try:
                prepared = self._pipelines[0].prepare(job.inputs, job.parameters)
            except InvalidArgument as error:
                errors[job.request] = error
                continue
            again.append(job._replace(prepared=prepared))
        return again

    def metrics(self) -> list[Metric]:
        """Lists what each release did so far."""
        return metrics_of(self.route, self.counts)


def _request_answer(request: int, answers: Sequence[tuple[_Job, Tensors]]) -> Tensors:
    """Puts the answers of one request's parts together."""
    mine = [(job.part, answer) for job, answer in answers if job.request == request]
    return joined([part for part, _ in mine], [answer for _, answer in mine])


def metrics_of(route: Route, counts: Sequence[Counts]) -> list[Metric]:
    """Lists the counts of a route's releases as metrics."""
    named = [(("release", name), one) for name, one in zip(route.releases, counts, strict=True)]
    return [
        Metric(f"peregrine_route_{what}", (label,), float(getattr(one, what)))
        for label, one in named
        for what in ("requests", "failed", "late", "refused", "lists", "degraded", "empty")
    ]
