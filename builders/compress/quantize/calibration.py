"""Finds the ranges of every float tensor of a model on real users' feeds: the ends of 8 and of 16 bits.

8-bit ends are chosen by the smallest mean square error of what is rounded and clipped (Banner et al. NeurIPS
2019, by search instead of a fitted density), over a fixed sample of each tensor. Axes: S sampled values of a
tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto

from builders.compress import graph
from ensemble.arrays import Array
from ensemble.engines.onnx import open_session
from ensemble.errors import InvalidInput

MIN_USERS = 128
_CHECKED = 16  # users on whom a typed model must stay finite
_BATCH = 4  # users run at once: all tensors of the graph are kept for them
_SAMPLE = 65_536  # values kept of each tensor
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)  # of the full range, tried as the clipped one


@dataclass(frozen=True)
class Range:
    """Holds what one tensor was seen to hold.

    `low` and `high` are clipped for 8 bits; `amplitude` is the largest |x| seen, never clipped.
    """

    low: float
    high: float
    clip: float  # symmetric end for 8 bits: |x| beyond it is cut
    amplitude: float
    shape: tuple[int, ...]  # without the first axis, as last seen


Ranges = Mapping[str, Range]


def calibrate(model: bytes, feeds: Mapping[str, Array], *, min_users: int = MIN_USERS) -> dict[str, Range]:
    """Runs all users of `feeds` ({input: [users, ...]}) through an fp32 model once -> the range of each float
    tensor by name.

    InvalidInput with both numbers when there are fewer than `min_users` users, and when a tensor is not
    finite.
    """
    proto = graph.load(model)
    users = check_feeds(proto, feeds, min_users)
    # A constant feed and a constant's product are no activations: only what nodes make and float inputs are
    # observed.
    session, names = observed(proto)
    states: dict[str, _State] = {}
    for start in range(0, users, _BATCH):
        piece = {i.name: feeds[i.name][start : start + _BATCH] for i in session.get_inputs()}
        found = dict(zip(names, session.run(names, piece), strict=True)) | {
            n: a for n, a in piece.items() if a.dtype == np.float32
        }
        for name, values in found.items():
            states.setdefault(name, _State(users)).see(values, len(next(iter(piece.values()))))
    bad = next((name for name, state in states.items() if not np.isfinite(state.low + state.high)), None)
    if bad:
        raise InvalidInput(
            f"{bad} is not finite on the calibration users, in fp32: the model itself is broken; train it "
            "again"
        )
    return {name: state.range() for name, state in states.items() if state.size}


def check_finite(model: bytes, feeds: Mapping[str, Array]) -> None:
    """Runs a typed model on some of the calibration users; InvalidInput names the first node whose result is
    not finite."""
    proto = graph.load(model)
    session, names = observed(proto, fp16=True)
    found = session.run(names, {i.name: feeds[i.name][:_CHECKED] for i in session.get_inputs()})
    makers = graph.index(proto).makers
    for name, values in zip(names, found, strict=True):
        if not np.isfinite(values).all():
            raise InvalidInput(
                f"{makers[name].name} ({makers[name].op_type}) is not finite at {values.dtype}: pin it, or "
                "the block before it, to fp32"
            )


def check_feeds(proto: onnx.ModelProto, feeds: Mapping[str, Array], min_users: int) -> int:
    """Counts the users in the feeds; InvalidInput names an input that is missing, or how many are wanted."""
    missing = [i.name for i in proto.graph.input if i.name not in feeds]
    if missing:
        raise InvalidInput(f"calibration has no feed for {', '.join(missing)}; it has {', '.join(feeds)}")
    users = min(len(feeds[i.name]) for i in proto.graph.input)
    if users < min_users:
        raise InvalidInput(
            f"calibration needs {min_users} users, {users} are given: ranges of fewer do not hold; take "
            "more held-out users"
        )
    return users


def observed(proto: onnx.ModelProto, fp16: bool = False) -> tuple[ort.InferenceSession, list[str]]:
    """Opens the model so that it also gives every float tensor its nodes make; and names those."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    known = graph.index(copy)
    inferred = onnx.shape_inference.infer_shapes(copy)
    wanted = (TensorProto.FLOAT, TensorProto.FLOAT16) if fp16 else (TensorProto.FLOAT,)
    kinds = {
        v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *inferred.graph.output)
    }
    names = [name for name in known.makers if kinds.get(name) in wanted]
    copy.graph.output.extend(
        onnx.helper.make_tensor_value_info(n, kinds[n], None) for n in names if n not in known.outputs
    )
    return open_session(graph.save(copy), fuse=False), names


class _State:
    """Holds the running range and a fixed sample of one tensor."""

    def __init__(self, users: int) -> None:
        self.users, self.size = users, 0
        self.shape: tuple[int, ...] = ()
        self.low, self.high = np.inf, -np.inf
        self.rng = np.random.default_rng(0)
        self.sample: list[Array] = []

    def see(self, values: Array, users: int) -> None:
        """Takes in one batch of values, any axes."""
        if not values.size:
            return
        self.low, self.high = float(min(self.low, values.min())), float(max(self.high, values.max()))
        self.shape, self.size = values.shape[1:], self.size + values.size
        flat, wanted = values.ravel(), max(1, _SAMPLE * users // self.users)
        self.sample.append(flat if flat.size <= wanted else flat[self.rng.integers(0, flat.size, wanted)])

    def range(self) -> Range:
        """Gives the tensor's Range."""
        sample = np.concatenate(self.sample).astype(np.float64)
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        best = min(_SHARES, key=lambda share: _error(sample, low * share, high * share, 255))
        amplitude = max(-self.low, self.high)
        clip = amplitude * min(
            _SHARES, key=lambda share: _error(sample, -amplitude * share, amplitude * share, 254)
        )
        return Range(low * best, high * best, clip, amplitude, self.shape)


def _error(sample: Array, low: float, high: float, steps: int) -> float:
    """Gives the mean square error of `sample` [S] on a grid of `steps` steps from low to high."""
    scale = (high - low) / steps or 1.0
    return float(np.mean((np.clip(np.rint(sample / scale) * scale, low, high) - sample) ** 2))
