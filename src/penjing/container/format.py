"""The layout of a .penjing file; docs/container.md gives it byte by byte."""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from penjing.container import lengths, mixing, streams, wire
from penjing.container.arithmetic import Memory
from penjing.container.damage import DamageError
from penjing.container.planes import Content, element_type, numbered
from penjing.container.streams import Coded, Coder, Decoded, Reader, number
from penjing.container.wire import LARGEST, Span

MAGIC = b"PNJG"
VERSION = 2
"""The version that is written. Tensors' checksums cover the graph since version 2; 1 is read too."""
SMALL = 1024
"""Tensors with fewer bytes share a stream with the others of their type."""
_SMALL_INTEGERS = 512
"""``SMALL`` of integers of at most 8 bits, since version 2: alone they keep their rows."""

_WHOLE, _PARTS, _MIXED = 0, 1, 2
_DIGEST = {1: 16, 2: 8}
"""Bytes of the digest, by version."""
_MOST_MIXED = 1 << 13
"""Bytes of a graph's short form that are mixed, which takes about a second, at most."""
_WORTH = 2000
"""A graph is mixed where that saves one byte in so many of the weights'."""


@dataclass(frozen=True)
class Stream:
    """The tensors of one stream, what it decodes to, and the bytes it takes in the container."""

    tensors: list[Span]
    decoded: Decoded
    coded_bytes: int


@dataclass
class Container:
    """A container, as far as it has been read back.

    ``skeleton`` are the bytes of the ONNX file between the weights (all of it in the layout of one
    LZMA block), ``skeleton_coder`` how they are coded and ``coded_skeleton`` in how many bytes,
    ``digest`` the start of the ONNX file's SHA-256.
    """

    version: int
    size: int
    digest: bytes
    skeleton: bytes = b""
    skeleton_coder: str = "lzma"
    coded_skeleton: int = 0
    spans: list[Span] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)

    def model(self) -> bytes:
        """The ONNX file; not the one that was packed unless ``matches`` says so."""
        data = {}
        for stream in self.streams:
            at = 0
            for span in stream.tensors:
                data[span.start] = stream.decoded.data[at : at + span.size]
                at += span.size
        return wire.fill(self.skeleton, self.spans, data)

    @property
    def seed(self) -> int:
        """The CRC-32 that the streams' checksums go on from."""
        return 0 if self.version == 1 else zlib.crc32(self.skeleton)

    def matches(self, model: bytes) -> bool:
        """Tell whether ``model`` is the file that was packed."""
        return _digest(model)[: len(self.digest)] == self.digest


def encode(data: bytes, coder: Coder) -> bytes:
    """The container of the ONNX file ``data``, in the smallest of its layouts.

    Raises:
        DamageError: ``data`` is no ONNX file, keeps weights elsewhere, or is larger than 2 GiB.
    """
    if len(data) > LARGEST:
        raise DamageError(f"it has {len(data)} bytes, more than the {LARGEST} of an ONNX file")
    spans = wire.find(data)
    with ThreadPoolExecutor(1) as beside:
        whole = beside.submit(streams.compress_lzma, data)
        parts = _encode_parts(data, spans, coder)
        body = min(parts, bytes([_WHOLE]) + whole.result(), key=len)
    return MAGIC + bytes([VERSION]) + number(len(data)) + _digest(data)[: _DIGEST[VERSION]] + body


def _encode_parts(data: bytes, spans: list[Span], coder: Coder) -> bytes:
    skeleton = wire.cut(data, spans)
    weights = _encode_streams(data, spans, coder, zlib.crc32(skeleton))
    graph = bytes([_PARTS]) + number(len(skeleton)) + _sized(streams.compress_skeleton(skeleton))
    most = len(graph) - len(weights) // _WORTH
    mixed = _mix_skeleton(skeleton, len(data)) if most > 0 else b""
    return (mixed if 0 < len(mixed) < most else graph) + weights


def _encode_streams(data: bytes, spans: list[Span], coder: Coder, seed: int) -> bytes:
    memory: Memory = {}
    coded = []
    for members in _groups(spans, VERSION):
        joined = b"".join(data[span.start : span.start + span.size] for span in members)
        coded.append(streams.encode(joined, _content(members), coder, memory, seed))
    return b"".join(coded)


def weight_bytes(tensors: Iterable[np.ndarray]) -> int:
    """Return the bytes that ``tensors`` of a file, in their order in it, take in its container."""
    parts: list[bytes] = []
    spans: list[Span] = []
    start = 0
    for tensor in tensors:
        kind = numbered(tensor.dtype.name)
        spans.append(Span(start, tensor.nbytes, data_type=kind, dims=tensor.shape))
        parts.append(tensor.tobytes())
        start += tensor.nbytes
    return len(_encode_streams(b"".join(parts), spans, "arithmetic", seed=0))


@functools.lru_cache(maxsize=16)
def _mix_skeleton(skeleton: bytes, size: int) -> bytes:
    """The layout, the sizes and the code of the ``skeleton`` of an ONNX file of ``size`` bytes; nothing
    where it cannot be mixed. The last are kept: a search packs few graphs with many weights."""
    short = lengths.shorten(skeleton, size)
    if not short or len(short) > _MOST_MIXED:
        return b""
    return bytes([_MIXED]) + number(len(short)) + _sized(mixing.compress(short))


def _sized(coded: bytes) -> bytes:
    return number(len(coded)) + coded


