"""``read_tensor``: one tensor out of a .penjing file, without unpacking the rest."""

from __future__ import annotations

import difflib
import math
from pathlib import Path

import numpy as np

from penjing.container import format
from penjing.container.damage import DamageError
from penjing.container.packing import damaged, read
from penjing.container.planes import ElementType, element_type
from penjing.container.wire import Span
from penjing.errors import PenjingError

_MOST_DIMS = 64
"""Dimensions of a NumPy array at most."""


def read_tensor(
    source: Path | str,
    name: str,
    out: np.ndarray | None = None,
    *,
    most: int = format.LARGEST,
) -> np.ndarray:
    """The tensor ``name`` of the .penjing file ``source``, as the unpacked ONNX file has it.

    Of a file with Huffman coding only this tensor is decoded. Of one with arithmetic coding, those
    before it of the same element type are too, one after the other, because each starts from the
    statistics of the ones before. Memory is taken for ``source``, its graph, and a few times the
    largest tensor decoded; ``most`` is the bytes that the ONNX file may have.

    Args:
        out: where to put the values: an array of the tensor's shape and dtype. Its dtype is the
            NumPy one of the ONNX type; ``int4`` and ``int2`` are int8, ``uint4`` and ``uint2``
            uint8; the floats that NumPy lacks come as their bits, bfloat16 in uint16, those of 8
            and 4 bits in uint8, one element each.

    Returns:
        ``out``, or a new array.

    Raises:
        PenjingError: ``source`` cannot be read, has no such tensor or several, or is damaged in
            what was read; ``out`` does not fit. ``out`` is then not touched.
    """
    data = read(source)

    def choose(spans: list[Span]) -> Span:
        return _choose(spans, name, source)

    try:
        span, raw = format.decode_span(data, choose, most)
        values = _values(raw, span)
    except (DamageError, MemoryError) as problem:
        raise damaged(source, "read", problem) from problem
    if out is None:
        return values.copy()
    _check(out, values, name)
    out[...] = values
    return out


def _choose(spans: list[Span], name: str, source: Path | str) -> Span:
    found = [span for span in spans if span.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise PenjingError(
            f"{source} has {len(found)} tensors named {name!r}, in different graphs; "
            "unpack it and read them with the onnx package"
        )
    names = list(dict.fromkeys(span.name for span in spans))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    known = ", ".join(map(repr, near)) or "none"
    raise PenjingError(
        f"{source} has no coded tensor named {name!r}; near names are {known}; "
        "`penjing inspect` lists all"
    )


def _values(raw: memoryview, span: Span) -> np.ndarray:
    """``raw`` as an array; a view of it where elements are whole bytes."""
    kind = element_type(span.data_type)
    number = math.prod(span.dims) if len(span.dims) <= _MOST_DIMS else -1
    if -(-number * kind.bits * _parts(kind) // 8) != span.size:
        raise DamageError(f"its tensor {span.name!r} has another number of bytes than its shape")
    if kind.bits >= 8:
        return np.frombuffer(raw, _dtype(kind)).reshape(span.dims)
    shifts = np.arange(0, 8, kind.bits, dtype=np.uint8)
    codes = (np.frombuffer(raw, np.uint8)[:, None] >> shifts).ravel()[:number]
    up = np.uint8(8 - kind.bits)
    # Shifted up and down again: for signed types that copies the sign into the upper bits.
    values = (codes << up).view(_dtype(kind)) >> up.astype(_dtype(kind))
    return values.reshape(span.dims)


def _parts(kind: ElementType) -> int:
    return 2 if kind.name.startswith("complex") else 1


def _dtype(kind: ElementType) -> np.dtype:
    """The dtype of an array of elements of ``kind``, little-endian as they are in the file."""
    if kind.bits < 8:
        return np.dtype(np.int8 if kind.signed else np.uint8)
    if kind.name == "bfloat16":
        return np.dtype("<u2")
    if kind.name.startswith("float8") or kind.name == "bytes":
        return np.dtype(np.uint8)
    return np.dtype(kind.name).newbyteorder("<")


def _check(out: np.ndarray, values: np.ndarray, name: str) -> None:
    if not isinstance(out, np.ndarray) or not out.flags.writeable:
        raise PenjingError(f"out for the tensor {name!r} must be a NumPy array that can be written")
    if (out.dtype, out.shape) != (values.dtype, values.shape):
        raise PenjingError(
            f"out for the tensor {name!r} must be {values.dtype} {list(values.shape)}, "
            f"not {out.dtype} {list(out.shape)}; make it with "
            f"numpy.empty({values.shape}, {str(values.dtype)!r})"
        )
