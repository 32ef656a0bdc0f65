"""A second decoder of .penjing files, written from docs/container.md alone.

It shares nothing with penjing, needs no constriction, and checks nothing but the checksums: what it
is for is to show that the document says everything.
"""

import hashlib
import lzma
import math
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import copy
from functools import cache
from itertools import accumulate
from operator import mul
from pathlib import Path

import numpy as np

PHRASES = Path(__file__).parents[2] / "src/penjing/container/phrases.bin"
NAMES = {
    **{1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64"},
    **{9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64"},
    **{15: "complex128", 16: "bfloat16", 17: "float8e4m3fn", 18: "float8e4m3fnuz"},
    **{19: "float8e5m2", 20: "float8e5m2fnuz", 21: "uint4", 22: "int4", 23: "float4e2m1"},
    **{24: "float8e8m0", 25: "uint2", 26: "int2"},
}
WIDE = {1: 32, 4: 16, 5: 16, 6: 32, 7: 64, 10: 16, 11: 64, 12: 32, 13: 64, 14: 32, 15: 64, 16: 16}
BITS = defaultdict(lambda: 8, {**WIDE, 21: 4, 22: 4, 23: 4, 25: 2, 26: 2})
SIGNED = (3, 5, 6, 7, 22, 26)


class Fields:
    """The bytes of a file or a graph, from the front."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        value = shift = 0
        while (byte := self.byte()) > 127:
            value, shift = value | (byte & 127) << shift, shift + 7
        return value | byte << shift


def unpack(data: bytes) -> bytes:
    """The ONNX file in the .penjing file ``data``; fails where a checksum does."""
    file = Fields(data)
    assert file.take(4) == b"PNJG"
    version, size = file.byte(), file.number()
    digest, layout = file.take({1: 16, 2: 8}[version]), file.byte()
    if layout == 0:
        model = unlzma(file.take(len(data)))
    else:
        length, coded = file.number(), file.take(file.number())
        skeleton = unlzma(coded) if layout == 1 else lengthen(Fields(unmix(coded, length) + b"\0"))
        model = fill(skeleton, size, file, version)
    assert file.at >= len(data) and len(model) == size
    assert hashlib.sha256(model).digest().startswith(digest)
    return model


def unlzma(coded: bytes) -> bytes:
    return lzma.decompress(coded, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])


# Skeleton

CHILDREN = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
    "tensor": {},
}


def leb(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + leb(value >> 7)


def lengthen(short: Fields) -> bytes:
    """The skeleton of a short form."""
    return message(short, "model")[0]


def message(short: Fields, kind: str) -> tuple[bytes, int]:
    """A message up to its zero, and how many bytes of data are missing from it."""
    out, missing, elements, data_type = b"", 0, 1, 0
    while key := short.number():
        field, form = key >> 3, key & 7
        out += leb(key)
        if form == 2 and field in CHILDREN[kind]:
            inner, less = message(short, CHILDREN[kind][field])
            out, missing = out + leb(len(inner) + less) + inner, missing + less
        elif form == 2 and kind == "tensor" and field in (4, 9):
            size = -(-elements * BITS[data_type] // 8)
            out, missing = out + leb(size), missing + size
        elif form == 2:
            out += leb(size := short.number()) + short.take(size)
        elif form == 0:
            out += leb(value := short.number())
            elements *= value if field == 1 else 1
            data_type = value if field == 2 else data_type
        else:
            out += short.take({1: 8, 5: 4}[form])
    return out, missing


def find(skeleton: Fields, kind: str, size: int) -> tuple[list[tuple], int]:
    """The tensors cut out of a message of ``size`` bytes: where, bytes, type, dims; and all bytes."""
    found, start, missing, data_type, dims, cuts = [], skeleton.at, 0, 0, (), []
    while skeleton.at - start + missing < size:
        key = skeleton.number()
        field, form = key >> 3, key & 7
        if form == 0:
            value = skeleton.number()
            data_type = value if field == 2 else data_type
            dims += (value,) if field == 1 else ()
        elif form != 2:
            skeleton.take({1: 8, 5: 4}[form])
        elif field in CHILDREN[kind]:
            inner, less = find(skeleton, CHILDREN[kind][field], skeleton.number())
            found, missing = found + inner, missing + less
        elif kind == "tensor" and field in (4, 9):
            cuts.append((skeleton.number(), skeleton.at))
            missing += cuts[-1][0]
        else:
            packed = Fields(skeleton.take(skeleton.number()))
            while kind == "tensor" and field == 1 and packed.at < len(packed.data):
                dims += (packed.number(),)
    found += [(at, bytes_, data_type, dims) for bytes_, at in cuts if bytes_]
    return found, missing


def fill(skeleton: bytes, size: int, file: Fields, version: int) -> bytes:
    """The ONNX file: the skeleton, and the tensors that are streams of ``file``."""
    groups, small = [], {}
    for tensor in find(Fields(skeleton), "model", size)[0]:
        alone = 512 if version > 1 and BITS[tensor[2]] <= 8 else 1024
        if tensor[1] >= alone:
            groups.append([tensor])
        else:
            small.setdefault(tensor[2], []).append(tensor)
    memory: dict = {}
    pieces = []
    for group in [*groups, *small.values()]:
        data = Stream(file, version, memory, group).read()
        covered = data if version == 1 else skeleton + data
        assert file.take(4) == zlib.crc32(covered).to_bytes(4, "little")
        for at, bytes_, *_ in group:
            pieces.append((at, data[:bytes_]))
            data = data[bytes_:]
    out, last = b"", 0
    for at, piece in sorted(pieces):
        out, last = out + skeleton[last:at] + piece, at
    return out + skeleton[last:]


# Mixing

STRETCH = [round(256 * math.log((p + 0.5) / (4095.5 - p))) for p in range(4096)]
SQUASH = [round(65536 / (1 + math.exp(-x / 256))) for x in range(-2047, 2048)]


def adapt(state: tuple[int, int], bit: int) -> tuple[int, int]:
    p, n = state
    return p + ((65535 * bit - p) * (131072 // (2 * n + 3)) >> 16), min(n + 1, 20)


class Mixer:
    """Steps 1 to 3 of mixing; a bit comes from the function ``code``, given its probability."""

    def __init__(self) -> None:
        self.contexts = defaultdict(lambda: (32768, 0))
        self.weights = defaultdict(lambda: [26214] * 10)
        self.matches = [(58000, 0)] * 17
        self.places: dict[bytes, int] = {}
        self.read, self.place, self.length = b"", 0, 0

    def copy(self) -> "Mixer":
        other = copy(self)
        other.contexts, other.places = self.contexts.copy(), self.places.copy()
        other.weights = self.weights.copy()
        other.weights |= {key: weights.copy() for key, weights in self.weights.items()}
        other.matches = self.matches.copy()
        return other

    def byte(self, code: Callable[[int], int]) -> None:
        read = self.read
        last = [read[-n:] for n in (1, 2, 3, 6)]
        last += [read[-3:-1], read[-4:-2], read[-8:-4], (read[-5:-3], read[-1:])]
        node, expected = 1, read[self.place] | 256 if self.length else 0
        for shift in range(7, -1, -1):
            keys = [(which, context, node) for which, context in enumerate(last)]
            coming = expected >> shift & 1 if expected >> shift + 1 == node else None
            node = 2 * node + self.bit(keys, coming, code)
        self.read += bytes([node - 256])
        self.look_up(came=node == expected)

    def bit(self, keys: list[tuple], coming: int | None, code: Callable[[int], int]) -> int:
        contexts, length = self.contexts, min(self.length, 16)
        predictions = [STRETCH[contexts[key][0] >> 4] if key in contexts else 0 for key in keys]
        sure = STRETCH[self.matches[length][0] >> 4]
        predictions += [0 if coming is None else sure if coming else -sure, 64]
        weights = self.weights[sum(key in contexts for key in keys), coming is not None]
        x = sum(map(mul, weights, predictions)) >> 16
        p = min(max(SQUASH[min(max(x, -2047), 2047) + 2047], 16), 65520)
        bit = code(p)
        wrong = ((bit << 16) - p) * 4
        weights[:] = [
            w + (wrong * o + 32768 >> 16) for w, o in zip(weights, predictions, strict=True)
        ]
        for key in keys:
            contexts[key] = adapt(contexts[key], bit)
        if coming is not None:
            self.matches[length] = adapt(self.matches[length], int(bit == coming))
        return bit

    def look_up(self, *, came: bool) -> None:
        read = self.read
        self.place, self.length = (self.place + 1, self.length + 1) if came else (0, 0)
        if not self.length and read[-4:] in self.places:
            place = self.place = self.places[read[-4:]]
            same = [read[place - n] == read[-n] for n in range(1, min(place, 16) + 1)]
            self.length = (*same, False).index(False)
        self.places[read[-4:]] = len(read)


@cache
def informed() -> Mixer:
    """A mixer that has read the phrases."""
    phrases, mixer = PHRASES.read_bytes(), Mixer()
    bits = iter([byte >> shift & 1 for byte in phrases for shift in range(7, -1, -1)])
    for _ in phrases:
        mixer.byte(lambda _: next(bits))
    return mixer


def unmix(coded: bytes, size: int) -> bytes:
    """The ``size`` bytes of a short form."""
    mixer, rest = informed().copy(), iter(coded[4:])
    span, at = 1 << 32, int.from_bytes(coded[:4].ljust(4, b"\0"))

    def code(p: int) -> int:
        nonlocal span, at
        part = (span >> 16) * p
        bit = int(at < part)
        at, span = (at, part) if bit else (at - part, span - part)
        while span < 1 << 24:
            at, span = at << 8 | next(rest, 0), span << 8
        return bit

    start = len(mixer.read)
    for _ in range(size):
        mixer.byte(code)
    return mixer.read[start:]


# Streams


class Stream:
    """One stream of a file: tensors of one type, and the planes that they are coded in."""

    def __init__(self, file: Fields, version: int, memory: dict, group: list[tuple]) -> None:
        self.file, self.version, self.memory = file, version, memory
        self.parts = [tensor[1] for tensor in group]
        self.type, self.bits = group[0][2], BITS[group[0][2]]
        self.dims = group[0][3] if len(group) == 1 else ()
        self.width = max(1, self.bits // 8)

    def read(self) -> bytes:
        size, view = sum(self.parts), self.file.byte()
        views = [None, self.integers, self.words, self.codebook, self.sparse, self.relative]
        views += [self.masked, self.grid]
        return self.plane(size).tobytes() if not view else views[view]().tobytes()

    def plane(self, number: int, kind: str = "", *, shaped: bool = False) -> np.ndarray:
        """The next plane, of ``number`` symbols."""
        if self.version == 1:
            coder, size = self.file.byte(), self.file.number()
        else:
            head = self.file.number()
            coder, size = head & 7, head >> 3
        payload = self.file.take(size)
        if coder == 4:
            shape = self.shape(number) if shaped else (number, 1, 1)
            return arithmetic(payload, shape, kind, self.memory)
        if coder == 3:
            return huffman(payload, number)
        payload = unlzma(payload) if coder == 2 else payload
        return np.frombuffer(payload * (number if coder == 1 else 1), np.uint8)

    def shape(self, number: int) -> tuple[int, int, int]:
        dims = list(self.dims)
        while len(dims) > 1 and dims[0] == 1:
            del dims[0]
        if not dims or math.prod(dims) != number:
            return number, 1, 1
        return dims[0], math.prod(dims[1:2]), math.prod(dims[2:])

    def integers(self) -> np.ndarray:
        return self.packed(self.plane(self.elements, "integers", shaped=True))

    @property
    def elements(self) -> int:
        return sum(self.parts) * 8 // self.bits

    def packed(self, symbols: np.ndarray) -> np.ndarray:
        turned = symbols ^ np.uint8(1 << self.bits - 1 if self.type in SIGNED else 0)
        parts = turned.reshape(-1, 8 // self.bits) << np.arange(0, 8, self.bits)
        return parts.sum(axis=1).astype(np.uint8)

    def words(self, number: int | None = None) -> np.ndarray:
        name, shaped = NAMES[self.type], number is None
        number = self.elements if number is None else number
        planes = [self.plane(number, f"{name}/{i}", shaped=shaped) for i in range(self.width)]
        words = np.stack(planes, axis=1).view(f"<u{self.width}").ravel()
        one, top = words.dtype.type(1), words.dtype.type(self.bits - 1)
        return words >> one | words << top

    def codebook(self) -> np.ndarray:
        table = self.plane(int(self.plane(1)[0] + 1) * self.width).view(f"<u{self.width}")
        return table[self.plane(self.elements, "integers", shaped=True)]

    def sparse(self) -> np.ndarray:
        there = self.plane(self.elements, "mask", shaped=True) > 0
        words = np.zeros(self.elements, f"<u{self.width}")
        words[there] = self.words(there.sum())
        return words

    def relative(self) -> np.ndarray:
        head = self.plane(5).tobytes()
        number = int.from_bytes(head[1:], "little")
        symbols = np.full(self.elements, head[0], np.uint8)
        at = np.cumsum(self.plane(number, "gaps"), dtype=int)
        symbols[at] = self.plane(number, "nonzero")
        return self.packed(symbols)

    def masked(self) -> np.ndarray:
        symbols = self.plane(1).repeat(self.elements)
        there = self.plane(self.elements, "mask", shaped=True) > 0
        symbols[there] = self.plane(there.sum(), "nonzero")
        return self.packed(symbols)

    def grid(self) -> np.ndarray:
        exponents = self.plane(len(self.parts), "powers").astype(int)
        exponents = exponents.repeat([part // self.width for part in self.parts])
        there = exponents > 0
        integers = self.plane(there.sum(), "on grid", shaped=True).astype(float) - 128
        words = np.zeros(self.elements, f"<u{self.width}")
        values = integers * 2.0 ** (exponents[there] - 128)
        words[there] = values.astype(f"<f{self.width}").view(words.dtype)
        words[~there] = self.words((~there).sum())
        return words


def huffman(payload: bytes, number: int) -> np.ndarray:
    low, high, centre = payload[:3]
    tokens, end = int.from_bytes(payload[3:7], "little"), 7 + (high - low + 4) // 2
    lengths = [nibble for byte in payload[7:end] for nibble in (byte & 15, byte >> 4)]
    codes, code, names = {}, 0, [*range(low, high + 1), "A", "B"]
    for length in range(1, 16):
        for name, own in zip(names, lengths, strict=False):
            if own == length:
                codes[length, code] = name
                code += 1
        code *= 2
    bits = iter(np.unpackbits(np.frombuffer(payload[end:], np.uint8)).tolist())
    symbols: list[int] = []
    place = 1
    for _ in range(tokens):
        key = 0, 0
        while key not in codes:
            key = key[0] + 1, 2 * key[1] + next(bits)
        if codes[key] in ("A", "B"):
            symbols += [centre] * (place * (1 + (codes[key] == "B")))
            place *= 2
        else:
            symbols.append(codes[key])
            place = 1
    assert len(symbols) == number
    return np.array(symbols, np.uint8)


# Arithmetic

THRESHOLDS = (262, 274, 286, 298, 312, 325, 340, 355, 370, 387, 404, 422, 440, 460, 480, 502)
EDGES = (0.04, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0)
CENTRES = (0, 0.07, 0.15, 0.25, 0.38, 0.55, 0.85, 1.2)
EVERY = range(-255, 256)


def logarithm(x: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(x)
    within = np.searchsorted(THRESHOLDS, np.floor(512 * mantissa), side="right")
    return 16 * exponent + within


def ratio(total: np.ndarray, number: np.ndarray, mean: np.ndarray, weight: int) -> np.ndarray:
    return (total + weight * mean) / ((number + weight) * mean)


def magnitude(context: int) -> float:
    halves = context // 8 % 32 - 14
    return 2.0 ** (halves // 2) * (math.sqrt(2) if halves % 2 else 1)


def prior(context: int, numbers: np.ndarray) -> np.ndarray:
    s = magnitude(context)
    r = (math.sqrt(1 + s * s) - 1) / s
    powers = np.array([*accumulate([1.0] + [r] * 510, lambda a, b: a * b)])
    counts = (powers * (1 - r) / (1 + r) * 768).astype(int)
    return counts[np.minimum(abs(numbers - round(CENTRES[context % 8] * s)), 510)]


def on_grid(one: int, low: int, high: int) -> np.ndarray:
    numbers = np.arange(low, high + 1)
    parity = (abs(numbers) + 1) // 2 % 2
    return numbers[(parity == one % 2) & ((numbers % 2 == one // 2) | (numbers == 0))]


class Estimates:
    """Steps 1 to 3 and 6 of one plane of values."""

    def __init__(self, shape: tuple, low: int, high: int, *, smooth=False, sparse=False) -> None:
        self.rows, self.channels, self.positions = shape
        self.low, self.high, self.smooth = low, high, smooth
        self.power = 6 if sparse else 3
        self.all = np.array([128.0, 4.0])
        self.column = np.zeros((2, self.channels * self.positions))
        self.channel = np.zeros((2, self.channels))
        self.moments = np.zeros((self.positions, self.positions))
        self.values = np.zeros((self.positions, 0))
        self.mirrored = self.positions > 1 and not smooth and low < 0 < high

    def range(self) -> np.ndarray:
        low, high = self.low, self.high
        if self.smooth and self.positions > 1:
            low, high = low - high, high - low
        if self.mirrored:
            low, high = min(low, -high), max(high, -low)
        return np.arange(low, high + 1)

    def start(self, rows: int) -> None:
        self.moments += self.values @ self.values.T
        self.values = np.zeros((self.positions, rows * self.channels))
        self.row, self.kernel = np.zeros((2, rows)), np.zeros((2, rows, self.channels))

    def expected(self, p: int) -> np.ndarray:
        if self.positions == 1 or not self.moments[p, p]:
            return np.zeros(1, int)
        side = math.isqrt(self.positions)
        side = side if side * side == self.positions else self.positions
        apart = {q: (p // side - q // side) ** 2 + (p % side - q % side) ** 2 for q in range(p)}
        near = sorted(apart, key=lambda q: (apart[q], q))[:8]
        matrix = [[float(self.moments[i, j]) for j in near] for i in near]
        for i in range(len(near)):
            matrix[i][i] += float(self.moments[p, p]) / 1024
        weights = solve(matrix, [float(self.moments[i, p]) for i in near])
        units = [round(64 * min(max(weight, -32), 32)) for weight in weights]
        sums = sum(unit * self.values[q] for q, unit in zip(near, units, strict=True))
        return np.zeros(1, int) + np.asarray(sums).astype(int)

    def of(self, columns: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Contexts, signs, offsets and expected values of a block."""
        rows, width = self.row.shape[1], len(range(*columns.indices(self.column.shape[1])))
        mean = self.all[0] / self.all[1]
        total = 8 * logarithm(mean / 64) + 7 * logarithm(ratio(*self.row, mean, 4))[:, None]
        if self.positions == 1:
            total = total + 6 * logarithm(ratio(*self.column[:, columns], mean, 4))
        else:
            channel = ratio(*self.channel, mean, 4)
            column = ratio(*self.column[:, columns], mean * channel, 4)
            total = total + 6 * logarithm(channel) + self.power * logarithm(column)
            total = total + 4 * logarithm(ratio(*self.kernel, mean, 2))
        contexts = 8 * np.clip((total + 32 >> 6) + 14, 0, 31)
        e = np.broadcast_to(self.expected(columns.start), (rows * width,)).reshape(rows, width)
        signs, offsets = np.ones_like(e), np.zeros_like(e)
        if self.positions > 1 and self.smooth:
            offsets = np.clip((e + 32) // 64, self.low, self.high)
        elif self.positions > 1:
            signs = np.where(self.mirrored & (e < 0), -1, 1)
            sizes = np.array([magnitude(8 * one) for one in range(32)])[contexts // 8]
            contexts = contexts + sum(edge * sizes * 64 < abs(e) for edge in EDGES)
        return contexts, signs, offsets, e

    def learn(self, columns: slice, values: np.ndarray, e: np.ndarray, some: np.ndarray) -> None:
        found = np.stack([abs(64 * values - e) * some, some])
        self.all += found.sum(axis=(1, 2))
        self.row += found.sum(axis=2)
        self.column[:, columns] += found.sum(axis=1)
        if self.positions > 1:
            self.channel += found.sum(axis=1)
            self.kernel += found
            self.values[columns.start] = values.ravel()


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    size = range(len(right))
    for k in size:
        if matrix[k][k] <= 0:
            return [0.0 for _ in size]
        for i in size[k + 1 :]:
            factor = matrix[i][k] / matrix[k][k]
            for j in size[k:]:
                matrix[i][j] -= factor * matrix[k][j]
            right[i] -= factor * right[k]
    for i in reversed(size):
        for j in size[i + 1 :]:
            right[i] -= matrix[i][j] * right[j]
        right[i] /= matrix[i][i]
    return right


class RangeDecoder:
    """Step 5."""

    def __init__(self, words: bytes) -> None:
        self.rest = words + bytes(-len(words) % 4)
        self.range, self.point = (1 << 64) - 1, 0
        self.word(), self.word()

    def word(self) -> None:
        self.point = self.point << 32 | int.from_bytes(self.rest[:4].ljust(4, b"\0"))
        self.rest = self.rest[4:]

    def table(self, counts: np.ndarray) -> list[int]:
        before = np.cumsum(np.r_[0, counts])
        scale = ((1 << 24) - len(counts)) / float(before[-1])
        return [*(int(one * scale) + i for i, one in enumerate(before[:-1].tolist())), 1 << 24]

    def decode(self, table: list[int]) -> int:
        unit = self.range >> 24
        index = bisect_right(table, self.point // unit) - 1
        self.point -= unit * table[index]
        self.range = unit * (table[index + 1] - table[index])
        if self.range < 1 << 32:
            self.range <<= 32
            self.word()
        return index


class Coder:
    """Steps 4 and 5, and the histograms of one plane."""

    def __init__(self, words: bytes, sets: list[np.ndarray], form: int, inherited: dict) -> None:
        self.range, self.sets, self.form, self.inherited = (
            RangeDecoder(words),
            sets,
            form,
            inherited,
        )
        self.counts: dict[int, np.ndarray] = {}
        self.seen: dict[int, int] = defaultdict(int)

    def begin(self, context: int) -> np.ndarray:
        one, numbers = context // 256, self.sets[context // 256]
        if one == 4:
            parts = [[on_grid(g + p, -255, 255) for g in (0, 2)] for p in (0, 1)]
            counts = np.array([sum(prior(context, g).sum() for g in part) for part in parts])
        else:
            counts = prior(context, numbers)
        if several := len(self.sets) > 1:
            counts = counts * 96 // max(counts.sum(), 1)
        counts = counts + [self.inherited.get((context, number), 0) for number in numbers.tolist()]
        if (total := counts.sum()) > (most := 1536 if several else 3072):
            counts = counts * most // total
        return counts + 1

    def learn(self, context: int, found: list[int]) -> None:
        counts = self.counts[context]
        seen, size = np.bincount(found, minlength=len(counts)), len(counts)
        if self.form == 1 and size > 2 and self.seen[context] < 4 * size:
            reach = min(15, int(magnitude(context) / 4), (size - 1) // 2)
            seen = np.convolve(seen, np.ones(2 * reach + 1, int))[reach : reach + size]
            counts += seen * (32 // (2 * reach + 1))
        else:
            counts += 32 * seen
        self.seen[context] += len(found)

    def block(self, contexts: np.ndarray) -> np.ndarray:
        """The numbers in these ``contexts``, which are flat."""
        out = np.zeros(contexts.shape, int)
        for context in np.unique(contexts).tolist():
            numbers = self.sets[context // 256]
            at = np.flatnonzero(contexts == context)
            if len(numbers) == 1:
                out[at] = numbers
                continue
            if context not in self.counts:
                self.counts[context] = self.begin(context)
            while len(at):
                piece, at = np.split(at, [max(32, self.seen[context] // 4)])
                table = self.range.table(self.counts[context])
                found = [self.range.decode(table) for _ in piece]
                out[piece] = numbers[found]
                self.learn(context, found)
        return out

    def left(self) -> dict:
        left = dict(self.inherited)
        for context, counts in self.counts.items():
            numbers = self.sets[context // 256].tolist()
            left |= {(context, x): n for x, n in zip(numbers, counts.tolist(), strict=True)}
        return left


def arithmetic(payload: bytes, shape: tuple[int, int, int], kind: str, memory: dict) -> np.ndarray:
    low, high, centre, form = payload[:4]
    rows, channels, positions = shape
    if form >= 4:
        form, channels, positions = form - 4, channels // 8, 8
    if positions > 64:
        channels, positions = channels * positions, 1
    shape, low, high = (rows, channels, positions), low - centre, high - centre
    values = Estimates(shape, low, high, smooth=form == 1, sparse=form == 3)
    flags = Estimates(shape, 0, 1, sparse=True)
    numbers = values.range()
    sets = [numbers]
    if form == 2:
        sets = [*(on_grid(one, numbers[0], numbers[-1]) for one in range(4)), np.arange(2)]
    elif form == 3:
        sets = [numbers[numbers != 0], np.arange(2)]
    coder = Coder(payload[4:], sets, form, memory.get((kind, form), {}))
    plane = np.zeros((rows, channels * positions), int)
    for start, stop, first, phases in blocks(shape):
        if first == 0:
            values.start(stop - start), flags.start(stop - start)
            grids = Grids(stop - start)
        columns = slice(first, plane.shape[1], phases)
        block = plane[start:stop, columns]
        if form == 3:
            contexts, _, _, e = flags.of(columns)
            there = coder.block(contexts.ravel() + 256).reshape(block.shape)
            flags.learn(columns, there, e, np.ones_like(there))
            contexts, signs, _, e = values.of(columns)
            kept = there > 0
            block[kept] = coder.block(contexts[kept]) * signs[kept]
            values.learn(columns, block, e, there)
            continue
        contexts, signs, offsets, e = values.of(columns)
        if form == 2:
            odd = coder.block(contexts.ravel() + 1024).reshape(block.shape)
            contexts = contexts + 256 * (2 * grids.follow(odd) + odd)
        block[:] = coder.block(contexts.ravel()).reshape(block.shape) * signs + offsets
        values.learn(columns, block, e, np.ones_like(block))
    memory[kind, form] = coder.left()
    return (plane + centre).astype(np.uint8).ravel()


class Grids:
    """The grids of dependent planes, along the rows of a group."""

    def __init__(self, rows: int) -> None:
        self.grids, self.parities = ([np.zeros(rows, int)] * 3 for _ in range(2))

    def follow(self, parities: np.ndarray) -> np.ndarray:
        for odd in parities.T:
            self.grids.append(self.grids[-1] ^ self.grids[-3] ^ self.parities[-2])
            self.parities.append(odd)
        return np.stack(self.grids[-parities.shape[1] :], axis=1)


def blocks(shape: tuple[int, int, int]) -> Iterator[tuple[int, int, int, int]]:
    """First and last row, phase and number of phases of each block."""
    rows, channels, positions = shape
    phases = positions
    if positions == 1:
        phases = max(1, min(8, channels // 4), -(-channels // 2**18))
    width = -(-channels * positions // phases)
    least = group = -(-256 // width)
    most, start = max(least, min(rows // 8, 2**18 // width)), 0
    while start < rows:
        stop = min(rows, start + group)
        yield from ((start, stop, first, phases) for first in range(phases))
        start, group = stop, min(max(group + 1, 8 * group // 5), most)
