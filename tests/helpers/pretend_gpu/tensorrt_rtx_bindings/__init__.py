"""TensorRT for RTX on a machine without a GPU: NVIDIA's own, but for what runs plans."""

import os

from pretended_runtime import Builder, OnnxParser, Runtime, real

__version__ = os.environ.get("PRETEND_RTX", real.__version__)
ILogger, BuilderFlag, TensorIOMode, DataType = (
    real.ILogger,
    real.BuilderFlag,
    real.TensorIOMode,
    real.DataType,
)
NetworkDefinitionCreationFlag, ComputeCapability = real.NetworkDefinitionCreationFlag, real.ComputeCapability
CudaGraphStrategy, HardwareCompatibilityLevel = real.CudaGraphStrategy, real.HardwareCompatibilityLevel

__all__ = ["Builder", "OnnxParser", "Runtime"]
