"""Runs the whole pipeline in one process: the local twin, the same steps under the same names, no server."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ensemble.arrays import Array, Tensors
from ensemble.id_rule import encode_id, encode_ids
from ensemble.options import Options, deadline_of, default_options, parse_options, stack, with_deadline
from ensemble.schema import Schema
from ensemble.spec import ModelSpec, TensorSpec
from ensemble.steps.served import ServedRelease
from ensemble.telemetry import Metric

_DTYPES = {"bytes": "S1"}  # ids, as python_model gives them to steps
RETURNED = "K"  # the axis that is cut to each request's own top_k


class Step(Protocol):
    """Is what every step is: opened once on a release, then run on whole batches."""

    def run(self, options: Options, **tensors: Array) -> Tensors:
        """Turns the model's inputs by name into its outputs by name; the first axis is the batch."""
        ...


def open_step(model: ModelSpec, release: ServedRelease) -> Step:
    """Opens the step that ModelSpec.step names ("module:Class") on `release`."""
    module, _, name = model.step.partition(":")
    step: Step = getattr(importlib.import_module(module), name)(model, release)
    return step


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
    """Runs all of recommend as one step: all its models in one process, on the same arrays."""

    def __init__(self, model: ModelSpec, release: ServedRelease) -> None:
        self.pipeline = LocalPipeline(release)
        self.metrics = self.pipeline.step_metrics  # the release's own are published beside them
        sizes = {size for one in self.pipeline.steps.values() for size in getattr(one, "warm_sizes", (1,))}
        self.warm_sizes = tuple(sorted(sizes))

    def run(self, options: Options, **tensors: Array) -> Tensors:
        """Turns the pipeline's inputs by name into the answer's tensors."""
        return self.pipeline.run(options, tensors)


def rows_of(array: Array, spec: TensorSpec, start: int, end: int, options: Options) -> Array:
    """Gives the rows of one request of a batch, cut along K to the most that it asked for."""
    part = array[start:end]
    if len(spec.axes) > 1 and spec.axes[1].letter == RETURNED:
        part = part[:, : int(options.top_k.max(initial=1))]
    return np.ascontiguousarray(part)


class LocalPipeline:
    """Answers recommend in this process."""

    def __init__(self, release: ServedRelease) -> None:
        self.release, self.spec = release, release.pipeline
        self.steps = {model.name: open_step(model, release) for model in self.spec.models}

    def metrics(self) -> list[Metric]:
        """Lists the tiers' numbers, and those of the steps."""
        return [*self.release.metrics(), *self.step_metrics()]

    def step_metrics(self) -> list[Metric]:
        """Lists the numbers of every step that has any, each with its step's name."""
        return [
            one._replace(labels=(*one.labels, ("step", name)))
            for name, step in self.steps.items()
            if hasattr(step, "metrics")
            for one in step.metrics()
        ]

    def recommend(
        self,
        user_ids: Sequence[bytes | str],
        parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> Tensors:
        """Answers B users: ids -> the answer's tensors [B, …].

        `parameters` are a request's: one mapping for all users, or one each.
        """
        if parameters is None or isinstance(parameters, Mapping):
            options = parse_options(json.dumps(dict(parameters or {})), len(user_ids), self.release.schema)
        else:
            options = stack(
                [parse_options(json.dumps(dict(one)), 1, self.release.schema) for one in parameters]
            )
        ids = np.array([encode_id("user_id", user, may_be_empty=True) for user in user_ids], dtype="S")
        return self.run(options, {"user_id": ids[:, None]})

    def run(self, options: Options, tensors: Tensors) -> Tensors:
        """Runs all steps whose outputs are not yet among `tensors`; gives the answer's tensors."""
        known = dict(tensors)
        for model in self.spec.models:
            if all(t.name in known for t in model.outputs):
                continue
            known.update(self.steps[model.name].run(options, **{t.name: known[t.name] for t in model.inputs}))
        return {t.name: known[t.name] for t in self.spec.outputs}


def prepared(user_ids: Array, parameters: Mapping[str, Any], schema: Schema) -> tuple[Array, Options]:
    """Checks ids [b, 1] object and their parameters -> ids [b, 1] S and options; InvalidArgument."""
    ids = encode_ids("user_id", user_ids.ravel().tolist()).reshape(user_ids.shape)
    text = json.dumps(dict(parameters)) if parameters else ""
    return ids, with_deadline(parse_options(text, len(ids), schema), deadline_of(text))


class BatchedPipeline:
    """Answers the parts of several requests at once with a release's pipeline (ensemble/steps/router.py)."""

    def __init__(self, release: ServedRelease) -> None:
        model = release.pipeline.fused
        step = FusedStep(model, release)
        warm(model, step)
        self.release, self.pipeline = release, step.pipeline

    def metrics(self) -> list[Metric]:
        """Lists the numbers of tiers and steps, each with the release's name."""
        label = ("release", self.release.name)
        return [one._replace(labels=(*one.labels, label)) for one in self.pipeline.metrics()]

    def prepare(self, user_ids: Array, parameters: Mapping[str, Any]) -> tuple[Array, Options]:
        """Checks ids [b, 1] object and their parameters -> ids [b, 1] S and options; InvalidArgument."""
        return prepared(user_ids, parameters, self.release.schema)

    def run(self, prepared: Sequence[tuple[Array, Options]]) -> list[Tensors]:
        """Answers what was prepared as one batch: the tensors of each, [b, K, …]."""
        options = [one for _, one in prepared]
        answer = self.pipeline.run(
            stack(options), {"user_id": np.concatenate([user_ids for user_ids, _ in prepared])}
        )
        ends = np.cumsum([len(one) for one in options]).tolist()
        return [
            {t.name: rows_of(answer[t.name], t, start, end, one) for t in self.pipeline.spec.outputs}
            for start, end, one in zip([0, *ends[:-1]], ends, options, strict=True)
        ]
