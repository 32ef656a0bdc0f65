"""How the bytes of a tensor become planes of byte symbols that an entropy coder can model.

Each *view* is three functions: ``split`` gives the planes, or None where the view does not suit the
tensor; ``join`` asks for the planes in the same order and gives the bytes back; ``kinds`` names the
planes in that order, before any of them is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from penjing.container.contexts import Shape
from penjing.container.damage import DamageError


@dataclass(frozen=True)
class ElementType:
    """An ONNX element type: its name and bits, and whether its integers have a sign."""

    name: str
    bits: int
    signed: bool = False


_MOST_DIMS = 16
_UNKNOWN = ElementType("bytes", 8)
_TYPES = {
    1: ElementType("float32", 32),
    2: ElementType("uint8", 8),
    3: ElementType("int8", 8, signed=True),
    4: ElementType("uint16", 16),
    5: ElementType("int16", 16, signed=True),
    6: ElementType("int32", 32, signed=True),
    7: ElementType("int64", 64, signed=True),
    9: ElementType("bool", 8),
    10: ElementType("float16", 16),
    11: ElementType("float64", 64),
    12: ElementType("uint32", 32),
    13: ElementType("uint64", 64),
    14: ElementType("complex64", 32),
    15: ElementType("complex128", 64),
    16: ElementType("bfloat16", 16),
    17: ElementType("float8e4m3fn", 8),
    18: ElementType("float8e4m3fnuz", 8),
    19: ElementType("float8e5m2", 8),
    20: ElementType("float8e5m2fnuz", 8),
    21: ElementType("uint4", 4),
    22: ElementType("int4", 4, signed=True),
    23: ElementType("float4e2m1", 4),
    24: ElementType("float8e8m0", 8),
    25: ElementType("uint2", 2),
    26: ElementType("int2", 2, signed=True),
}
"""By number, as in ``TensorProto.DataType``; complex numbers count as pairs of their parts."""


def element_type(data_type: int) -> ElementType:
    """The element type of ONNX's number ``data_type``; plain bytes for an unknown one."""
    return _TYPES.get(data_type, _UNKNOWN)


