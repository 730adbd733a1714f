"""Passes GPU tensors to other libraries and takes theirs, by DLPack, without a copy and without a framework.

It speaks version 0 of the protocol, which all speak. Layout of the structures: dlpack.h of DLPack 0.8
(https://dmlc.github.io/dlpack/latest/c_api.html).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint64,
    c_void_p,
    py_object,
)
from math import prod
from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import InvalidInput

CPU, CUDA = 1, 2  # kDLCPU, kDLCUDA
_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}  # DLDataTypeCode -> numpy's kind


class _Device(Structure):
    _fields_ = (("kind", c_int32), ("index", c_int32))


class _Dtype(Structure):
    _fields_ = (("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16))


class _Tensor(Structure):
    _fields_ = (
        ("data", c_void_p), ("device", _Device), ("ndim", c_int32), ("dtype", _Dtype),
        ("shape", POINTER(c_int64)), ("strides", POINTER(c_int64)), ("byte_offset", c_uint64),
    )  # fmt: skip


class _Managed(Structure):
    pass


_DELETER = CFUNCTYPE(None, POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", c_void_p), ("deleter", _DELETER))

_NAME = b"dltensor"
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = c_void_p, [py_object, c_char_p]
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = c_int, [c_void_p, c_char_p]
_address_in = ctypes.PYFUNCTYPE(c_void_p, c_void_p, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_DESTRUCTOR = ctypes.PYFUNCTYPE(None, c_void_p)
_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = py_object, [c_void_p, c_char_p, _DESTRUCTOR]

_exported: dict[int, tuple[Any, ...]] = {}  # address of what we gave away -> what must live as long


class DeviceTensor:
    """Holds a contiguous array in a device's memory, which `release` gives back.

    torch.from_dlpack and its like take it.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        release: Callable[[int], None],
        device: int = CUDA,
    ) -> None:
        self.address, self.shape, self.dtype = address, shape, dtype
        self._release, self._device = release, device

    def __del__(self) -> None:
        self._release(self.address)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device, 0

    def __dlpack__(self, stream: int | None = None) -> Any:
        """Gives a capsule; ours are complete when they are given out, so there is no stream to wait for."""
        shape = (c_int64 * len(self.shape))(*self.shape)
        code = next(code for code, kind in _KINDS.items() if kind == self.dtype.kind)
        tensor = _Tensor(
            self.address,
            _Device(self._device, 0),
            len(self.shape),
            _Dtype(code, self.dtype.itemsize * 8, 1),
            shape,
            None,
            0,
        )
        managed = _Managed(tensor, None, _delete)
        _exported[ctypes.addressof(managed)] = (managed, shape, self)
        return _new(ctypes.addressof(managed), _NAME, _drop_unused)


@_DELETER
def _delete(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


@_DESTRUCTOR
def _drop_unused(capsule: int) -> None:
    """Lets go of the array of a capsule that dies without having been taken (a taker renames it)."""
    if _is_valid(capsule, _NAME):
        _exported.pop(_address_in(capsule, _NAME), None)


class Borrowed:
    """Holds somebody's tensor as long as this object lives."""

    def __init__(self, tensor: Any, stream: int | None = None) -> None:
        self.device = int(tensor.__dlpack_device__()[0])
        self._capsule = (
            tensor.__dlpack__(stream=stream)
            if stream is not None and self.device == CUDA
            else tensor.__dlpack__()
        )
        self._tensor = ctypes.cast(_get_pointer(self._capsule, _NAME), POINTER(_Managed)).contents.tensor
        self._check_contiguous()

    @property
    def address(self) -> int:
        """Gives the address of the first element."""
        return int(self._tensor.data or 0) + int(self._tensor.byte_offset)

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the sizes of all axes."""
        return tuple(self._tensor.shape[i] for i in range(self._tensor.ndim))

    @property
    def dtype(self) -> np.dtype:
        """Gives numpy's dtype; InvalidInput where numpy has none."""
        given = self._tensor.dtype
        if given.lanes != 1 or given.code not in _KINDS:
            raise InvalidInput(
                f"a tensor of DLPack type {given.code} with {given.lanes} lanes",
                "known: bool, integers and floats of one lane",
            )
        return np.dtype(bool) if given.code == 6 else np.dtype(f"{_KINDS[given.code]}{given.bits // 8}")

    def array(self) -> Array:
        """Gives an array on the tensor's own memory, if that is the CPU's; it lives no longer than this
        object."""
        num_bytes = prod(self.shape) * self.dtype.itemsize
        return np.frombuffer(
            memoryview((ctypes.c_char * num_bytes).from_address(self.address)), self.dtype
        ).reshape(self.shape)

    def _check_contiguous(self) -> None:
        """Raises InvalidInput unless the elements lie side by side."""
        if not self._tensor.strides:
            return
        strides = [self._tensor.strides[i] for i in range(len(self.shape))]
        wanted = [prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        if any(
            size != 1 and given != want for size, given, want in zip(self.shape, strides, wanted, strict=True)
        ):
            raise InvalidInput(
                f"a DLPack tensor {list(self.shape)} with strides {strides}", "give it contiguous"
            )
