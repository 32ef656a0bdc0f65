"""Messages between penjing and the process that runs the runtime: JSON and arrays of bytes.

A message is the length of its header (8 bytes, little-endian), the header in JSON, and the bytes of
its arrays, whose types and shapes the header has under ``arrays``. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from penjing.errors import PenjingError


def send(stream: IO[bytes], header: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """Write a message of ``header`` and ``arrays`` to ``stream``.

    Raises:
        PenjingError: an array holds Python objects, such as strings.
        OSError: the other end of the stream is closed.
    """
    for array in arrays:
        if array.dtype.hasobject:
            raise PenjingError(f"a tensor of {array.dtype} cannot be sent; expected numbers.")
    described = [[array.dtype.str, list(array.shape)] for array in arrays]
    data = json.dumps({**header, "arrays": described}).encode()
    stream.write(len(data).to_bytes(8, "little") + data)
    for array in arrays:
        stream.write(_bytes_of(np.ascontiguousarray(array)))
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Read the next message of ``stream``: header and arrays.

    Raises:
        EOFError: the stream ends before the message, or within it.
    """
    header = json.loads(_read(stream, int.from_bytes(_read(stream, 8), "little")))
    arrays = [np.empty(shape, np.dtype(kind)) for kind, shape in header.pop("arrays")]
    for array in arrays:
        _fill(stream, _bytes_of(array))
    return header, arrays


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _read(stream: IO[bytes], size: int) -> bytes:
    data = bytearray(size)
    _fill(stream, memoryview(data))
    return bytes(data)


def _fill(stream: IO[bytes], target: memoryview) -> None:
    at = 0
    while at < len(target):
        count = stream.readinto(target[at:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the stream ended within a message")
        at += count
