"""Runs the whole pipeline in one process: the local twin, the same steps under the same names, no server."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ensemble.arrays import Array, Tensors
from ensemble.budget import deadline_of
from ensemble.contract import PIPELINE
from ensemble.errors import InvalidArgument
from ensemble.id_rule import encode_id, encode_ids
from ensemble.options import Options, default_options, parse_options, stack, with_deadline
from ensemble.schema import Schema
from ensemble.spec import ModelSpec, PipelineSpec, TensorSpec
from ensemble.steps.served import ServedRelease
from ensemble.telemetry import Metric
from ensemble.tracing import Ran

_DTYPES = {"bytes": "S1"}  # ids, as python_model gives them to steps
NO_SEARCH = (
    "release {} has no search: its shop encodes no texts and no pictures; give a feature of its items an "
    "`encoder` in shop.toml and build again"
)
RETURNED = "K"  # the axis that is cut to each request's own top_k


class Step(Protocol):
    """Is what every step is: opened once on a release, then run on whole batches."""

    def run(self, options: Options, **tensors: Array) -> Tensors:
        """Turns the model's inputs by name into its outputs by name; the first axis is the batch.

        A step may also have `read(options, **tensors)`: it turns what it knows of one request's inputs into
        what `run` takes, and raises InvalidArgument for what is wrong with that request alone.
        """
        ...


def open_step(model: ModelSpec, release: ServedRelease) -> Step:
    """Opens the step that ModelSpec.step names ("module:Class") on `release`."""
    module, _, name = model.step.partition(":")
    step: Step = getattr(importlib.import_module(module), name)(model, release)
    return step


def read_request(step: Step, options: Options, tensors: Tensors) -> Tensors:
    """Gives one request's tensors as `step` takes them; InvalidArgument says what is wrong with them."""
    read = getattr(step, "read", None)
    return tensors if read is None else {**tensors, **read(options, **tensors)}


def warm(model: ModelSpec, step: Step) -> None:
    """Runs a step for users that nobody is, once a batch size that it names in `warm_sizes` (one user, if it
    names none): the first request then finds its code imported, its files mapped and its graphs captured."""
    for size in getattr(step, "warm_sizes", (1,)):
        tensors = {
            tensor.name: np.zeros(
                (size, *(dim or 1 for dim in tensor.dims)), _DTYPES.get(tensor.dtype, tensor.dtype)
            )
            for tensor in model.inputs
        }
        step.run(default_options(size), **tensors)


class FusedStep:
    """Runs all of a pipeline as one step: all its models in one process, on the same arrays."""

    def __init__(self, model: ModelSpec, release: ServedRelease) -> None:
        self.pipeline = LocalPipeline(release, model.name)
        self.metrics = self.pipeline.step_metrics  # the release's own are published beside them
        sizes = {size for one in self.pipeline.steps.values() for size in getattr(one, "warm_sizes", (1,))}
        self.warm_sizes = tuple(sorted(sizes))

    def read(self, options: Options, **tensors: Array) -> Tensors:
        """Reads one request as each step would; InvalidArgument says what is wrong with it."""
        return self.pipeline.read(options, tensors)

    def run(self, options: Options, **tensors: Array) -> Tensors:
        """Turns the pipeline's inputs by name into the answer's tensors."""
        return self.pipeline.run(options, tensors)

    def ran(self) -> list[Ran]:
        """Says when each step of the last batch ran."""
        return self.pipeline.ran


def rows_of(array: Array, spec: TensorSpec, start: int, end: int, options: Options) -> Array:
    """Gives the rows of one request of a batch, cut along K to the most that it asked for."""
    part = array[start:end]
    if len(spec.axes) > 1 and spec.axes[1].letter == RETURNED:
        part = part[:, : int(options.top_k.max(initial=1))]
    return np.ascontiguousarray(part)


