"""A small gRPC server that answers as Triton does."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from clients.wire import encode_bytes


class FakeTriton:
    """KServe's gRPC service with one model; keeps what it was sent, and whether a call came with a deadline
    or was cancelled."""

    def __init__(self, version: str = "2.51.0", workers: int = 40) -> None:
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        outer = self
        self.version, self.delay_s, self.failures, self.requests = version, 0.0, [], []
        self.deadlines: list[float] = []
        self.cancelled, self.is_empty = 0, False
        self.has_tensors = self.has_contents = True  # of an OK answer

        class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
            def ServerMetadata(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
                return service_pb2.ServerMetadataResponse(version=outer.version)

            def ModelInfer(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
                return outer._infer(request, context)

        self._grpc, self._pb = grpc, service_pb2
        self._server = grpc.server(ThreadPoolExecutor(workers))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), self._server)
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _infer(self, request, context):  # type: ignore[no-untyped-def]
        self.requests.append(request)
        if context.time_remaining() is not None and context.time_remaining() < 1e6:
            self.deadlines.append(context.time_remaining())
        context.add_callback(lambda: None)
        time.sleep(self.delay_s)
        self.cancelled += not context.is_active()
        if self.failures:
            status, text = self.failures.pop(0)
            context.abort(getattr(self._grpc.StatusCode, status), text)
        users, depth = request.inputs[0].shape[0], 3
        response = self._pb.ModelInferResponse(model_name="recommend")
        ids = [b"" if self.is_empty else b"i1", b"item-2", b""] * users
        for name, kind, shape, raw in (
            ("item_ids", "BYTES", (users, depth), encode_bytes(ids)),
            ("scores", "FP32", (users, depth), np.array([3, 2, 0] * users, np.float32).tobytes()),
            (
                "probabilities",
                "FP32",
                (users, depth, 2),
                np.full(users * depth * 2, 0.5, np.float32).tobytes(),
            ),
            ("tasks", "BYTES", (users, 1), encode_bytes([b'["click","buy"]'] * users)),
            ("degraded", "INT64", (users, 1), np.arange(users, dtype=np.int64).tobytes()),
            ("release", "BYTES", (users, 1), encode_bytes([b"r1"] * users)),
            ("sequence", "INT64", (users, 1), np.full(users, 7, np.int64).tobytes()),
        ):
            if self.has_tensors:
                response.outputs.add(name=name, datatype=kind, shape=shape)
            if self.has_tensors and self.has_contents:
                response.raw_output_contents.append(raw)
        return response

    def stop(self) -> None:
        self._server.stop(None)
