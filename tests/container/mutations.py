"""Small .penjing files, ways to damage them, and what must hold whatever the damage.

A case is a seed, a few edits and whether its checksums are made to fit again afterwards; an edit is
the name of a function of this module and three numbers, so that hypothesis can shrink it and a
generator of random numbers can draw a million.
"""

from __future__ import annotations

import hashlib
import random
import signal
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnx_files import chain, graph
from walks import walk

from penjing.container import format, inspect, lengths, mixing, read_tensor, unpack, wire
from penjing.container.damage import DamageError
from penjing.container.planes import VIEWS
from penjing.container.streams import Reader, compress_skeleton, number
from penjing.errors import PenjingError

MOST = 1 << 16
"""Bytes of an ONNX file that a case may declare: what bounds its time and memory."""
DIGEST = {1: 16, 2: 8}
"""Bytes of the digest in a file's head, by version."""
CPU_SECONDS = 30
"""Of one case, of which it needs thousandths: more is a hang, however busy the machine."""
NUMBERS = (0, 1, 2, 64, 127, 128, 255, 256, 16_384, MOST - 1, MOST, 2**31 - 1, 2**32, 2**63 - 1)

Edit = tuple[str, int, int, int]


@dataclass(frozen=True)
class Seed:
    """A valid file, the ONNX file and tensors in it, and where its fields and streams are."""

    data: bytes
    model: bytes
    tensors: dict[str, bytes]
    fields: list[tuple[int, int]]
    skeleton: bytes
    streams: bytes


@contextmanager
def small_streams() -> Iterator[None]:
    """Tensors of 64 bytes have a stream of their own: every view and coder in tiny files."""
    with mock.patch.object(format, "SMALL", 64):
        yield


def seeds() -> list[Seed]:
    """Every view, coder and layout, in both versions; to be called within ``small_streams``."""
    rng = np.random.default_rng(0)
    conv = rng.laplace(0, 2, (4, 3, 3, 3)).astype(np.int8)
    smooth = np.clip(rng.normal(0, 16, (8, 6, 3, 3)), -127, 127).astype(np.int8)
    pruned = np.where(rng.random((8, 10)) < 0.8, 0, rng.normal(0, 1, (8, 10)))
    shared = rng.integers(0, 5, (8, 10)) / 3
    packed = helper.make_tensor("packed", TensorProto.FLOAT, [20], rng.normal(0, 1, 20))
    nibbles = TensorProto(name="w", data_type=TensorProto.INT4, dims=[199])
    nibbles.raw_data = rng.binomial(255, 0.5, 100).astype(np.uint8).tobytes()
    inner = helper.make_graph([], "g", [], [], [numpy_helper.from_array(conv, "deep")])
    branch = helper.make_node("If", ["x"], ["z"], then_branch=inner)
    rare = np.zeros(2400, np.int8)
    rare[np.cumsum(rng.integers(8, 13, 180))] = rng.integers(1, 9, 180)
    rare = rare.reshape(60, 40)
    wide = np.where(rng.random((60, 40)) < 0.1, rng.integers(-99, 99, (60, 40)), 0).astype(np.int8)
    many = np.arange(8)[:, None, None, None] % 2
    kept = np.where(rng.random((8, 40, 3, 3)) < 0.03 + 0.37 * many, 30 - 28 * many, 0)
    kept *= rng.choice([-1, 1], kept.shape)
    near = np.repeat(rng.random((60, 5)) < 0.2, 8, 1) & (rng.random((60, 40)) < 0.6)
    nearby = np.where(near, rng.integers(-9, 9, (60, 40)), 0)
    dependent = walk((8, 6, 9), 3, rng).reshape(8, 6, 3, 3).astype(np.int8)
    few = [np.arange(5, dtype=np.int64), np.ones(3, bool), np.float64(2.5), np.zeros((0, 2))]
    files = [
        (chain(conv), "arithmetic"),
        (chain(conv, rng.laplace(0, 9, (12, 9)).astype(np.int8)), "arithmetic"),
        (chain(smooth), "arithmetic"),
        (chain(dependent, dependent[:4]), "arithmetic"),
        (chain(pruned.astype(np.float32)), "arithmetic"),
        (chain(shared.astype(np.float16)), "arithmetic"),
        (chain(wide), "arithmetic"),
        (chain(*_biases(np.random.default_rng(0))), "arithmetic"),
        (chain(rare), "arithmetic"),
        (chain(kept.astype(np.int8)), "arithmetic"),
        (chain(nearby.astype(np.int8)), "arithmetic"),
        (chain(rare), "huffman"),
        (chain(conv), "huffman"),
        (chain(conv, conv[::-1], *map(np.asarray, few)), "huffman"),
        (chain(pruned.astype(np.float32), shared.astype(np.float32)), "huffman"),
        (chain(rng.integers(-999, 999, 40).astype(np.int32)), "huffman"),
        (chain(rng.normal(0, 1, (10, 10)).astype(np.float32)), "arithmetic"),
        (graph([packed, nibbles], [branch]), "huffman"),
        (chain(np.arange(99, dtype=np.int64)), "huffman"),
        (chain(np.full(99, 7, np.uint8)), "huffman"),
        (graph([]), "huffman"),
    ]
    encoded = [_in_parts(file, coder) for file, coder in files]
    encoded.append(format.encode(chain(conv, conv), "huffman"))  # the smaller is one block
    old = [_as_version_1(data) for data in encoded[:1] + encoded[5:11]]
    encoded.append(format.encode(chain(smooth), "arithmetic"))  # with a mixed graph
    return [_seed(data) for data in encoded + old]