class LocalPipeline:
    """Answers one of a release's pipelines in this process: `recommend`, if none is named."""

    def __init__(self, release: ServedRelease, name: str = PIPELINE) -> None:
        if name not in release.pipelines:
            raise InvalidArgument(NO_SEARCH.format(release.name))
        self.release, self.spec = release, release.pipelines[name]
        self.steps = {model.name: open_step(model, release) for model in self.spec.models}
        self._seconds = dict.fromkeys(self.steps, 0.0)
        self.ran: list[Ran] = []  # the steps of the last batch

    def metrics(self) -> list[Metric]:
        """Lists the tiers' numbers, and those of the steps."""
        return [*self.release.metrics(), *self.step_metrics()]

    def step_metrics(self) -> list[Metric]:
        """Lists what each step has taken, and the numbers of every step that has any, with its name."""
        own = [
            one._replace(labels=(*one.labels, ("step", name)))
            for name, step in self.steps.items()
            if hasattr(step, "metrics")
            for one in step.metrics()
        ]
        taken = self._seconds.items()
        return [*own, *(Metric("peregrine_step_seconds", (("step", name),), value) for name, value in taken)]

    def recommend(
        self,
        user_ids: Sequence[bytes | str],
        parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> Tensors:
        """Answers B users: ids -> the answer's tensors [B, …].

        `parameters` are a request's: one mapping for all users, or one each.
        """
        options = self._options(parameters, len(user_ids))
        return self.run(options, self.read(options, {"user_id": _ids(user_ids)}))

    def search(
        self,
        user_ids: Sequence[bytes | str],
        texts: Sequence[str | bytes],
        images: Sequence[bytes] | None = None,
        parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> Tensors:
        """Answers B users who each search for a text, a picture's file, or both; empty: there is none.

        `parameters` as in `recommend`; InvalidArgument says what is wrong with a query.
        """
        options = self._options(parameters, len(user_ids))
        texts = [text.encode("utf-8", "replace") if isinstance(text, str) else text for text in texts]
        columns = {"query_text": texts, "query_image": images or [b""] * len(texts)}
        tensors = {name: column_of(values) for name, values in columns.items()}
        return self.run(options, self.read(options, {"user_id": _ids(user_ids), **tensors}))

    def _options(
        self, parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, num_users: int
    ) -> Options:
        """Parses a request's parameters, one mapping for all users, or one each."""
        if parameters is None or isinstance(parameters, Mapping):
            return parse_options(json.dumps(dict(parameters or {})), num_users, self.release.schema)
        return stack([parse_options(json.dumps(dict(one)), 1, self.release.schema) for one in parameters])

    def read(self, options: Options, tensors: Tensors) -> Tensors:
        """Gives one request's tensors as the steps take them; InvalidArgument says what is wrong."""
        read = dict(tensors)
        for step in self.steps.values():
            read = read_request(step, options, read)
        return read

    def run(self, options: Options, tensors: Tensors) -> Tensors:
        """Runs all steps whose outputs are not yet among `tensors`; gives the answer's tensors."""
        known, self.ran = dict(tensors), []
        for model in self.spec.models:
            if all(t.name in known for t in model.outputs):
                continue
            started = time.time_ns()
            known.update(self.steps[model.name].run(options, **{t.name: known[t.name] for t in model.inputs}))
            ended = time.time_ns()
            self._seconds[model.name] += max(0, ended - started) / 1e9  # a clock may be set
            self.ran.append(Ran(model.name, started, ended))
        return {t.name: known[t.name] for t in self.spec.outputs}


def _ids(user_ids: Sequence[bytes | str]) -> Array:
    """Encodes ids as [B, 1] S."""
    return np.array([encode_id("user_id", user, may_be_empty=True) for user in user_ids], dtype="S")[:, None]


def column_of(values: Sequence[Any]) -> Array:
    """Lays values out as [B, 1] object, whatever they are."""
    column = np.empty((len(values), 1), object)
    column[:, 0] = values
    return column


def prepared(
    inputs: Array, parameters: Mapping[str, Any], schema: Schema, pipeline: PipelineSpec | None = None
) -> tuple[Tensors, Options]:
    """Checks a pipeline's inputs [b, C] object, a column each, and their parameters -> its tensors by name
    and options; InvalidArgument."""
    ids = encode_ids("user_id", inputs[:, 0].tolist())[:, None]
    text = json.dumps(dict(parameters)) if parameters else ""
    names = ["user_id"] if pipeline is None else [tensor.name for tensor in pipeline.inputs]
    others = {name: inputs[:, [column]] for column, name in enumerate(names) if column}
    return {"user_id": ids, **others}, with_deadline(parse_options(text, len(ids), schema), deadline_of(text))


class BatchedPipeline:
    """Answers the parts of several requests at once with a release's pipeline (ensemble/steps/router.py)."""

    def __init__(self, release: ServedRelease, name: str = PIPELINE) -> None:
        model = release.pipelines[name].fused
        step = FusedStep(model, release)
        warm(model, step)
        self.release, self.pipeline = release, step.pipeline

    def metrics(self) -> list[Metric]:
        """Lists the numbers of tiers and steps, each with the release's name."""
        label = ("release", self.release.name)
        return [one._replace(labels=(*one.labels, label)) for one in self.pipeline.metrics()]

    def prepare(self, inputs: Array, parameters: Mapping[str, Any]) -> tuple[Tensors, Options]:
        """Checks inputs [b, C] object and their parameters -> tensors and options; InvalidArgument."""
        tensors, options = prepared(inputs, parameters, self.release.schema, self.pipeline.spec)
        return self.pipeline.read(options, tensors), options

    def run(self, prepared: Sequence[tuple[Tensors, Options]]) -> list[Tensors]:
        """Answers what was prepared as one batch: the tensors of each, [b, K, …]."""
        options = [one for _, one in prepared]
        names = [tensor.name for tensor in self.pipeline.spec.inputs]
        joined = {name: np.concatenate([tensors[name] for tensors, _ in prepared]) for name in names}
        answer = self.pipeline.run(stack(options), joined)
        ends = np.cumsum([len(one) for one in options]).tolist()
        return [
            {t.name: rows_of(answer[t.name], t, start, end, one) for t in self.pipeline.spec.outputs}
            for start, end, one in zip([0, *ends[:-1]], ends, options, strict=True)
        ]
