"""A stream: one large tensor, or all small tensors of one type, coded in the smallest way found."""

from __future__ import annotations

import lzma
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from penjing.container import arithmetic, huffman
from penjing.container.arithmetic import Memory
from penjing.container.contexts import Shape
from penjing.container.damage import DamageError
from penjing.container.planes import VIEWS, WHOLE, Content, Plane, View, entropy

Coder = Literal["arithmetic", "huffman"]

STORED, CONSTANT, LZMA, HUFFMAN, ARITHMETIC = range(5)
CODERS = ("stored", "constant", "lzma", "huffman", "arithmetic")
"""Names of a plane's coders, in the order of their numbers in the file."""

_RANDOM = 7.98
"""Bits of a byte from which it is stored."""
_LZMA_DICTIONARY = 1 << 26
_CODER_BITS = 3
"""Lowest bits of a plane's head; the others are its size."""


class Reader:
    """Takes fields from the front of bytes; raises DamageError where they end too early."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)
        self.at = 0

    def take(self, size: int) -> bytes:
        return bytes(self.view(size))

    def view(self, size: int) -> memoryview:
        """The next ``size`` bytes without a copy."""
        if size > self.left:
            raise DamageError("it is cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, longest: int = 9) -> int:
        """An unsigned LEB128 number of at most ``longest`` bytes."""
        value = 0
        for shift in range(0, 7 * longest, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise DamageError("a size in it is not a number")

    @property
    def left(self) -> int:
        return len(self.data) - self.at


def number(value: int) -> bytes:
    """``value`` in LEB128, as ``Reader.number`` reads it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def compress_lzma(data: bytes, **contexts: int) -> bytes:
    """LZMA2 at preset 9: what ``xz -9`` writes, without the headers of its file format.

    The dictionary is only as large as finds what the preset's 64 MiB would find, because setting
    that up takes longer than compressing a small file: eight times the data keep the tables of the
    match finder, whose size follows from it, sparse. ``contexts`` are LZMA's lc, lp and pb.
    """
    filters = [
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 9,
            "dict_size": _dictionary(8 * len(data)),
            **contexts,
        }
    ]
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters)


def compress_skeleton(data: bytes) -> bytes:
    """LZMA2 in the way that suits names and short fields."""
    return compress_lzma(data, lc=1, lp=0, pb=0)