def _biases(rng: np.random.Generator) -> list[np.ndarray]:
    """Rounded ones of several layers, a large one among them, and what lies on no grid."""
    rounded = [
        (rng.normal(0, 9, size).round() / 2**size).astype(np.float32) for size in (9, 12, 40)
    ]
    return [*rounded, np.array([0.1], np.float32)]


def _in_parts(file: bytes, coder: str) -> bytes:
    """The container in the layout of parts with its graph in LZMA, which is read in no time, although
    others are smaller here."""
    with (
        mock.patch.object(format, "min", lambda parts, *_, **__: parts, create=True),
        mock.patch.object(format, "_mix_skeleton", lambda *_: b""),
    ):
        return format.encode(file, coder)


def _as_version_1(data: bytes) -> bytes:
    """What the first release would have written."""
    container, streams = format._open(data, MOST)
    decoded = format.decode(data)
    graph = compress_skeleton(container.skeleton)
    digest = hashlib.sha256(decoded.model()).digest()[:16]
    out = [b"PNJG\x01", number(container.size), digest, b"\x01"]
    out += [number(len(container.skeleton)), number(len(graph)), graph]
    for coded, stream in zip(streams, decoded.streams, strict=True):
        out.append(bytes([VIEWS.index(coded.view)]))
        for plane in coded.planes:
            out += [bytes([plane.coder]), number(len(plane.payload)), bytes(plane.payload)]
        out.append(zlib.crc32(stream.decoded.data).to_bytes(4, "little"))
    return b"".join(out)


def _seed(data: bytes) -> Seed:
    fields: list[tuple[int, int]] = []

    class Recorder(Reader):
        def number(self) -> int:
            start = self.at
            value = super().number()
            fields.append((start, self.at))
            return value

        def view(self, size: int) -> memoryview:
            # The fields of a coder are at the front of its payload.
            fields.extend((at, at + 1) for at in range(self.at, self.at + min(size, 8)))
            return super().view(size)

    with mock.patch.object(format, "Reader", Recorder):
        container = format.decode(data)
    model = container.model()
    assert container.matches(model)
    coded = sum(stream.coded_bytes for stream in container.streams)
    streams = data[len(data) - coded :] if container.spans else b""
    tensors = {
        span.name: model[span.start : span.start + span.size]
        for span in wire.find(model)
        if span.data_type != TensorProto.INT4  # read_tensor gives a byte an element
    }
    return Seed(data, model, tensors, fields, container.skeleton, streams)


def sealed(data: bytes) -> bytes:
    """``data`` with checksums that fit what it decodes to, if it does."""
    try:
        container = format.decode(data, MOST)
    except DamageError:
        return data
    out = bytearray(data)
    end = len(out)
    for stream in reversed(container.streams):
        crc = zlib.crc32(stream.decoded.data, container.seed)
        out[end - 4 : end] = crc.to_bytes(4, "little")
        end -= stream.coded_bytes
    digest = hashlib.sha256(container.model()).digest()[: DIGEST[container.version]]
    at = 5 + len(number(container.size))
    if out[5:at] == number(container.size):  # else a number written in more bytes than it needs
        out[at : at + len(digest)] = digest
    return bytes(out)


# Edits: of the bytes of a file, with three numbers of 32 bits.


def cut(data: bytearray, a: int, b: int, c: int) -> None:
    del data[a % (len(data) + 1) :]


def flip(data: bytearray, a: int, b: int, c: int) -> None:
    data[a % len(data)] ^= 1 << b % 8


def change(data: bytearray, a: int, b: int, c: int) -> None:
    data[a % len(data)] = b % 256


def insert(data: bytearray, a: int, b: int, c: int) -> None:
    at = a % (len(data) + 1)
    data[at:at] = random.Random(b).randbytes(1 + c % 9)


def delete(data: bytearray, a: int, b: int, c: int) -> None:
    at = a % len(data)
    del data[at : at + 1 + b % (9 if c % 4 else len(data))]


def repeat(data: bytearray, a: int, b: int, c: int) -> None:
    at = a % len(data)
    data[at:at] = data[at : at + 1 + b % 99]


