"""The places of the weights in an ONNX file, read straight from protobuf's wire format.

An ONNX file is a protobuf ``ModelProto``. Only the few messages on the way to a tensor's data are
entered; every other field is stepped over. Field numbers are those of ``onnx/onnx.proto``, the
encoding is https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penjing.container.damage import DamageError

VARINT, BYTES = 0, 2
FIXED = {1: 8, 5: 4}
"""Wire types of numbers of so many bytes."""
LONGEST_VARINT = 10
LARGEST = 2**31 - 1
"""Bytes of an ONNX file at most: protobuf's own limit."""
_EXTERNAL = 1
_MOST_NUMBERS = 1 << 25
"""Numbers (field keys, lengths, dimensions) read at most, so that no file takes minutes."""
DEEPEST = 64
"""Nested messages entered at most: subgraphs in subgraphs count three levels each."""

CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}
DIMS, DATA_TYPE, _FLOAT_DATA, _NAME, _RAW_DATA, _LOCATION = 1, 2, 4, 8, 9, 14
DATA = (_FLOAT_DATA, _RAW_DATA)


@dataclass
class Span:
    """The data of one tensor: ``size`` bytes from byte ``start`` of the ONNX file."""

    start: int
    size: int
    name: str = ""
    data_type: int = 0
    dims: tuple[int, ...] = ()


def find(data: bytes | memoryview) -> list[Span]:
    """The data spans of all tensors of the ONNX file ``data``, in file order.

    Raises:
        DamageError: ``data`` is not an ONNX model, or keeps weights in another file.
    """
    return _Walk(memoryview(data), len(data), cut=False).run()


def find_cut(skeleton: bytes | memoryview, size: int) -> list[Span]:
    """The data spans of an ONNX file of ``size`` bytes, from its ``skeleton`` (see ``cut``)."""
    return _Walk(memoryview(skeleton), size, cut=True).run()


def cut(data: bytes | memoryview, spans: list[Span]) -> bytes:
    """``data`` without the bytes of ``spans``."""
    edges = [0, *(edge for span in spans for edge in (span.start, span.start + span.size))]
    return b"".join(
        data[start:stop] for start, stop in zip(edges[::2], [*edges[1::2], len(data)], strict=True)
    )


def fill(skeleton: bytes, spans: list[Span], data: dict[int, bytes]) -> bytes:
    """The whole file again: ``skeleton`` with the ``data`` of each span, by where it starts."""
    pieces, at, missing = [], 0, 0
    for span in spans:
        pieces += [skeleton[at : span.start - missing], data[span.start]]
        at = span.start - missing
        missing += span.size
    return b"".join([*pieces, skeleton[at:]])


class _Walk:
    """One walk over a file; positions are those in the whole file, cut or not."""

    def __init__(self, data: memoryview, size: int, *, cut: bool) -> None:
        self.data = data
        self.size = size
        self.cut = cut
        self.missing = 0
        self.numbers = 0
        self.at = 0
        self.spans: list[Span] = []

    def run(self) -> list[Span]:
        self.message("model", self.size, 0)
        if self.at - self.missing != len(self.data):
            raise DamageError("the graph is longer than its declared size")
        return self.spans

    def message(self, kind: str, end: int, depth: int) -> None:
        if depth > DEEPEST:
            raise DamageError("its messages are nested too deeply for an ONNX model")
        children = CHILDREN.get(kind, {})
        while self.at < end:
            field, wire = self.tag()
            if wire == BYTES and field in children:
                inner = self.end_of_bytes(end)
                child = children[field]
                if child == "tensor":
                    self.tensor(inner)
                else:
                    self.message(child, inner, depth + 1)
            else:
                self.skip(wire, end)
        self.check_end(end)

    def tensor(self, end: int) -> None:
        tensor = Span(0, 0)
        dims: list[int] = []
        first = len(self.spans)
        while self.at < end:
            field, wire = self.tag()
            if field in DATA and wire == BYTES:
                self.data_field(end)
            elif field == _NAME and wire == BYTES:
                tensor.name = self.text(end)
            elif field == DIMS and wire == BYTES:
                self.repeat(dims.append, end)
            elif wire == VARINT and field in (DIMS, DATA_TYPE, _LOCATION):
                self.number(field, tensor, dims)
            else:
                self.skip(wire, end)
        self.check_end(end)
        for span in self.spans[first:]:
            span.name, span.data_type, span.dims = tensor.name, tensor.data_type, tuple(dims)

    def number(self, field: int, tensor: Span, dims: list[int]) -> None:
        value = self.varint()
        if field == DIMS:
            dims.append(value)
        elif field == DATA_TYPE:
            tensor.data_type = value
        elif value == _EXTERNAL:
            raise DamageError(
                f"the data of its tensor {tensor.name!r} are in another file; "
                "save the model as one file with its weights inside"
            )

    def data_field(self, end: int) -> None:
        stop = self.end_of_bytes(end)
        if stop > self.at:
            self.spans.append(Span(self.at, stop - self.at))
        if self.cut:
            self.missing += stop - self.at
        self.at = stop

    def repeat(self, add: Callable[[int], None], end: int) -> None:
        stop = self.end_of_bytes(end)
        while self.at < stop:
            add(self.varint())
        self.check_end(stop)

    def text(self, end: int) -> str:
        stop = self.end_of_bytes(end)
        start, self.at = self.at, stop
        piece = self.data[start - self.missing : stop - self.missing]
        return bytes(piece).decode("utf-8", errors="replace")

    def tag(self) -> tuple[int, int]:
        key = self.varint()
        return key >> 3, key & 7

    def varint(self) -> int:
        self.numbers += 1
        if self.numbers > _MOST_NUMBERS:
            raise DamageError(f"it has more than {_MOST_NUMBERS} fields outside its weights")
        value = 0
        for shift in range(0, 7 * LONGEST_VARINT, 7):
            position = self.at - self.missing
            if position >= len(self.data):
                raise DamageError("it ends inside a message")
            byte = self.data[position]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise DamageError("a number in it is longer than ten bytes")

    def end_of_bytes(self, end: int) -> int:
        length = self.varint()
        if length > end - self.at:
            raise DamageError("a field of it is longer than the message around it")
        return self.at + length

    def skip(self, wire: int, end: int) -> None:
        if wire == VARINT:
            self.varint()
        elif wire == BYTES:
            self.at = self.end_of_bytes(end)
        elif wire in FIXED:
            self.at += FIXED[wire]
        else:
            raise DamageError(f"it has a field of the unknown wire type {wire}")

    def check_end(self, end: int) -> None:
        if self.at != end or self.at - self.missing > len(self.data):
            raise DamageError("a field of it reaches past the end of its message")
