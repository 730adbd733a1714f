"""Turns Triton's requests into arrays and back: batching, errors. No other file uses Triton's Python API.

One adapter serves every step. It joins the requests of a dynamic batch, runs the step once, and splits the
answer. A bad request is answered INVALID_ARG and left out; its batch-mates go on.
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from ensemble.arrays import Array, Tensors
from ensemble.budget import deadline_of
from ensemble.contract import CONTENTS
from ensemble.engines import HOME_VARIABLE, REPOSITORY_VARIABLE
from ensemble.engines.cards import take_card
from ensemble.errors import InvalidArgument, PeregrineError, ReleaseError
from ensemble.id_rule import encode_ids
from ensemble.local import open_step, read_request, rows_of, warm
from ensemble.options import Options, default_options, parse_options, stack, with_deadline
from ensemble.request_log import RequestLog, told
from ensemble.spec import TensorSpec
from ensemble.steps.served import open_served
from ensemble.telemetry import Publisher
from ensemble.tracing import spans_of


class PythonModel:
    """Is the TritonPythonModel of every member; which step it runs stands in its config.pbtxt."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the release's files, verified; an error here fails the load, not a request."""
        check_numpy()
        take_card(args["model_instance_name"])
        parameters = {
            name: value["string_value"]
            for name, value in json.loads(args["model_config"])["parameters"].items()
        }
        mounted = Path(args["model_repository"]).parent
        repository = Path(os.environ.get(REPOSITORY_VARIABLE, mounted))
        home = Path(os.environ.get(HOME_VARIABLE, repository))
        release = open_served(repository, parameters["release"], home)
        self.schema = release.schema
        self.model = release.model(parameters["step"])
        self.step = open_step(self.model, release)
        warm(self.model, self.step)
        self.release = release
        if not self.model.is_engine:
            release.live.follow()
        own = getattr(self.step, "metrics", list)
        labels = {"model": args["model_name"], "instance": args["model_instance_name"]}
        self.ran = getattr(self.step, "ran", None)  # of steps inside this one
        self.spans = spans_of(release.name) if self.ran else None
        self.publisher = Publisher(pb_utils, lambda: [*release.metrics(), *own()], labels)
        self.log = RequestLog(args["model_name"])
        gc.collect()
        # What is loaded stays: no collection walks through all of it again in the middle of a request
        gc.freeze()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers requests, one response each, in their order."""
        responses: list[Any] = [None] * len(requests)
        self.publisher.publish()
        good: list[int] = []
        feeds: list[Tensors] = []
        options: list[Options] = []
        for i, request in enumerate(requests):
            try:
                # Once: looking each up by name walks the list each time.
                given = {tensor.name(): tensor for tensor in request.inputs()}
                tensors = {spec.name: _array(given[spec.name], spec) for spec in self.model.inputs}
                asked = self._options(request, len(next(iter(tensors.values()))))
                tensors = read_request(self.step, asked, tensors)
                options.append(asked)
            except InvalidArgument as error:
                responses[i] = _failed(error, pb_utils.TritonError.INVALID_ARG)
                continue
            good.append(i)
            feeds.append(tensors)
        if good:
            asked_for = [requests[i] for i in good]
            for i, response in zip(good, self._answer(asked_for, feeds, options), strict=True):
                responses[i] = response
            if self.spans and self.ran:
                self.spans.send(asked_for, self.ran())
        return responses

    def finalize(self) -> None:
        """Ends the threads that follow the live items and send spans."""
        self.release.close()
        if self.spans:
            self.spans.close()

    def _options(self, request: Any, num_users: int) -> Options:
        """Parses a request's parameters; engines take none."""
        if self.model.is_engine:
            return default_options(num_users)
        parameters = request.parameters()
        options = parse_options(parameters, num_users, self.schema)
        return with_deadline(options, deadline_of(parameters, request.timeout()))

    def _answer(self, requests: list[Any], feeds: list[Tensors], options: list[Options]) -> list[Any]:
        """Joins the feeds of good requests, runs the step once, and splits its outputs into responses.

        What fails is logged, and told to the callers without what the exception says: batch-mates read it.
        """
        joined = feeds[0]
        if len(feeds) > 1:
            joined = {name: np.concatenate([one[name] for one in feeds]) for name in joined}
        try:
            outputs = self.step.run(stack(options), **joined)
        except Exception as error:
            self.log.failed(self.release.name, [one.request_id() for one in requests], error)
            if isinstance(error, PeregrineError):
                return [_failed(error, pb_utils.TritonError.INTERNAL)] * len(feeds)
            # Triton answers the whole batch with it: with an error for each request, 2.51 died of signal 11
            # under a canary whose engine fails (tests/together/test_canary.py).
            raise RuntimeError(told(error)) from None
        ends = np.cumsum([len(o) for o in options])
        responses = []
        degraded = outputs.get("degraded")
        if degraded is not None and not degraded.any():
            degraded = None  # nothing to say of any request
        for request, start, end, request_options in zip(
            requests, [0, *ends[:-1]], ends, options, strict=True
        ):
            if degraded is not None and degraded[start:end].any():
                self.log.answered(self.release.name, request.request_id(), degraded[start:end])
            tensors = [
                pb_utils.Tensor(spec.name, rows_of(outputs[spec.name], spec, start, end, request_options))
                for spec in self.model.outputs
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses


def _array(tensor: Any, spec: TensorSpec) -> Array:
    """Gives a request's tensor [B, ...] as the step takes it: ids, which come as objects, as S."""
    array = tensor.as_numpy()
    if spec.dtype != "bytes" or spec.name in CONTENTS:
        return array
    return encode_ids(spec.name, array.ravel().tolist()).reshape(array.shape)


def _failed(error: Exception, code: int) -> Any:
    """Makes the response that says what was wrong."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))


def check_numpy() -> None:
    """Raises ReleaseError where this numpy would silently empty every output."""
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0" and _server_is_old():
        raise ReleaseError(
            f"numpy {np.__version__}: this server's stub gives empty outputs with numpy 2",
            "install numpy 1.26",
        )


def _server_is_old() -> bool:
    """Says where numpy 2 silently empties every output: in 2.51's stubs, which are built against numpy 1."""
    return os.environ.get("TRITON_SERVER_VERSION", "").startswith("2.51")
