"""The layout of a .penjing file; docs/container.md gives it byte by byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from penjing.container import streams, wire
from penjing.container.arithmetic import Memory
from penjing.container.damage import DamageError
from penjing.container.planes import Content, element_type
from penjing.container.streams import Coder, Decoded, Reader, number
from penjing.container.wire import Span

MAGIC = b"PNJG"
VERSION = 1
LARGEST = 2**31 - 1
"""Bytes of an ONNX file at most: protobuf's own limit."""
SMALL = 1024
"""Tensors with fewer bytes share a stream with the others of their type."""

_WHOLE, _PARTS, _PHRASES = 0, 1, 2
_DIGEST = 16


@dataclass(frozen=True)
class Stream:
    """The tensors of one stream, what it decodes to, and the bytes it takes in the container."""

    tensors: list[Span]
    decoded: Decoded
    coded_bytes: int


@dataclass
class Container:
    """A container read back.

    ``skeleton`` are the bytes of the ONNX file between the weights (all of it in the layout of one
    LZMA block), ``coded_skeleton`` the bytes it takes, ``digest`` the start of the ONNX file's
    SHA-256.
    """

    size: int
    digest: bytes
    skeleton: bytes = b""
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

    def matches(self, model: bytes) -> bool:
        """Whether ``model`` is the file that was packed."""
        return _digest(model) == self.digest


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
    return MAGIC + bytes([VERSION]) + number(len(data)) + _digest(data) + body


def _encode_parts(data: bytes, spans: list[Span], coder: Coder) -> bytes:
    skeleton = wire.cut(data, spans)
    options = {
        _PARTS: streams.compress_skeleton(skeleton),
        _PHRASES: streams.compress_phrases(skeleton),
    }
    layout, coded = min(options.items(), key=lambda option: len(option[1]))
    memory: Memory = {}
    out = [bytes([layout]), number(len(skeleton)), number(len(coded)), coded]
    for members in _groups(spans):
        joined = b"".join(data[span.start : span.start + span.size] for span in members)
        out.append(streams.encode(joined, _content(members), coder, memory))
    return b"".join(out)


def decode(data: bytes) -> Container:
    """Read the container ``data``.

    Raises:
        DamageError: it cannot be read to its end. Tensors that fail their checksum are only marked.
    """
    reader = Reader(data)
    if reader.take(len(MAGIC)) != MAGIC:
        raise DamageError("it does not start as a .penjing file")
    if (version := reader.take(1)[0]) != VERSION:
        raise DamageError(
            f"it has version {version} of the format and this penjing reads {VERSION}"
        )
    size = reader.number()
    if size > LARGEST:
        raise DamageError(f"it declares {size} bytes, more than the {LARGEST} of an ONNX file")
    container = Container(size, reader.take(_DIGEST))
    layout = reader.take(1)[0]
    if layout == _WHOLE:
        _read_whole(reader, container)
    elif layout in _SKELETONS:
        _read_parts(reader, container, _SKELETONS[layout])
    else:
        raise DamageError(f"it has the unknown layout {layout}")
    return container


_SKELETONS = {_PARTS: streams.decompress_lzma, _PHRASES: streams.decompress_phrases}


def _read_whole(reader: Reader, container: Container) -> None:
    container.coded_skeleton = reader.left
    container.skeleton = streams.decompress_lzma(reader.take(reader.left), container.size)


def _read_parts(
    reader: Reader, container: Container, decompress: Callable[[bytes, int], bytes]
) -> None:
    size, container.coded_skeleton = reader.number(), reader.number()
    if size > container.size:
        raise DamageError("its graph is declared larger than the whole model")
    container.skeleton = decompress(reader.take(container.coded_skeleton), size)
    container.spans = wire.find_cut(container.skeleton, container.size)
    memory: Memory = {}
    for members in _groups(container.spans):
        before = reader.at
        decoded = streams.decode(reader, _content(members), memory)
        container.streams.append(Stream(members, decoded, reader.at - before))
    if reader.left:
        raise DamageError(f"{reader.left} bytes follow its end")


def _groups(spans: list[Span]) -> list[list[Span]]:
    """The tensors of each stream: every large one alone in file order, then the small by type."""
    small: dict[int, list[Span]] = {}
    for span in spans:
        if span.size < SMALL:
            small.setdefault(span.data_type, []).append(span)
    return [[span] for span in spans if span.size >= SMALL] + list(small.values())


def _content(members: list[Span]) -> Content:
    """What the stream of ``members`` holds; several tensors are one long vector."""
    size = sum(span.size for span in members)
    kind = element_type(members[0].data_type)
    dims = members[0].dims if len(members) == 1 else (size * 8 // kind.bits,)
    return Content(kind, dims, size)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_DIGEST]