def decompress_lzma(data: bytes | memoryview, size: int) -> bytes:
    """The ``size`` bytes that were compressed; raises DamageError if ``data`` are not such."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": _dictionary(size)}]
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=filters)
    try:
        out = decoder.decompress(data, max_length=size + 1)
    except lzma.LZMAError as error:
        raise DamageError("an LZMA block of it cannot be read") from error
    if len(out) != size or not decoder.eof or decoder.unused_data:
        raise DamageError("an LZMA block of it does not have the declared size")
    return out


def _dictionary(size: int) -> int:
    """Dictionary that holds ``size`` bytes, at most that of preset 9: memory follows the data."""
    return min(_LZMA_DICTIONARY, max(4096, 1 << (size - 1).bit_length()))


@dataclass
class Decoded:
    """A stream read back: its bytes, how each plane was coded, and whether the checksum holds."""

    data: bytes
    view: str
    coders: list[str]
    checksum_ok: bool

    @property
    def coder(self) -> str:
        """For people: the view, where there is more than one way, and the coders of its planes."""
        names = ", ".join(dict.fromkeys(self.coders)) or "stored"
        return names if self.view in ("raw", "integers") else f"{self.view}: {names}"


def encode(data: bytes, content: Content, coder: Coder, memory: Memory, seed: int) -> bytes:
    """The shortest stream for ``data`` with the entropy coder ``coder``; ``memory`` learns.

    ``seed`` is the CRC-32 that the stream's checksum goes on from.
    """
    raw = np.frombuffer(data, np.uint8)
    best, learned, shortest = b"", memory, len(data) + 1
    for index, view in reversed(list(enumerate(VIEWS))):
        planes = view.split(raw, content) if view.coder in (None, coder) else None
        if planes is None:
            continue
        trial: Memory = {}
        coded = [
            _encode_plane(plane, kind, coder, memory, trial, shortest)
            for plane, kind in zip(planes, view.kinds(content), strict=True)
        ]
        stream = bytes([index]) + b"".join(coded)
        if not best or len(stream) < shortest:
            best, learned, shortest = stream, trial, len(stream)
    memory |= learned
    return best + _checksum(data, seed)


def _checksum(data: bytes, seed: int) -> bytes:
    return zlib.crc32(data, seed).to_bytes(4, "little")


def _encode_plane(
    plane: Plane, kind: str, coder: Coder, memory: Memory, learned: Memory, shortest: int
) -> bytes:
    """Size, number of the coder and payload of the shortest coding of ``plane``.

    ``shortest`` is the best stream so far: LZMA is not tried where it would not beat that either.
    """
    data = plane.symbols.tobytes()
    options = {STORED: data}
    if data and data.count(data[0]) == len(data):
        options[CONSTANT] = data[:1]
    elif not _worth_modelling(plane, kind):
        pass
    elif coder == "huffman":
        options[HUFFMAN] = huffman.encode(plane.symbols, plane.centre)
    else:
        options[ARITHMETIC], left = arithmetic.encode(
            plane.symbols, plane.shape, plane.centre, kind, memory
        )
    if _worth_lzma(data, min(shortest, *map(len, options.values()))):
        options[LZMA] = compress_lzma(data)
    best = min(options, key=lambda option: len(options[option]))
    if best == ARITHMETIC:
        learned |= left
    return number(len(options[best]) << _CODER_BITS | best) + options[best]


def _worth_modelling(plane: Plane, kind: str) -> bool:
    """Tell whether ``plane`` is anything but uniformly random, as the last bits of floats are."""
    return kind != WHOLE and len(plane.symbols) > 0 and entropy(plane.symbols) < _RANDOM


def _worth_lzma(data: bytes, best: int) -> bool:
    """LZMA is slow: try it where a quick look for repetitions finds more than the coders did."""
    return len(zlib.compress(data, 1)) < best


@dataclass(frozen=True)
class CodedPlane:
    """A plane as it lies in the file: its kind, the number of its coder, and its payload."""

    kind: str
    coder: int
    payload: memoryview

    @property
    def memory_key(self) -> tuple[str, int] | None:
        """The statistics that it reads and changes; None where it does neither."""
        modelled = self.coder == ARITHMETIC and len(self.payload) >= arithmetic.HEAD
        return (self.kind, arithmetic.form_of(self.payload)) if modelled else None


@dataclass(frozen=True)
class Coded:
    """A stream as it lies in the file."""

    content: Content
    view: View
    planes: list[CodedPlane]
    checksum: bytes
    size: int

    @property
    def memory_keys(self) -> set[tuple[str, int]]:
        """The statistics that it needs of the streams before, and leaves for those after it."""
        return {key for plane in self.planes if (key := plane.memory_key)}


def scan(reader: Reader, content: Content, version: int) -> Coded:
    """Step over one stream of ``content`` in a file of the format's ``version``.

    Raises DamageError if its fields cannot be right.
    """
    before = reader.at
    index = reader.take(1)[0]
    if index >= len(VIEWS):
        raise DamageError(f"a stream has the unknown view {index}")
    view = VIEWS[index]
    planes = [_scan_plane(reader, kind, version) for kind in view.kinds(content)]
    return Coded(content, view, planes, reader.take(4), reader.at - before)


def _scan_plane(reader: Reader, kind: str, version: int) -> CodedPlane:
    if version == 1:
        coder, size = reader.take(1)[0], reader.number()
    else:
        head = reader.number()
        coder, size = head % (1 << _CODER_BITS), head >> _CODER_BITS
    if coder >= len(CODERS):
        raise DamageError(f"a plane has the unknown coder {coder}")
    return CodedPlane(kind, coder, reader.view(size))


def needed(streams: list[Coded], last: int) -> list[int]:
    """Which streams, in order, must be decoded for the one at index ``last``, itself included.

    Of those before it, the ones whose arithmetic-coded planes leave what its planes, or those of
    another one needed, start from.
    """
    keys = streams[last].memory_keys
    found = [last]
    for index in reversed(range(last)):
        if keys & streams[index].memory_keys:
            keys = keys | streams[index].memory_keys
            found.append(index)
    return found[::-1]


def decode(coded: Coded, memory: Memory, seed: int) -> Decoded:
    """Decode a stream; ``memory`` learns. Raises DamageError if it cannot be decoded at all.

    A stream that decodes to other bytes than were packed is returned, marked so. ``seed`` is the
    CRC-32 that its checksum goes on from.
    """
    planes = iter(coded.planes)

    def read(shape: Shape) -> np.ndarray:
        return _decode_plane(next(planes), shape, memory)

    data = coded.view.join(coded.content, read).tobytes()
    names = [CODERS[plane.coder] for plane in coded.planes]
    return Decoded(data, coded.view.name, names, coded.checksum == _checksum(data, seed))


def _decode_plane(plane: CodedPlane, shape: Shape, memory: Memory) -> np.ndarray:
    size = shape[0] * shape[1] * shape[2]
    payload = bytes(plane.payload)
    if plane.coder == ARITHMETIC:
        symbols, left = arithmetic.decode(payload, shape, plane.kind, memory)
        memory |= left
        return symbols
    if plane.coder == HUFFMAN:
        return huffman.decode(payload, size)
    if plane.coder == LZMA:
        payload = decompress_lzma(payload, size)
    if len(payload) != (1 if plane.coder == CONSTANT else size):
        raise DamageError("a plane does not have the size of its tensor")
    symbols = np.frombuffer(payload, np.uint8)
    return np.repeat(symbols, size) if plane.coder == CONSTANT else symbols
