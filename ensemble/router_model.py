"""Is the TritonPythonModel of a route's router, the step of a pipeline's alias while a canary is tried.

In an ensemble it calls the releases' own ensembles (Triton's business logic scripting); served fused, it runs
both pipelines in its process. What is asked of whom, and when: ensemble/steps/router.py.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from ensemble.arrays import Array
from ensemble.contract import PIPELINE, SEARCH, Degraded
from ensemble.engines import HOME_VARIABLE, REPOSITORY_VARIABLE
from ensemble.engines.cards import take_card
from ensemble.errors import InvalidArgument
from ensemble.local import BatchedPipeline, prepared
from ensemble.python_model import check_numpy
from ensemble.release.release import open_release
from ensemble.release.route import route_from_json
from ensemble.request_log import TROUBLE, RequestLog, told
from ensemble.server.router_files import NUMBERS
from ensemble.server.watched import PROBE
from ensemble.spec import PipelineSpec
from ensemble.steps.query import check_query
from ensemble.steps.router import REQUEST_ID, CallFailed, FusedRouter, Request, Router
from ensemble.steps.served import open_served
from ensemble.telemetry import Metric, Publisher

_WRITE_EVERY_S = 1.0


class _Outputs(Mapping[str, Array]):
    """Holds an answer's tensors as Triton gave them: most are passed on, and never become arrays."""

    def __init__(self, tensors: list[Any]) -> None:
        self.tensors = {tensor.name(): tensor for tensor in tensors}

    def __getitem__(self, name: str) -> Array:
        return self.tensors[name].as_numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class RouterModel:
    """Answers a pipeline by the releases of the route, which both stand in its config.pbtxt."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the route, and where it is served fused both releases; an error here fails the load."""
        check_numpy()
        take_card(args["model_instance_name"])
        parameters = json.loads(args["model_config"])["parameters"]
        mounted = Path(args["model_repository"]).parent
        self.route = route_from_json(parameters["route"]["string_value"], args["model_name"])
        self.name = parameters["pipeline"]["string_value"] if "pipeline" in parameters else PIPELINE
        is_fused, self.pipelines = "fused" in parameters, list[BatchedPipeline]()
        repository = Path(os.environ.get(REPOSITORY_VARIABLE, mounted))
        home = Path(os.environ.get(HOME_VARIABLE, repository))
        self.router = self._fused(repository, home) if is_fused else self._calling(repository)
        self.loop = asyncio.new_event_loop()
        if not is_fused:
            threading.Thread(target=self.loop.run_forever, name="router", daemon=True).start()
        labels = {"model": args["model_name"], "instance": args["model_instance_name"]}
        self.publisher = Publisher(pb_utils, self._metrics, labels)
        self.log = RequestLog(args["model_name"])
        self.numbers = mounted.parent / NUMBERS / f"{args['model_instance_name']}.json"
        self.next_write_s = 0.0
        gc.collect()
        gc.freeze()  # as in PythonModel

    def _calling(self, repository: Path) -> Router:
        """Opens no more of the releases than what says which options they take.

        Wrong ones are told here: the code of a call's error is lost on the way (INTERNAL, on 2.51).
        """
        releases = {name: open_release(repository, name) for name in self.route.releases}
        self.spec = releases[self.route.main].pipelines[self.name]

        def check(release: str, inputs: Array, parameters: Mapping[str, Any]) -> None:
            """Raises InvalidArgument for what the release's steps would refuse."""
            tensors, options = prepared(inputs, parameters, releases[release].schema, self.spec)
            if self.name == SEARCH:
                check_query(options, tensors)

        return Router(self.route, partial(_ask, self.spec), check)

    def _fused(self, repository: Path, home: Path) -> FusedRouter:
        """Opens both releases in this process."""
        releases = [open_served(repository, name, home) for name in self.route.releases]
        self.pipelines = [BatchedPipeline(release, self.name) for release in releases]
        self.spec = releases[0].pipelines[self.name]
        for release in releases:
            release.live.follow()
        return FusedRouter(self.route, self.pipelines)

    def _metrics(self) -> list[Metric]:
        """Lists what each release did, and, fused, the numbers of its steps."""
        steps = (one for pipeline in self.pipelines for one in pipeline.metrics())
        return [*self.router.metrics(), *steps]

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Answers requests: at once where it is fused; else each when it is done, as the next ones come."""
        self._publish()
        asked = [_request(request, self.spec) for request in requests]
        if isinstance(self.router, FusedRouter):
            good = [one for one in asked if isinstance(one, Request)]
            answers = iter(self.router.answer(good))
            return [self._fused_response(one, answers) for one in asked]
        for request, one in zip(requests, asked, strict=True):
            sender = request.get_response_sender()
            done = partial(self._send, sender, request.request_id())
            if not isinstance(one, Request):
                done(one)
            elif not self.router.start_main(one, done):
                asyncio.run_coroutine_threadsafe(_answered(self.router, one, done), self.loop)
        return None

    def _fused_response(self, asked: Request | InvalidArgument, answers: Iterator[Any]) -> Any:
        """Makes a request's response of the next answer, unless it could not be read."""
        if not isinstance(asked, Request):
            return _response(asked)
        answer = next(answers)
        self._note(asked.request_id, answer, TROUBLE)
        return _response(answer)

    def _send(self, sender: Any, request_id: str, answer: Any) -> None:
        """Sends a request's only response. What its steps lack they say themselves."""
        self._note(request_id, answer, Degraded.CANARY_FAILED)
        sender.send(_response(answer), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _note(self, request_id: str, answer: Any, trouble: Degraded) -> None:
        """Logs an answer that failed by no fault of its caller's, or that has `trouble`."""
        if isinstance(answer, BaseException):
            if not isinstance(answer, InvalidArgument):
                self.log.failed(self.route.main, [request_id], answer.__cause__ or answer)
        elif not isinstance(answer, _Outputs) and answer["degraded"].any():
            self.log.answered(self.route.main, request_id, answer["degraded"], trouble)

    def _publish(self) -> None:
        """Publishes the counts as metrics, and writes them for the guard, once a second."""
        self.publisher.publish()
        now = time.monotonic()
        if now < self.next_write_s:
            return
        self.next_write_s = now + _WRITE_EVERY_S
        counts = self.router.counts
        text = json.dumps(
            {
                "sequence": self.route.sequence,
                "releases": {
                    name: one.to_json() for name, one in zip(self.route.releases, counts, strict=True)
                },
            }
        )
        staged = self.numbers.with_suffix(".staged")
        try:
            self.numbers.parent.mkdir(exist_ok=True)
            staged.write_text(text, encoding="utf-8")
            staged.replace(self.numbers)
        except OSError:  # a full disk must not fail a request; the next second tries again
            return

    def finalize(self) -> None:
        """Ends the threads."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        for pipeline in self.pipelines:
            pipeline.release.close()


def _request(request: Any, spec: PipelineSpec) -> Request | InvalidArgument:
    """Reads one of Triton's requests; what cannot be read is the caller's fault, and no batch-mate's."""
    name = ""
    try:
        parameters = request.parameters()
        if PROBE in parameters:
            return InvalidArgument(f"{PROBE}: the router is at work")
        given, columns = {tensor.name(): tensor for tensor in request.inputs()}, []
        for name in (tensor.name for tensor in spec.inputs):
            columns.append(given[name].as_numpy())
        return Request(np.concatenate(columns, axis=1), parameters, request.timeout(), request.request_id())
    except Exception as error:
        return InvalidArgument(f"{name}: cannot be read: {error}")


def _ask(spec: PipelineSpec, release: str, inputs: Array, parameters: Mapping[str, Any]) -> Any:
    """Asks a release's ensemble; CallFailed with Triton's message and code. Called in a thread.

    Parameters of such a call are bool, int and str only: a double goes as its JSON, which is read as one.
    """
    plain = {
        name: value if isinstance(value, bool | int | str) else json.dumps(value)
        for name, value in parameters.items()
    }
    try:
        response = pb_utils.InferenceRequest(
            model_name=f"{release}_{spec.name}",
            requested_output_names=[tensor.name for tensor in spec.outputs],
            inputs=[
                pb_utils.Tensor(tensor.name, np.ascontiguousarray(inputs[:, [column]]))
                for column, tensor in enumerate(spec.inputs)
            ],
            parameters=plain,
            request_id=REQUEST_ID.get(),
        ).exec()
    except Exception as error:  # pb_utils.TritonModelException, where the model is not there
        raise CallFailed(str(error), pb_utils.TritonError.UNAVAILABLE) from error
    if response.has_error():
        fault = response.error()
        raise CallFailed(fault.message(), fault.code())
    return _Outputs(response.output_tensors())


async def _answered(router: Router, request: Request, done: Callable[[Any], None]) -> None:
    """Answers one request by calls to both releases' ensembles."""
    answer: Any
    try:
        answer = await router.answer(*request)
    except Exception as error:  # every request is answered, whatever goes wrong
        answer = error
    done(answer)


def _response(answer: Any) -> Any:
    """Makes a response of an answer's tensors, or of what went wrong. Triton's own error, passed on as it is,
    would become INTERNAL."""
    if isinstance(answer, _Outputs):
        return pb_utils.InferenceResponse(list(answer.tensors.values()))
    if isinstance(answer, InvalidArgument):
        code = pb_utils.TritonError.INVALID_ARG
    elif isinstance(answer, BaseException):
        code = getattr(answer, "code", None) or pb_utils.TritonError.INTERNAL
        answer = answer if isinstance(answer, CallFailed) else told(answer)
    else:
        tensors = [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in answer.items()]
        return pb_utils.InferenceResponse(tensors)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer), code))
