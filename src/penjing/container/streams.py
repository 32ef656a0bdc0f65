"""A stream: one large tensor, or all small tensors of one type, coded in the smallest way found."""

from __future__ import annotations

import lzma
import zlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from penjing.container import arithmetic, huffman
from penjing.container.arithmetic import Memory
from penjing.container.contexts import Shape
from penjing.container.damage import DamageError
from penjing.container.phrases import PHRASES
from penjing.container.planes import VIEWS, WHOLE, Content, Plane

Coder = Literal["arithmetic", "huffman"]

STORED, CONSTANT, LZMA, HUFFMAN, ARITHMETIC = range(5)
CODERS = ("stored", "constant", "lzma", "huffman", "arithmetic")
"""Names of a plane's coders, in the order of their numbers in the file."""

_RANDOM = 7.98
"""Bits of a byte from which it is stored."""
_LZMA_DICTIONARY = 1 << 26


class Reader:
    """Takes fields from the front of bytes; raises DamageError where they end too early."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)
        self.at = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise DamageError("it is cut short")
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def number(self) -> int:
        """An unsigned LEB128 number of at most 63 bits."""
        value = 0
        for shift in range(0, 63, 7):
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


def compress_phrases(data: bytes) -> bytes:
    """Raw deflate (RFC 1951) with a dictionary of what skeletons of small nets are made of."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, PHRASES)
    return coder.compress(data) + coder.flush()


def decompress_phrases(data: bytes, size: int) -> bytes:
    """The ``size`` bytes that were compressed; raises DamageError if ``data`` are not such."""
    decoder = zlib.decompressobj(-15, PHRASES)
    try:
        out = decoder.decompress(data, size + 1)
    except zlib.error as error:
        raise DamageError("its graph cannot be read") from error
    if len(out) != size or not decoder.eof or decoder.unused_data:
        raise DamageError("its graph does not have the declared size")
    return out


def decompress_lzma(data: bytes, size: int) -> bytes:
    """The ``size`` bytes that were compressed; raises DamageError if ``data`` are not such."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": _dictionary(size)}]
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=filters)
    try:
        out = decoder.decompress(data, max_length=size + 1)
    except lzma.LZMAError as error:
        raise DamageError("an LZMA block of it cannot be read") from error
    if len(out) != size:
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
    coders: list[str] = field(default_factory=list)
    checksum_ok: bool = True

    @property
    def coder(self) -> str:
        """For people: the view, where there is more than one way, and the coders of its planes."""
        names = ", ".join(dict.fromkeys(self.coders)) or "stored"
        return names if self.view in ("raw", "integers") else f"{self.view}: {names}"


def encode(data: bytes, content: Content, coder: Coder, memory: Memory) -> bytes:
    """The shortest stream for ``data`` with the entropy coder ``coder``; ``memory`` learns."""
    raw = np.frombuffer(data, np.uint8)
    best, learned, shortest = b"", memory, len(data) + 1
    for index, view in reversed(list(enumerate(VIEWS))):
        planes = view.split(raw, content) if view.coder in (None, coder) else None
        if planes is None:
            continue
        trial: Memory = {}
        coded = [_encode_plane(plane, coder, memory, trial, shortest) for plane in planes]
        stream = bytes([index]) + b"".join(coded)
        if not best or len(stream) < shortest:
            best, learned, shortest = stream, trial, len(stream)
    memory |= learned
    return best + zlib.crc32(data).to_bytes(4, "little")


def _encode_plane(
    plane: Plane, coder: Coder, memory: Memory, learned: Memory, shortest: int
) -> bytes:
    """Number of the coder, size and payload of the shortest coding of ``plane``.

    ``shortest`` is the best stream so far: LZMA is not tried where it would not beat that either.
    """
    data = plane.symbols.tobytes()
    options = {STORED: data}
    if data and data.count(data[0]) == len(data):
        options[CONSTANT] = data[:1]
    elif not _worth_modelling(plane):
        pass
    elif coder == "huffman":
        options[HUFFMAN] = huffman.encode(plane.symbols, plane.centre)
    else:
        options[ARITHMETIC], left = arithmetic.encode(
            plane.symbols, plane.shape, plane.centre, plane.kind, memory
        )
    if _worth_lzma(data, min(shortest, *map(len, options.values()))):
        options[LZMA] = compress_lzma(data)
    best = min(options, key=lambda option: len(options[option]))
    if best == ARITHMETIC:
        learned |= left
    return bytes([best]) + number(len(options[best])) + options[best]


def _worth_modelling(plane: Plane) -> bool:
    """Whether its symbols are anything but uniformly random, as the last bits of floats are."""
    if plane.kind == WHOLE or not len(plane.symbols):
        return False
    counts = np.bincount(plane.symbols)
    shares = counts[counts > 0] / len(plane.symbols)
    return float(-(shares * np.log2(shares)).sum()) < _RANDOM


def _worth_lzma(data: bytes, best: int) -> bool:
    """LZMA is slow: try it where a quick look for repetitions finds more than the coders did."""
    return len(zlib.compress(data, 1)) < best


def decode(reader: Reader, content: Content, memory: Memory) -> Decoded:
    """Read one stream of ``content``; raises DamageError if it cannot be decoded at all.

    A stream that decodes to other bytes than were packed is returned, marked so.
    """
    index = reader.take(1)[0]
    if index >= len(VIEWS):
        raise DamageError(f"a stream has the unknown view {index}")
    decoded = Decoded(b"", VIEWS[index].name)

    def read(shape: Shape, kind: str) -> np.ndarray:
        coder = reader.take(1)[0]
        payload = reader.take(reader.number())
        if coder >= len(CODERS):
            raise DamageError(f"a plane has the unknown coder {coder}")
        decoded.coders.append(CODERS[coder])
        return _decode_plane(coder, payload, shape, kind, memory)

    decoded.data = VIEWS[index].join(content, read).tobytes()
    decoded.checksum_ok = reader.take(4) == zlib.crc32(decoded.data).to_bytes(4, "little")
    return decoded


def _decode_plane(
    coder: int, payload: bytes, shape: Shape, kind: str, memory: Memory
) -> np.ndarray:
    size = shape[0] * shape[1] * shape[2]
    if coder == ARITHMETIC:
        symbols, left = arithmetic.decode(payload, shape, kind, memory)
        memory |= left
        return symbols
    if coder == HUFFMAN:
        return huffman.decode(payload, size)
    if coder == LZMA:
        payload = decompress_lzma(payload, size)
    if len(payload) != (1 if coder == CONSTANT else size):
        raise DamageError("a plane does not have the size of its tensor")
    symbols = np.frombuffer(payload, np.uint8)
    return np.repeat(symbols, size) if coder == CONSTANT else symbols
