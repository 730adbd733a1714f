"""Names the two flavours of TensorRT, and says what each can run: on which GPUs, in which precisions.

Both have one API for what we use. TensorRT builds plans on the GPU that will run them, and Triton's own
backend opens them; TensorRT for RTX is a wheel that builds plans on any machine and opens them on RTX cards,
in a Python process. A plan of one is nothing to the other.
"""

from __future__ import annotations

from typing import NamedTuple

TENSORRT, RTX = "tensorrt", "rtx"
FLAVORS = (TENSORRT, RTX)
TITLES = {TENSORRT: "TensorRT", RTX: "TensorRT for RTX"}
MODULES = {TENSORRT: "tensorrt", RTX: "tensorrt_rtx_bindings"}
# Compute capabilities of TensorRT for RTX 1.7: its support matrix, and what it says itself on an H200 (9.0),
# where it builds plans and then does not open them. Later ones than the last are taken, too.
RTX_SM = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_FP8_FROM = (8, 9)
_PORTABLE_FROM = (8, 0)  # TensorRT's AMPERE_PLUS; the RTX builder's default targets leave 7.5 out, too


class Version(NamedTuple):
    """Holds a version of a flavour: 1.7 of TensorRT for RTX is no older than 8.5 of TensorRT."""

    flavor: str
    major: int
    minor: int

    @property
    def is_old(self) -> bool:
        """Says whether this is TensorRT 8: weakly typed, with names that 11 no longer has."""
        return self.flavor == TENSORRT and self.major == 8

    @property
    def is_supported(self) -> bool:
        """Says whether we know its API: TensorRT 8.5 and 8.6, 10.12 and later, and TensorRT for RTX."""
        return self.flavor == RTX or (8, 5) <= self[1:] <= (8, 6) or self[1:] >= (10, 12)


def version_from_text(flavor: str, text: str) -> Version:
    """Reads "11.4.0.106"."""
    major, minor = (int(part) for part in text.split(".")[:2])
    return Version(flavor, major, minor)


def numbers(version: str) -> tuple[int, ...]:
    """Gives a version or compute capability such as "10.16.1" as numbers, which can be compared."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def sm_refusal(flavor: str, sm: str) -> str:
    """Says why this flavour opens no plans on a GPU of compute capability `sm`; empty where it does."""
    if flavor != RTX or sm in RTX_SM or numbers(sm) > numbers(RTX_SM[-1]):
        return ""
    return f"TensorRT for RTX opens no plan on SM {sm}: it knows {', '.join(RTX_SM)} and later"


def portable_refusal(sm: str) -> str:
    """Says why a portable plan does not run on `sm`; empty where it does."""
    if numbers(sm) >= _PORTABLE_FROM:
        return ""
    return f"the portable plan is for SM 8.0 and later, this node has SM {sm}"


def precision_refusal(precision: str, sm: str, flavor: str) -> str:
    """Says which of the types in `precision` ("fp16+fp8") a GPU of `sm` lacks; empty where it has all."""
    types = precision.split("+")
    if "fp8" in types and numbers(sm) < _FP8_FROM:
        return f"it computes in fp8, which SM {sm} does not have (8.9 and later do)"
    if flavor == RTX and "int8" in types and numbers(sm) < _PORTABLE_FROM:
        return (
            f"it computes in int8, which TensorRT for RTX does not have on SM {sm} (on 8.0 and later it has)"
        )
    return ""
