"""Graphs without the lengths that follow from what they hold.

Protobuf says of every message first how long it is, so a graph says in many places how large its
weights are. In the *short* form the messages on the way to a tensor's data end with a zero, which
starts no field, instead of starting with their length, and a tensor's data have the length that its
type and dimensions give.
"""

from __future__ import annotations

import math

from penjing.container import wire
from penjing.container.damage import DamageError
from penjing.container.planes import element_type
from penjing.container.streams import Reader, number

_END = b"\0"


def shorten(skeleton: bytes, size: int) -> bytes | None:
    """The short form of the ``skeleton`` of an ONNX file of ``size`` bytes, or None if it has none."""
    try:
        short = _Translation(skeleton, shortens=True).message("model", size)
        same = lengthen(short) == (skeleton, size)
    except DamageError:
        return None
    return short if same else None


def lengthen(short: bytes) -> tuple[bytes, int]:
    """The skeleton of the form ``short``, and the bytes of its ONNX file.

    Raises:
        DamageError: there is none.
    """
    translation = _Translation(short + _END, shortens=False)
    skeleton = translation.message("model", None)
    if translation.reader.left:
        raise DamageError("its graph ends before its bytes do")
    return skeleton, len(skeleton) + translation.missing


class _Translation:
    """Translates a graph into its other form; ``missing`` are the bytes of the data passed so far."""

    def __init__(self, graph: bytes, *, shortens: bool) -> None:
        self.reader = Reader(graph)
        self.shortens = shortens
        self.missing = 0

    def message(self, kind: str, end: int | None, depth: int = 0) -> bytes:
        """The message up to ``end``, counted in the ONNX file; where that is None, up to a zero."""
        if depth > wire.DEEPEST:
            raise DamageError("its messages are nested too deeply for an ONNX model")
        out, data_type = bytearray(), 0
        dims: list[int] = []
        children = wire.CHILDREN.get(kind, {})
        while end is None or self._at < end:
            written, key = self._varint()
            if end is None and key == 0:
                return bytes(out)
            field, form = key >> 3, key & 7
            out += written
            if form == wire.BYTES and field in children:
                out += self._child(children[field], depth)
            elif form == wire.BYTES and kind == "tensor" and field in wire.DATA:
                out += self._data(dims, data_type)
            elif form == wire.VARINT:
                written, value = self._varint()
                out += written
                if field == wire.DIMS:
                    dims.append(value)
                elif field == wire.DATA_TYPE:
                    data_type = value
            else:
                out += self._same(form)
        if self._at != end:
            raise DamageError("a field of it reaches past the end of its message")
        return bytes(out)

    @property
    def _at(self) -> int:
        return self.reader.at + self.missing

    def _child(self, kind: str, depth: int) -> bytes:
        if self.shortens:
            _, size = self._varint()
            return self.message(kind, self._at + size, depth + 1) + _END
        before = self.missing
        body = self.message(kind, None, depth + 1)
        return number(len(body) + self.missing - before) + body

    def _data(self, dims: list[int], data_type: int) -> bytes:
        size = -(-math.prod(dims) * element_type(data_type).bits // 8)
        if size > wire.LARGEST or (self.shortens and size != self._varint()[1]):
            raise DamageError("a tensor of it has not the bytes that its dimensions say")
        self.missing += size
        return b"" if self.shortens else number(size)

    def _same(self, form: int) -> bytes:
        """A value that both forms write alike."""
        if form == wire.BYTES:
            written, size = self._varint()
            return written + self.reader.take(size)
        if form not in wire.FIXED:
            raise DamageError(f"its graph has a field of the unknown wire type {form}")
        return self.reader.take(wire.FIXED[form])

    def _varint(self) -> tuple[bytes, int]:
        """The bytes of a number as it is written, and its value."""
        start = self.reader.at
        value = self.reader.number(wire.LONGEST_VARINT)
        return bytes(self.reader.data[start : self.reader.at]), value