BYTES = {edit.__name__: edit for edit in (cut, flip, change, insert, delete, repeat)}
KINDS = (*BYTES, "splice", "field", "graph")


def mutated(seed: Seed, edits: list[Edit], others: list[Seed]) -> bytes:
    """``seed`` after ``edits``; splices take the end of one of ``others``."""
    data = bytearray(seed.data)
    for kind, a, b, c in edits:
        if kind == "splice":
            other = others[c % len(others)].data
            data[a % (len(data) + 1) :] = other[b % (len(other) + 1) :]
        elif kind == "field":
            start, stop = seed.fields[a % len(seed.fields)]
            data[start:stop] = _field(bytes(data[start:stop]), b, c)
        elif kind == "graph":
            data = bytearray(_with_graph(seed, a, b, c))
        elif data:
            BYTES[kind](data, a, b, c)
    return bytes(data)


def _field(old: bytes, b: int, c: int) -> bytes:
    """Another number for a field: one at an edge, or one near the old one."""
    if b % 3 == 0:
        return bytes([c % 256])
    if b % 3 == 1:
        return number(NUMBERS[c % len(NUMBERS)])
    value = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(old))
    return number(max(0, value + c % 5 - 2))


def _with_graph(seed: Seed, a: int, b: int, c: int) -> bytes:
    """``seed`` with an edit inside its compressed graph, and sizes that fit."""
    if not seed.streams:
        return seed.data
    edit = BYTES[tuple(BYTES)[c % len(BYTES)]]
    if c // 2 % 8 == 0 and seed.data[4] == 2:  # rarely, because it takes longer
        graph = bytearray(lengths.shorten(seed.skeleton, len(seed.model)) or b"")
        edit(graph, a, b, c // 7)
        layout, coded, size = b"\x02", mixing.compress(bytes(graph)), _declared(graph, seed)
    else:
        graph = bytearray(seed.skeleton)
        edit(graph, a, b, c // 7)
        layout, coded = b"\x01", compress_skeleton(bytes(graph))
        size = len(seed.model) + (len(graph) - len(seed.skeleton)) * (c % 2)
    sha = hashlib.sha256(seed.model).digest()
    head = seed.data[:5] + number(max(0, size)) + sha[: DIGEST[seed.data[4]]]
    return head + layout + number(len(graph)) + number(len(coded)) + coded + seed.streams


def _declared(short: bytearray, seed: Seed) -> int:
    """The size of the ONNX file that a graph's short form says, if it says any."""
    try:
        return lengths.lengthen(bytes(short))[1]
    except DamageError:
        return len(seed.model)


# What must hold.


def check(data: bytes, folder: Path, known: list[Seed], resealed: bool) -> bool:
    """Whether ``data`` unpack; fails if they do anything but that, or give one PenjingError.

    What unpacks is one of the ``known`` models, or fits the checksum where that was ``resealed``.
    """
    source, target = folder / "case.penjing", folder / "case.onnx"
    source.write_bytes(data)
    with _hangs_caught():
        try:
            unpack(source, target, most=MOST)
        except PenjingError as error:
            _check_message(error, source)
            assert not target.exists()
            return False
        finally:
            _check_others(source, known, resealed, which=zlib.crc32(data))
    model = target.read_bytes()
    target.unlink()
    if not any(model == seed.model for seed in known):
        assert resealed
        assert hashlib.sha256(model).digest()[:8] in data[:40]
    return True


def _check_others(source: Path, known: list[Seed], resealed: bool, which: int) -> None:
    """The same of ``inspect`` and ``read_tensor``, in turns."""
    try:
        if which % 2:
            inspect(source, most=MOST)
            return
        name = ("w0", "w1", "w2", "deep")[which // 2 % 4]
        found = read_tensor(source, name, most=MOST).tobytes()
    except PenjingError as error:
        _check_message(error, source)
        return
    right = [seed.tensors.get(name) for seed in known]
    if source.read_bytes()[4] == 1:  # its checksums do not cover names
        right = [tensor for seed in known for tensor in seed.tensors.values()]
    assert resealed or found in right


def _check_message(error: PenjingError, source: Path) -> None:
    assert str(error).startswith(str(source))
    assert "memory" not in str(error), f"more memory than {MOST} bytes need: {error}"


@contextmanager
def _hangs_caught() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise RuntimeError(f"not decoded in {CPU_SECONDS} seconds of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def case(rng: random.Random, known: list[Seed]) -> tuple[bytes, bool]:
    """A random case: its bytes, and whether its checksums were made to fit."""
    edits = [
        (rng.choice(KINDS), *(rng.getrandbits(32) for _ in range(3)))
        for _ in range(rng.choice((1, 1, 1, 2, 3)))
    ]
    data = mutated(rng.choice(known), edits, known)
    resealed = rng.random() < 0.5
    return (sealed(data) if resealed else data), resealed
