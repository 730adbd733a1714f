"""What runs plans where there is no GPU, for both flavours: the ONNX model in the plan, on ONNX Runtime.

Parsing and building are NVIDIA's own (the wheels of TensorRT for RTX): what its parser or builder refuses is
refused here. A plan is its profile and the model; the builder's bytes are left out, since nothing here can
run them, and what has been built once is not built again (PRETEND_PLANS). The runtime checks what TensorRT
checks (names, shapes inside the profile, an address for every tensor) and reads and writes the very
addresses it is given.
"""

import ctypes
import hashlib
import importlib
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np

_HERE = Path(__file__).resolve().parent
_MAGIC = b"pretend plan"
_TYPES = {"float32": "FLOAT", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}


def _real():
    """Imports NVIDIA's module, whose name stands for the pretended one here."""
    name = "tensorrt_rtx_bindings"
    pretended, path = sys.modules.pop(name, None), sys.path[:]
    sys.path[:] = [entry for entry in path if Path(entry or ".").resolve() != _HERE]
    try:
        module = importlib.import_module(name)
    finally:
        sys.path[:] = path
    if pretended is not None:
        sys.modules[name] = pretended
    else:
        del sys.modules[name]
    return module


real = _real()


class Network:
    """The real network, and the model it was parsed from."""

    def __init__(self, network):
        self.network, self.onnx = network, b""


class OnnxParser:
    """The real parser."""

    def __init__(self, network, logger):
        self.network = network
        self.parser = real.OnnxParser(network.network, logger)

    def parse(self, data):
        self.network.onnx = bytes(data)
        return self.parser.parse(data)

    def __getattr__(self, name):
        return getattr(self.parser, name)


class Builder:
    """The real builder."""

    flags = 1 << int(real.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # that create_network must be given

    def __init__(self, logger):
        if os.environ.get("PRETEND_CUDA_FAILS"):
            logger.log(real.ILogger.WARNING, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.logger, self.builder, self.profiles = logger, real.Builder(logger), []

    def create_network(self, flags):
        if flags != self.flags:
            raise ValueError(flags)
        return Network(
            self.builder.create_network(1 << int(real.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        )

    def create_builder_config(self):
        return self.builder.create_builder_config()

    def create_optimization_profile(self):
        self.profiles.append(self.builder.create_optimization_profile())
        return self.profiles[-1]

    def build_serialized_network(self, network, config):
        return self.built(network, config, {})

    def built(self, network, config, more):
        """The plan: what the real builder made a plan of, and what is to be known of it."""
        (profile,) = self.profiles
        inputs = [network.network.get_input(place) for place in range(network.network.num_inputs)]
        shapes = {one.name: [list(map(int, s)) for s in profile.get_shape(one.name)] for one in inputs}
        targets = [int(config.get_compute_capability(at)) for at in range(config.num_compute_capabilities)]
        head = json.dumps({"shapes": shapes, "targets": targets, **more}).encode()
        facts = hashlib.sha256(real.__version__.encode() + head + network.onnx).hexdigest()
        known = Path(os.environ["PRETEND_PLANS"]) / facts
        if not known.exists():
            if self.builder.build_serialized_network(network.network, config) is None:
                return None
            known.touch()
        return memoryview(_MAGIC + struct.pack("<I", len(head)) + head + network.onnx)


class RuntimeConfig:
    """How a plan for RTX cards is run; its kernels are counted, not compiled."""

    cuda_graph_strategy = None

    def create_runtime_cache(self):
        return RuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache


class RuntimeCache:
    data = b"0"

    def deserialize(self, data):
        self.data = bytes(data)
        return True

    def serialize(self):
        return memoryview(str(int(self.data) + 1).encode())


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, data):
        if not data.startswith(_MAGIC):
            self.logger.log(real.ILogger.ERROR, "magic tag does not match\nmore")
            return None
        return Engine(data)


class Engine:
    def __init__(self, data):
        import onnxruntime

        (length,) = struct.unpack_from("<I", data, len(_MAGIC))
        start = len(_MAGIC) + 4
        head = json.loads(data[start : start + length])
        self.shapes = head["shapes"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = onnxruntime.InferenceSession(
            data[start + length :], options, providers=["CPUExecutionProvider"]
        )
        kinds = {
            "tensor(float)": "float32",
            "tensor(int32)": "int32",
            "tensor(int64)": "int64",
            "tensor(bool)": "bool",
        }
        self.taken = {node.name: kinds[node.type] for node in self.session.get_inputs()}
        self.given = {node.name: kinds[node.type] for node in self.session.get_outputs()}
        self.num_io_tensors = len(self.taken) + len(self.given)

    def get_tensor_name(self, index):
        return [*self.taken, *self.given][index]

    def get_tensor_mode(self, name):
        return real.TensorIOMode.INPUT if name in self.taken else real.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return real.DataType.__members__[_TYPES[{**self.taken, **self.given}[name]]]

    def get_tensor_profile_shape(self, name, profile_index):
        return [tuple(shape) for shape in self.shapes[name]]

    def create_runtime_config(self):
        return RuntimeConfig()

    def create_execution_context(self, config=None):
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses = engine, {}, {}

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.shapes[name]
        assert len(shape) == len(least)
        assert all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)), (
            name,
            shape,
        )
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        feeds = {n: np.zeros(self.shapes[n], kind) for n, kind in self.engine.taken.items()}
        return self.engine.session.run([name], feeds)[0].shape

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        feeds = {
            name: self._at(name, self.shapes[name], kind).copy() for name, kind in self.engine.taken.items()
        }
        for name, array in zip(
            self.engine.given, self.engine.session.run(list(self.engine.given), feeds), strict=True
        ):
            self._at(name, array.shape, array.dtype)[...] = array
        return stream_handle == 2

    def _at(self, name, shape, kind):
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), kind).reshape(shape)
