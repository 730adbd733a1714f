"""Runs the whole pipeline in one process: the local twin, the same steps under the same names, no server."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ensemble.arrays import Array, Tensors
from ensemble.id_rule import encode_id
from ensemble.options import Options, parse_options, stack
from ensemble.spec import ModelSpec
from ensemble.steps.served import ServedRelease
from ensemble.telemetry import Metric


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


class FusedStep:
    """Runs all of recommend as one step: all its models in one process, on the same arrays."""

    def __init__(self, model: ModelSpec, release: ServedRelease) -> None:
        self.pipeline = LocalPipeline(release)
        self.metrics = self.pipeline.step_metrics  # the release's own are published beside them

    def run(self, options: Options, **tensors: Array) -> Tensors:
        """Turns the pipeline's inputs by name into the answer's tensors."""
        return self.pipeline.run(options, tensors)


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
