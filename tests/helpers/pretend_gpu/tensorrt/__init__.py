"""TensorRT on a machine without it: NVIDIA's parser and builder for RTX, under TensorRT's names and versions.

Flags that only TensorRT has are taken and written into the plan. That each name is real is
tests/builders/compile/test_tensorrt_names.py's to prove.
"""

import enum
import os

from pretended_runtime import Builder as _Builder
from pretended_runtime import OnnxParser, Runtime, real

__version__ = os.environ.get("PRETEND_TENSORRT", "11.4.0.106")
__all__ = ["OnnxParser", "Runtime"]
_OLD = __version__.startswith("8.")
ILogger, TensorIOMode, DataType = real.ILogger, real.TensorIOMode, real.DataType


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


class Builder(_Builder):
    flags = 1 << (
        NetworkDefinitionCreationFlag.EXPLICIT_BATCH if _OLD else NetworkDefinitionCreationFlag.STRONGLY_TYPED
    )

    def create_builder_config(self):
        return Config(super().create_builder_config())

    def build_serialized_network(self, network, config):
        config.cache.entries.add(f"build-{os.getpid()}-{len(config.cache.entries)}")
        more = {"flags": [int(f) for f in config.flags], "level": int(config.hardware_compatibility_level)}
        return self.built(network, config.config, more)


class Config:
    def __init__(self, config):
        self.config, self.flags, self.cache = config, [], None
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE

    def add_optimization_profile(self, profile):
        return self.config.add_optimization_profile(profile)

    def set_flag(self, flag):
        self.flags.append(flag)

    def set_tactic_sources(self, sources):
        assert _OLD, "TensorRT 11 has no such tactic sources"

    def create_timing_cache(self, serialized):
        words = set(bytes(serialized).decode().split())
        return None if "damaged" in words else TimingCache(words)

    def set_timing_cache(self, cache, ignore_mismatch):
        if "another-gpu" in cache.entries and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class TimingCache:
    def __init__(self, entries):
        self.entries = entries

    def combine(self, other, ignore_mismatch):
        if "another-gpu" in other.entries and not ignore_mismatch:
            return False
        self.entries |= other.entries
        return True

    def serialize(self):
        return memoryview(" ".join(sorted(self.entries)).encode())