@dataclass(frozen=True)
class Content:
    """What a stream codes: elements of one type, shaped ``dims``.

    ``parts`` are the bytes of each tensor in it, of which there are several where small ones are joined.
    """

    type: ElementType
    dims: tuple[int, ...]
    parts: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(self.parts)

    @property
    def width(self) -> int:
        """Bytes of an element, at least 1."""
        return max(1, self.type.bits // 8)

    def shape(self, number: int) -> Shape:
        """``dims`` as rows, channels and positions, if they are ``number`` symbols."""
        dims = list(self.dims[:_MOST_DIMS])
        while len(dims) > 1 and dims[0] == 1:
            del dims[0]
        if not dims or math.prod(dims) != number:
            return _flat(number)
        return dims[0], math.prod(dims[1:2]), math.prod(dims[2:])


WHOLE = "whole"
"""The kind of a plane of bytes without a model: stored or compressed by LZMA."""


@dataclass(frozen=True)
class Plane:
    """uint8 symbols in ``shape``, of which ``centre`` means zero."""

    symbols: np.ndarray
    shape: Shape
    centre: int


Read = Callable[[Shape], np.ndarray]
"""Gives the next plane's symbols (flat uint8) for its shape."""


@dataclass(frozen=True)
class View:
    """One way to see a tensor as planes; those of one kind in a file share what was learned."""

    name: str
    kinds: Callable[[Content], list[str]]
    split: Callable[[np.ndarray, Content], list[Plane] | None]
    join: Callable[[Content, Read], np.ndarray]
    coder: str | None = None
    """The only entropy coder that it is tried with; None for any."""


def _flat(number: int) -> Shape:
    return number, 1, 1


def _whole(data: np.ndarray) -> Plane:
    return Plane(data, _flat(len(data)), 0)


def _mode(symbols: np.ndarray) -> int:
    return int(np.bincount(symbols, minlength=1).argmax())


def entropy(symbols: np.ndarray) -> float:
    """Of the uint8 ``symbols``, in bits a symbol: what codes of each one by itself take at least."""
    counts = np.bincount(symbols)
    shares = counts[counts > 0] / len(symbols)
    return float(-(shares * np.log2(shares)).sum())


# Whole bytes as they are.


def _kinds_of_raw(content: Content) -> list[str]:
    return [WHOLE]


def _split_raw(raw: np.ndarray, content: Content) -> list[Plane]:
    return [_whole(raw)]


def _join_raw(content: Content, read: Read) -> np.ndarray:
    return read(_flat(content.size))


# Integers of at most 8 bits, one a symbol, in the order of their values.


def _kinds_of_integers(content: Content) -> list[str]:
    return ["integers"]


def _split_integers(raw: np.ndarray, content: Content) -> list[Plane] | None:
    if content.type.bits > 8:
        return None
    symbols = _to_symbols(raw, content)
    shape = content.shape(len(symbols))
    return [Plane(symbols, shape, _integer_centre(symbols, content))]


def _join_integers(content: Content, read: Read) -> np.ndarray:
    number = _count(content)
    return _from_symbols(read(content.shape(number)), content)


def _count(content: Content) -> int:
    if content.type.bits > 8:
        raise _wrong_type()
    return content.size * (8 // content.type.bits)


def _to_symbols(raw: np.ndarray, content: Content) -> np.ndarray:
    bits = content.type.bits
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    symbols = ((raw[:, None] >> shifts) & (2**bits - 1)).astype(np.uint8).ravel()
    return symbols ^ _sign(content)


def _from_symbols(symbols: np.ndarray, content: Content) -> np.ndarray:
    shifts = np.arange(0, 8, content.type.bits, dtype=np.uint8)
    parts = (symbols ^ _sign(content)).reshape(-1, len(shifts)) << shifts
    return np.bitwise_or.reduce(parts, axis=1).astype(np.uint8)


def _sign(content: Content) -> np.uint8:
    """The bit to turn over so that two's complement sorts by value."""
    return np.uint8(1 << (content.type.bits - 1) if content.type.signed else 0)


def _integer_centre(symbols: np.ndarray, content: Content) -> int:
    sign = int(_sign(content))
    return sign if sign and symbols.min() <= sign <= symbols.max() else _mode(symbols)


# Wider elements as one plane a byte. The sign is rotated to the low end, so that in floats of 32
# bits and bfloat16 the exponent is a plane of its own.


def _words(raw: np.ndarray, content: Content) -> np.ndarray | None:
    if content.width == 1 or len(raw) % content.width:
        return None
    return raw.view(f"<u{content.width}")


def _to_planes(words: np.ndarray, content: Content, shape: Shape) -> list[Plane]:
    bits = words.dtype.type(content.type.bits - 1)
    rotated = (words << words.dtype.type(1)) | (words >> bits)
    columns = rotated.astype(rotated.dtype.newbyteorder("<")).view(np.uint8)
    columns = columns.reshape(-1, content.width).T
    return [Plane(plane := np.ascontiguousarray(column), shape, _mode(plane)) for column in columns]


def _from_planes(content: Content, shape: Shape, read: Read) -> np.ndarray:
    columns = [read(shape) for _ in range(content.width)]
    rotated = np.stack(columns, axis=1).view(f"<u{content.width}").ravel()
    bits = rotated.dtype.type(content.type.bits - 1)
    return (rotated >> rotated.dtype.type(1)) | (rotated << bits)


def _kinds_of_bytes(content: Content) -> list[str]:
    return [f"{content.type.name}/{index}" for index in range(content.width)]


def _split_bytes(raw: np.ndarray, content: Content) -> list[Plane] | None:
    words = _words(raw, content)
    if words is None:
        return None
    return _to_planes(words, content, content.shape(len(words)))


def _join_bytes(content: Content, read: Read) -> np.ndarray:
    number = _number(content)
    words = _from_planes(content, content.shape(number), read)
    return words.view(np.uint8)


def _number(content: Content) -> int:
    if content.width == 1 or content.size % content.width:
        raise _wrong_type()
    return content.size // content.width


def _wrong_type() -> DamageError:
    return DamageError("a tensor is coded as another element type than its own")


# Wider elements with at most 256 distinct values: a table in rising order, and indices into it.


def _kinds_of_codebook(content: Content) -> list[str]:
    return [WHOLE, WHOLE, "integers"]


def _split_codebook(raw: np.ndarray, content: Content) -> list[Plane] | None:
    words = _words(raw, content)
    if words is None or len(np.unique(words[:4096])) > 256:
        return None
    table = np.unique(words)
    if len(table) > 256:
        return None
    table = table[np.argsort(_as_numbers(table, content), kind="stable")]
    order = np.argsort(table)
    indices = order[np.searchsorted(table, words, sorter=order)].astype(np.uint8)
    plane = Plane(indices, content.shape(len(words)), _codebook_centre(table, indices))
    stored = table.view(np.uint8)
    return [_whole(np.array([len(table) - 1], np.uint8)), _whole(stored), plane]


def _join_codebook(content: Content, read: Read) -> np.ndarray:
    number = _number(content)
    distinct = int(read(_flat(1))[0]) + 1
    table = read(_flat(distinct * content.width)).view(f"<u{content.width}")
    indices = read(content.shape(number))
    if len(indices) and int(indices.max()) >= len(table):
        raise DamageError("an index is outside the table of distinct values")
    return table[indices].view(np.uint8)


def _as_numbers(words: np.ndarray, content: Content) -> np.ndarray:
    """Keys that sort bit patterns as the numbers they stand for: negative floats come reversed."""
    sign = words.dtype.type(1 << (content.type.bits - 1))
    if content.type.name.startswith("uint"):
        return words
    if content.type.signed:
        return words ^ sign
    return np.where(words & sign, ~words, words | sign)


def _codebook_centre(table: np.ndarray, indices: np.ndarray) -> int:
    zero = np.flatnonzero(table == 0)
    return int(zero[0]) if len(zero) else _mode(indices)


# Wider elements with many zeros: where they are, and the others' bytes.


def _kinds_of_sparse(content: Content) -> list[str]:
    return ["mask", *_kinds_of_bytes(content)]


def _split_sparse(raw: np.ndarray, content: Content) -> list[Plane] | None:
    words = _words(raw, content)
    if words is None or np.count_nonzero(words) > 0.95 * len(words):
        return None
    there = (words != 0).astype(np.uint8)
    mask = Plane(there, content.shape(len(words)), 0)
    others = words[there > 0]
    return [mask, *_to_planes(others, content, _flat(len(others)))]


def _join_sparse(content: Content, read: Read) -> np.ndarray:
    number = _number(content)
    there = read(content.shape(number)) > 0
    words = np.zeros(number, f"<u{content.width}")
    words[there] = _from_planes(content, _flat(int(there.sum())), read)
    return words.view(np.uint8)


# Integers of which most are zero, as Deep Compression stores them (Han et al. 2016, figure 2): each
# other one with the distance from the one before it. Where that is more than five bits can say, or
# more than a byte can if this takes fewer bits, a zero is stored as a filler.

_FARTHEST = (32, 254)


def _kinds_of_relative(content: Content) -> list[str]:
    return [WHOLE, "gaps", "nonzero"]


def _split_relative(raw: np.ndarray, content: Content) -> list[Plane] | None:
    if content.type.bits > 8 or not len(raw):
        return None
    symbols = _to_symbols(raw, content)
    centre = _integer_centre(symbols, content)
    at = np.flatnonzero(symbols != centre)
    if not 0 < len(at) < len(symbols) // 2:
        return None
    distances = np.diff(at, prepend=0)
    ways = [_entries(distances, symbols[at], centre, one) for one in _FARTHEST]
    gaps, values = min(ways, key=lambda way: len(way[0]) * sum(map(entropy, way)))
    head = np.frombuffer(bytes([centre]) + len(gaps).to_bytes(4, "little"), np.uint8)
    shape = _flat(len(gaps))
    return [_whole(head), Plane(gaps, shape, _mode(gaps)), _nonzero(values, centre)]


def _entries(
    distances: np.ndarray, others: np.ndarray, centre: int, farthest: int
) -> tuple[np.ndarray, np.ndarray]:
    """The distances and the symbols of all entries, uint8 both."""
    fillers = np.maximum(distances - 1, 0) // farthest
    ends = np.cumsum(fillers + 1) - 1
    gaps = np.full(int(ends[-1]) + 1, farthest, np.uint8)
    values = np.full(len(gaps), centre, np.uint8)
    gaps[ends], values[ends] = distances - farthest * fillers, others
    return gaps, values


def _nonzero(values: np.ndarray, centre: int) -> Plane:
    return _centred(values, _flat(len(values)), centre)


def _centred(values: np.ndarray, shape: Shape, centre: int) -> Plane:
    """Its centre is the value nearest to zero: a plane's centre lies within its range."""
    return Plane(values, shape, min(max(centre, int(values.min())), int(values.max())))


def _join_relative(content: Content, read: Read) -> np.ndarray:
    number, head = _count(content), read(_flat(5)).tobytes()
    stored = int.from_bytes(head[1:], "little")
    if stored > number:
        raise DamageError("more integers are stored than a tensor has")
    at = np.cumsum(read(_flat(stored)), dtype=np.int64)
    values = read(_flat(stored))
    if stored and (int(at[-1]) >= number or (np.diff(at) < 1).any()):
        raise DamageError("a stored integer lies outside its tensor")
    symbols = np.full(number, head[0], np.uint8)
    symbols[at] = values
    return _from_symbols(symbols, content)


# The same in two planes for a coder that knows rows and columns: where they are, and which.


def _kinds_of_masked(content: Content) -> list[str]:
    return [WHOLE, "mask", "nonzero"]


def _split_masked(raw: np.ndarray, content: Content) -> list[Plane] | None:
    if content.type.bits > 8 or not len(raw):
        return None
    symbols = _to_symbols(raw, content)
    centre = _integer_centre(symbols, content)
    there = (symbols != centre).astype(np.uint8)
    if not 0 < np.count_nonzero(there) < len(symbols) // 2:
        return None
    others = symbols[there > 0]
    mask = Plane(there, content.shape(len(symbols)), 0)
    head = np.array([centre], np.uint8)
    return [_whole(head), mask, _nonzero(others, centre)]


def _join_masked(content: Content, read: Read) -> np.ndarray:
    number = _count(content)
    symbols = np.repeat(read(_flat(1)), number)
    there = read(content.shape(number)) > 0
    symbols[there] = read(_flat(int(there.sum())))
    return _from_symbols(symbols, content)


# Floats on a grid: where all values of a tensor are multiples of a power of two, at most 127 times it,
# the power and these integers; the others' bytes.

_FLOATS = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}
_ON_GRID = 7
"""Bits of the integers, without their sign."""
_NO_GRID, _POWER_ZERO = 0, 128
"""Symbols of a tensor that lies on no grid, and of the grid 2 ** 0."""


def _kinds_of_grid(content: Content) -> list[str]:
    return ["powers", "on grid", *_kinds_of_bytes(content)]


def _split_grid(raw: np.ndarray, content: Content) -> list[Plane] | None:
    if content.type.name not in _FLOATS or not _are_whole(content):
        return None
    numbers, words = raw.view(_FLOATS[content.type.name]), raw.view(f"<u{content.width}")
    ends = np.cumsum(content.parts)[:-1] // content.width
    found = [_on_grid(part) for part in np.split(numbers, ends)]
    powers = np.array([power for power, _ in found], np.uint8)
    if not (powers != _NO_GRID).any():
        return None
    integers = np.concatenate([part for _, part in found]).astype(np.uint8)
    others = words[np.repeat(powers == _NO_GRID, _lengths(content))]
    return [
        Plane(powers, _flat(len(powers)), _mode(powers)),
        _centred(integers, content.shape(len(integers)), 1 << _ON_GRID),
        *_to_planes(others, content, _flat(len(others))),
    ]


def _on_grid(numbers: np.ndarray) -> tuple[int, np.ndarray]:
    """The symbol of the coarsest grid of ``numbers``, and those of their integers on it."""
    none = _NO_GRID, np.zeros(0, np.int64)
    wide = numbers.astype(np.float64)
    if not np.isfinite(wide).all() or (np.signbit(wide) & (wide == 0)).any():
        return none
    _, exponent = np.frexp(np.abs(wide).max())
    scaled = np.ldexp(wide, _ON_GRID - exponent)
    integers = scaled.astype(np.int64)
    if (integers != scaled).any():
        return none
    bits = int(np.bitwise_or.reduce(np.abs(integers)))
    spare = (bits & -bits).bit_length() - 1 if bits else 0
    power = _POWER_ZERO + int(exponent) - _ON_GRID + spare
    return (power, (integers >> spare) + (1 << _ON_GRID)) if 0 < power < 256 else none


def _join_grid(content: Content, read: Read) -> np.ndarray:
    if content.type.name not in _FLOATS or not _are_whole(content):
        raise _wrong_type()
    powers = np.repeat(read(_flat(len(content.parts))).astype(np.int64), _lengths(content))
    fixed = powers != _NO_GRID
    words = np.empty(len(powers), f"<u{content.width}")
    integers = read(content.shape(int(fixed.sum()))).astype(np.float64) - (1 << _ON_GRID)
    with np.errstate(over="ignore"):  # of float16, in damaged files
        numbers = np.ldexp(integers, powers[fixed] - _POWER_ZERO).astype(_FLOATS[content.type.name])
    words[fixed] = numbers.view(words.dtype)
    words[~fixed] = _from_planes(content, _flat(int((~fixed).sum())), read)
    return words.view(np.uint8)


def _are_whole(content: Content) -> bool:
    """Whether no tensor ends inside an element; joined ones may do so and still add up."""
    return not any(part % content.width for part in content.parts)


def _lengths(content: Content) -> list[int]:
    """Elements of each tensor."""
    return [part // content.width for part in content.parts]


VIEWS = (
    View("raw", _kinds_of_raw, _split_raw, _join_raw),
    View("integers", _kinds_of_integers, _split_integers, _join_integers),
    View("bytes", _kinds_of_bytes, _split_bytes, _join_bytes),
    View("codebook", _kinds_of_codebook, _split_codebook, _join_codebook),
    View("sparse", _kinds_of_sparse, _split_sparse, _join_sparse),
    View("relative", _kinds_of_relative, _split_relative, _join_relative),
    View("masked", _kinds_of_masked, _split_masked, _join_masked, coder="arithmetic"),
    View("grid", _kinds_of_grid, _split_grid, _join_grid),
)
"""In the order of their numbers in the file."""
