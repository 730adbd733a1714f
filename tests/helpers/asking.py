"""Asking through raw tritonclient, as a stranger would: one BYTES tensor and request parameters. Never a
deadline: it kills Triton 2.51."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ensemble.arrays import Tensors
from ensemble.options import DEFAULT_TOP_K, NOTHING_ASKED

Request = tuple[list[bytes], dict[str, Any]]  # users, and the request's parameters as Triton takes them
OUTPUTS = ("item_ids", "scores", "probabilities", "degraded", "release", "sequence")
IN_FLIGHT = 16


def parameters_of(per_user: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Options of each user of one request -> its parameters: a value that all share as it is, else a JSON
    array with one each."""
    names = {name for one in per_user for name in one}
    parameters = {}
    for name in names:
        values = [one.get(name, NEUTRAL[name]) for one in per_user]
        shared = all(value == values[0] for value in values)
        value = values[0] if shared else values
        parameters[name] = value if shared and isinstance(value, (bool, int, float)) else json.dumps(value)
    return parameters


NEUTRAL: dict[str, Any] = {"top_k": DEFAULT_TOP_K, **NOTHING_ASKED}


class TritonAsker:
    """The server at `url`, over gRPC."""

    def __init__(self, url: str) -> None:
        from tritonclient.grpc import InferenceServerClient

        self.client = InferenceServerClient(url)

    def ask(self, user_ids: Sequence[bytes], parameters: Mapping[str, Any]) -> Tensors:
        from tritonclient.grpc import InferInput

        tensor = InferInput("user_id", [len(user_ids), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(user_ids, object)[:, None])
        result = self.client.infer("recommend", [tensor], parameters=dict(parameters) or None)
        return {name: result.as_numpy(name) for name in OUTPUTS}

    def ask_all(self, requests: Sequence[Request]) -> list[Tensors]:
        """All of them, IN_FLIGHT at once, so that Triton joins them into batches of its own."""
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            return list(pool.map(lambda request: self.ask(*request), requests))

    def close(self) -> None:
        self.client.close()
