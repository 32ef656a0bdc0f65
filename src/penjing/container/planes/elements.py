"""The element types of ONNX tensors, as far as their coding depends on them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ElementType:
    """An ONNX element type: its name and bits, and whether its integers have a sign."""

    name: str
    bits: int
    signed: bool = False


_UNKNOWN = ElementType("bytes", 8)
_TYPES = {
    1: ElementType("float32", 32),
    2: ElementType("uint8", 8),
    3: ElementType("int8", 8, signed=True),
    4: ElementType("uint16", 16),
    5: ElementType("int16", 16, signed=True),
    6: ElementType("int32", 32, signed=True),
    7: ElementType("int64", 64, signed=True),
    9: ElementType("bool", 8),
    10: ElementType("float16", 16),
    11: ElementType("float64", 64),
    12: ElementType("uint32", 32),
    13: ElementType("uint64", 64),
    14: ElementType("complex64", 32),
    15: ElementType("complex128", 64),
    16: ElementType("bfloat16", 16),
    17: ElementType("float8e4m3fn", 8),
    18: ElementType("float8e4m3fnuz", 8),
    19: ElementType("float8e5m2", 8),
    20: ElementType("float8e5m2fnuz", 8),
    21: ElementType("uint4", 4),
    22: ElementType("int4", 4, signed=True),
    23: ElementType("float4e2m1", 4),
    24: ElementType("float8e8m0", 8),
    25: ElementType("uint2", 2),
    26: ElementType("int2", 2, signed=True),
}
"""Element types by their ``TensorProto.DataType``; complex numbers count as pairs of their parts."""


def element_type(data_type: int) -> ElementType:
    """The element type of ONNX's number ``data_type``; plain bytes for an unknown one."""
    return _TYPES.get(data_type, _UNKNOWN)


def numbered(name: str) -> int:
    """Return ONNX's number of the element type ``name``, such as ``float32``."""
    return next(number for number, kind in _TYPES.items() if kind.name == name)