def decode(data: bytes, most: int = LARGEST) -> Container:
    """Read the container ``data`` of an ONNX file of at most ``most`` bytes.

    Raises:
        DamageError: it cannot be read to its end. Tensors that fail their checksum are only marked.
    """
    container, coded = _open(data, most)
    memory: Memory = {}
    seed = container.seed
    for members, stream in zip(_groups(container.spans, container.version), coded, strict=True):
        decoded = streams.decode(stream, memory, seed)
        container.streams.append(Stream(members, decoded, stream.size))
    return container


def decode_span(
    data: bytes, choose: Callable[[list[Span]], Span], most: int = LARGEST
) -> tuple[Span, memoryview]:
    """The tensor that ``choose`` takes from all of the container ``data``, and its bytes.

    Only the streams that these bytes depend on are decoded, one after the other.

    Raises:
        DamageError: the container's fields cannot be right, or the tensor fails its checksum.
    """
    container, coded = _open(data, most)
    if not coded:
        return _span_of_block(container, choose)
    span = choose(container.spans)
    groups = _groups(container.spans, container.version)
    last = next(index for index, members in enumerate(groups) if span in members)
    memory: Memory = {}
    seed = container.seed
    for index in streams.needed(coded, last):
        decoded = streams.decode(coded[index], memory, seed)
    if not decoded.checksum_ok:
        raise DamageError(f"its tensor {span.name!r} does not fit its checksum")
    before = sum(member.size for member in groups[last] if member.start < span.start)
    return span, memoryview(decoded.data)[before : before + span.size]


def _span_of_block(
    container: Container, choose: Callable[[list[Span]], Span]
) -> tuple[Span, memoryview]:
    if not container.matches(container.skeleton):
        raise DamageError("what it holds does not fit its checksum")
    span = choose(wire.find(container.skeleton))
    return span, memoryview(container.skeleton)[span.start : span.start + span.size]


def _open(data: bytes, most: int) -> tuple[Container, list[Coded]]:
    """Everything but the streams decoded, and the streams as they are: none in one block."""
    reader = Reader(data)
    container = _read_head(reader, most)
    layout = reader.take(1)[0]
    if layout == _WHOLE:
        container.coded_skeleton = reader.left
        container.skeleton = streams.decompress_lzma(reader.view(reader.left), container.size)
        return container, []
    if layout not in (_PARTS, _MIXED)[: container.version]:
        raise DamageError(f"it has the unknown layout {layout}")
    _read_skeleton(reader, container, layout)
    coded = [
        streams.scan(reader, _content(members), container.version)
        for members in _groups(container.spans, container.version)
    ]
    if reader.left:
        raise DamageError(f"{reader.left} bytes follow its end")
    return container, coded


def _read_head(reader: Reader, most: int) -> Container:
    if reader.take(len(MAGIC)) != MAGIC:
        raise DamageError("it does not start as a .penjing file")
    if (version := reader.take(1)[0]) not in (1, VERSION):
        raise DamageError(
            f"it has version {version} of the format and this penjing reads 1 to {VERSION}"
        )
    size = reader.number()
    if size > most:
        whose = "an ONNX file" if most == LARGEST else "the limit given"
        raise DamageError(f"it declares {size} bytes, more than the {most} of {whose}")
    return Container(version, size, reader.take(_DIGEST[version]))


def _read_skeleton(reader: Reader, container: Container, layout: int) -> None:
    size, container.coded_skeleton = reader.number(), reader.number()
    if size > container.size:
        raise DamageError("its graph is declared larger than the whole model")
    coded = reader.view(container.coded_skeleton)
    if layout == _PARTS:
        container.skeleton = streams.decompress_lzma(coded, size)
    else:
        container.skeleton_coder = "mixed"
        container.skeleton = _mixed_skeleton(coded, size, container.size)
    container.spans = wire.find_cut(container.skeleton, container.size)


def _mixed_skeleton(coded: memoryview, size: int, whole: int) -> bytes:
    """The skeleton of an ONNX file of ``whole`` bytes, from a short form of ``size``."""
    if size > _MOST_MIXED:
        raise DamageError("its graph is declared larger than it can be in its layout")
    skeleton, found = lengths.lengthen(mixing.decompress(coded, size))
    if found != whole:
        raise DamageError("its graph does not have the declared size")
    return skeleton


def _groups(spans: list[Span], version: int) -> list[list[Span]]:
    """The tensors of each stream: every large one alone in file order, then the small by type."""
    alone: list[list[Span]] = []
    small: dict[int, list[Span]] = {}
    for span in spans:
        if span.size >= _least_alone(span, version):
            alone.append([span])
        else:
            small.setdefault(span.data_type, []).append(span)
    return alone + list(small.values())


def _least_alone(span: Span, version: int) -> int:
    """Bytes that a tensor of the type of ``span`` needs for a stream of its own."""
    integers = version > 1 and element_type(span.data_type).bits <= 8
    return min(SMALL, _SMALL_INTEGERS) if integers else SMALL


def _content(members: list[Span]) -> Content:
    """The content of the stream of ``members``; several tensors are one long vector."""
    size = sum(span.size for span in members)
    kind = element_type(members[0].data_type)
    dims = members[0].dims if len(members) == 1 else (size * 8 // kind.bits,)
    return Content(kind, dims, tuple(span.size for span in members))


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
