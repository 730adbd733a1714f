"""The part of TensorRT's Python API that Peregrine uses, over ONNX Runtime: a plan is the ONNX model and its
profile.

It checks what TensorRT checks (names, shapes inside the profile, an address for every tensor) and reads and
writes the very addresses it is given. That each name is real is
tests/builders/compile/test_tensorrt_names.py's to prove.
"""

import ctypes
import enum
import json
import os
import struct

import numpy as np

__version__ = os.environ.get("PRETEND_TENSORRT", "11.4.0.106")
_OLD = __version__.startswith("8.")
_MAGIC = b"pretend plan"


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(enum.IntEnum):
    FP16 = 0
    INT8 = 1
    SPARSE_WEIGHTS = 2
    VERSION_COMPATIBLE = 3


class HardwareCompatibilityLevel(enum.IntEnum):
    NONE = 0
    AMPERE_PLUS = 1


class TensorIOMode(enum.IntEnum):
    INPUT = 1
    OUTPUT = 2


class DataType(enum.Enum):
    FLOAT = "float32"
    INT64 = "int64"
    INT32 = "int32"
    BOOL = "bool"


class Builder:
    def __init__(self, logger):
        if os.environ.get("PRETEND_CUDA_FAILS"):
            logger.log(ILogger.WARNING, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.logger = logger

    def create_network(self, flags):
        if flags != 1 << (
            NetworkDefinitionCreationFlag.EXPLICIT_BATCH
            if _OLD
            else NetworkDefinitionCreationFlag.STRONGLY_TYPED
        ):
            raise ValueError(flags)
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        (profile,) = config.profiles
        import onnx

        taken = [value.name for value in onnx.load_from_string(network.onnx).graph.input]
        if sorted(profile.shapes) != sorted(taken):
            self.logger.log(
                ILogger.ERROR, f"profile has {sorted(profile.shapes)}, network takes {sorted(taken)}"
            )
            return None
        config.cache.entries += 1
        head = json.dumps(
            {
                "shapes": profile.shapes,
                "flags": [int(f) for f in config.flags],
                "level": int(config.hardware_compatibility_level),
            }
        ).encode()
        return memoryview(_MAGIC + struct.pack("<I", len(head)) + head + network.onnx)


class Network:
    onnx = b""


class Config:
    def __init__(self):
        self.profiles, self.flags, self.cache, self.hardware_compatibility_level = (
            [],
            [],
            None,
            HardwareCompatibilityLevel.NONE,
        )

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_flag(self, flag):
        self.flags.append(flag)

    def set_tactic_sources(self, sources):
        assert _OLD, "TensorRT 11 has no such tactic sources"

    def create_timing_cache(self, serialized):
        return TimingCache(int(bytes(serialized) or b"0"))

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class TimingCache:
    def __init__(self, entries):
        self.entries = entries

    def serialize(self):
        return memoryview(str(self.entries).encode())


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, input, min, opt, max):
        self.shapes[input] = [list(min), list(opt), list(max)]


class ParserError:
    def node(self):
        return 0

    def desc(self):
        return "no importer"


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        self.network = network

    def parse(self, data):
        import onnxruntime

        self.network.onnx = bytes(data)
        try:
            onnxruntime.InferenceSession(bytes(data), providers=["CPUExecutionProvider"])
        except Exception:
            return False
        return True

    def get_error(self, index):
        return ParserError()


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, data):
        if not data.startswith(_MAGIC):
            self.logger.log(ILogger.ERROR, "magic tag does not match\nmore")
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
        return TensorIOMode.INPUT if name in self.taken else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType({**self.taken, **self.given}[name])

    def get_tensor_profile_shape(self, name, profile_index):
        return [tuple(shape) for shape in self.shapes[name]]

    def create_execution_context(self):
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
