"""Adaptive arithmetic coding of a plane of byte symbols, through constriction's range coder.

Each context (see ``contexts``) has its own adaptive histogram, which starts from a Laplace
distribution or from the histogram that earlier tensors left. Symbols of one context in one block
are coded with one call, which is what makes it fast.

Planes of dependent quantization (see ``trellis``) are coded in two steps a block: first whether the
values' indices are odd, which says what grid each value lies on, then the values, by histograms of
what is on that grid and has that parity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import constriction
import numpy as np

from penjing.container import trellis
from penjing.container.contexts import (
    BLOCK,
    CLASSES,
    LEVEL_CENTRES,
    LEVELS,
    Contexts,
    Shape,
    Values,
    class_magnitude,
    coding_order,
)
from penjing.container.damage import DamageError
from penjing.container.trellis import Path

RangeEncoder = constriction.stream.queue.RangeEncoder
RangeDecoder = constriction.stream.queue.RangeDecoder
Categorical = constriction.stream.model.Categorical

REACH = 255
"""Largest distance between a symbol and its plane's centre."""
HEAD = 4
"""Bytes before the words: low, high, centre, form."""
UNEVEN, SMOOTH, DEPENDENT, SPARSE = range(4)
"""Forms of a plane: few or uneven values, finely rounded numbers, dependent quantization, and few values
among zeros that are of another size than so many zeros would let expect."""
EIGHTS = 4
"""Added to the form of a matrix of which each eight columns count as the positions of a kernel."""
_SEEN = 32
"""Increment of a count for one coded symbol; an unseen symbol keeps a count of at least 1."""
_PRIOR = 24 * _SEEN
_INHERITED = 96 * _SEEN
_PRIOR_OF_SET, _INHERITED_OF_SET = 3 * _SEEN, 48 * _SEEN
"""``_PRIOR`` and ``_INHERITED`` of planes with several sets of contexts: they have more to learn."""
_FIRST_PIECE = 32
_OF_SET = CLASSES * LEVELS
"""Contexts of one set of numbers that may be coded."""
_LOOK = 1 << 16
"""Symbols that are looked at together for whether they follow the trellis."""
_SAMPLE = 1 << 20
"""Symbols of a plane by which it is decided how to see it; smaller planes are seen in all ways."""
_SPREAD = 4
"""Symbols for each distance that a smooth histogram has seen when it stops to spread them."""


Left = dict[int, np.ndarray]
"""int64 counts [511] by distance from the plane's centre, of each context that occurred."""
Memory = dict[tuple[str, int], Left]
"""The counts that planes left for later ones, by kind and form."""
Code = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Codes values, by numbers that they may be and their histogram, and gives the values' indices among
these numbers; a decoder knows only how many values they are."""


def encode(
    symbols: np.ndarray, shape: Shape, centre: int, kind: str, memory: Memory
) -> tuple[bytes, Memory]:
    """Code ``symbols`` (uint8, at least two different ones, in ``shape``).

    ``centre`` is the symbol that means zero; ``memory`` is what planes before this one left.
    Returns the code, and what this plane leaves for later ones of its ``kind``.
    """
    low, high = int(symbols.min()), int(symbols.max())
    distances = symbols.astype(np.int16) - np.int16(centre)
    form = SMOOTH if _looks_smooth(symbols) else UNEVEN
    if _looks_dependent(distances, shape):
        form = DEPENDENT
    values = Values(low - centre, high - centre, smooth=form == SMOOTH)
    forms = [form, SPARSE] if form == UNEVEN and _looks_sparse(distances, values) else [form]
    shapes = {added: one for added, one in ((0, shape), (EIGHTS, eights(shape))) if one}
    ways = [(one, added) for one in forms for added in shapes]

    def coded(way: tuple[int, int], rows: int) -> tuple[bytes, Left]:
        one, added = way
        _, channels, positions = shapes[added]
        part = distances[: rows * channels * positions]
        inherited = memory.get((kind, one), {})
        return _encode(part, (rows, channels, positions), values, one, inherited)

    if len(ways) > 1 and len(symbols) > _SAMPLE:
        some = max(1, _SAMPLE * shape[0] // len(symbols))
        ways = [min(ways, key=lambda way: len(coded(way, some)[0]))]
    found = {way: coded(way, shape[0]) for way in ways}
    best = min(found, key=lambda way: len(found[way][0]))
    code, left = found[best]
    return bytes((low, high, centre, sum(best))) + code, {(kind, best[0]): left}


def eights(shape: Shape) -> Shape | None:
    """The shape of a matrix of which each eight columns are a kernel; None where it cannot be. It has
    the same order."""
    rows, columns, positions = shape
    possible = positions == 1 and columns % 8 == 0 and 4 * 8 <= columns <= 8 * BLOCK
    return (rows, columns // 8, 8) if possible else None


def form_of(data: bytes | memoryview) -> int:
    """The form of the plane that ``data`` code, which says whose histograms it inherits."""
    return data[3] % EIGHTS


def decode(data: bytes, shape: Shape, kind: str, memory: Memory) -> tuple[np.ndarray, Memory]:
    """The uint8 symbols that ``encode`` coded, and what their plane leaves.

    Raises:
        DamageError: ``data`` cannot be the output of ``encode``.
    """
    no_range = len(data) < HEAD or not data[0] <= data[2] <= data[1] or data[0] == data[1]
    if no_range or 0 in shape:
        raise DamageError("an arithmetic-coded plane has no valid range of symbols")
    low, high, centre, form = data[:HEAD]
    if form >= EIGHTS and (other := eights(shape)):
        shape, form = other, form - EIGHTS
    if form > SPARSE:
        raise DamageError(f"an arithmetic-coded plane has the wrong form {data[3]}")
    values = Values(low - centre, high - centre, smooth=form == SMOOTH)
    words = np.frombuffer(data[HEAD:] + bytes(-len(data) % 4), ">u4").astype(np.uint32)
    decoder = RangeDecoder(words)

    def code(found: np.ndarray, _numbers: np.ndarray, histogram: np.ndarray) -> np.ndarray:
        return decoder.decode(Categorical(histogram, perfect=False), len(found))

    distances = np.zeros(shape[0] * shape[1] * shape[2], np.int16)
    try:
        left = _code(distances, shape, values, form, memory.get((kind, form), {}), code)
    except AssertionError as error:  # how constriction reports bits that no symbol has
        raise DamageError("an arithmetic-coded plane holds an invalid code") from error
    return (distances + centre).astype(np.uint8), {(kind, form): left}


def _encode(
    distances: np.ndarray, shape: Shape, values: Values, form: int, inherited: Left
) -> tuple[bytes, Left]:
    """The words, and the counts that are left."""
    encoder = RangeEncoder()

    def code(found: np.ndarray, numbers: np.ndarray, histogram: np.ndarray) -> np.ndarray:
        indices = numbers.searchsorted(found).astype(np.int32)
        encoder.encode(indices, Categorical(histogram, perfect=False))
        return indices

    left = _code(distances, shape, values, form, inherited, code)
    return _sealed(encoder), left


def _sealed(encoder: Any) -> bytes:
    """The shortest bytes that, with zeros behind them, decode to what was encoded."""
    place, (low, width) = encoder.pos()
    # The decoder's point has 64 bits; constriction ends with one word that is anywhere in the range.
    words = encoder.get_compressed().astype(">u4").tobytes().ljust(4 * place + 8, b"\0")
    point = int.from_bytes(words, "big")
    low = point - (point - low) % (1 << 64)
    return shortest(low, width).to_bytes(len(words), "big").rstrip(b"\0")


def shortest(low: int, width: int) -> int:
    """The number in ``[low, low + width)`` that ends in the most bytes of zeros."""
    zeros = 0
    while (longer := -(-low >> zeros + 8) << zeros + 8) < low + width and longer:
        zeros += 8
    return -(-low >> zeros) << zeros


def _looks_smooth(symbols: np.ndarray) -> bool:
    """Tell whether ``symbols`` look finely rounded: many, most of their range, none frequent."""
    counts = np.bincount(symbols)
    used = np.flatnonzero(counts)
    fine = len(used) >= 64 and 2 * len(used) > used[-1] - used[0]
    return bool(fine and counts.max() < 0.15 * len(symbols))


def _looks_sparse(distances: np.ndarray, values: Values) -> bool:
    """Tell whether most ``distances`` are zero, and the others may be of several sizes."""
    several = values.high - values.low > 1
    return several and 2 * int(np.count_nonzero(distances)) < len(distances)


def _looks_dependent(distances: np.ndarray, shape: Shape) -> bool:
    """Tell whether all ``distances`` follow the trellis along their rows, and one is odd."""
    plane, order = distances.reshape(shape[0], -1), coding_order(shape)
    # In parts: nearly every plane that does not follow it is left at the first.
    rows = max(1, _LOOK // len(order))
    parts = (plane[start : start + rows, order] for start in range(0, shape[0], rows))
    return bool((plane & 1).any()) and all(map(trellis.obeyed, parts))


def _code(
    distances: np.ndarray, shape: Shape, values: Values, form: int, inherited: Left, code: Code
) -> Left:
    """Code the ``distances`` from the centre block by block, in place.

    Encoder and decoder take the same steps. Returns the counts that are left.
    """
    if form == SPARSE:
        return _code_sparse(distances, shape, values, inherited, code)
    contexts = Contexts(shape, values)
    sets = _sets(contexts, form)
    histograms = _Histograms(sets, values.smooth, inherited)
    plane = distances.reshape(contexts.rows, -1)
    path, begun = trellis.Path(0), -1
    for rows, columns in contexts.blocks():
        block = contexts.of(columns)
        found = plane[rows, columns].astype(np.int32)
        differences = (found - block.offsets) * block.signs
        if form == DEPENDENT:
            if rows.start > begun:
                path, begun = trellis.Path(len(found)), rows.start
            coded = _code_dependent(differences, block.contexts, histograms, path, code)
        else:
            coded = _code_block(differences, block.contexts, histograms, code)
        found = coded * block.signs + block.offsets
        plane[rows, columns] = found
        contexts.learn(columns, found, block)
    return histograms.left()


def _code_sparse(
    distances: np.ndarray, shape: Shape, values: Values, inherited: Left, code: Code
) -> Left:
    """Code a sparse plane in two steps a block: flags of what is not zero, then these values.

    Magnitudes of values are estimated from those that are not zero. Returns the counts that are left.
    """
    flags = Contexts(shape, Values(0, 1, smooth=False), sparse=True)
    numbers = Contexts(shape, values, sparse=True)
    histograms = _Histograms(_sets(numbers, SPARSE), False, inherited)
    plane = distances.reshape(numbers.rows, -1)
    for (rows, columns), _ in zip(flags.blocks(), numbers.blocks(), strict=True):
        block = flags.of(columns)
        found = plane[rows, columns].astype(np.int32)
        there = (found != 0).astype(np.int32)
        there = _code_block(there, block.contexts + np.uint16(_OF_SET), histograms, code)
        flags.learn(columns, there, block)
        some = np.flatnonzero(there)
        block = numbers.of(columns, some)
        coded = _code_block(found.ravel()[some] * block.signs, block.contexts, histograms, code)
        found = np.zeros_like(found)
        found.ravel()[some] = coded * block.signs
        plane[rows, columns] = found
        numbers.learn(columns, found, block, some)
    return histograms.left()


def _sets(contexts: Contexts, form: int) -> list[np.ndarray]:
    """The numbers that may be coded, in rising order, for each set of contexts."""
    low, high = contexts.coded_range()
    if form == SPARSE:
        numbers = np.arange(low, high + 1)
        return [numbers[numbers != 0], np.arange(2)]
    if form != DEPENDENT:
        return [np.arange(low, high + 1)]
    return [*(trellis.values_of(one, low, high) for one in range(trellis.SETS)), np.arange(2)]


def _code_dependent(
    values: np.ndarray, contexts: np.ndarray, histograms: _Histograms, path: Path, code: Code
) -> np.ndarray:
    odd = trellis.parities(values)
    odd = _code_block(odd, contexts + np.uint16(trellis.SETS * _OF_SET), histograms, code)
    one = (2 * path.follow(odd) + odd).astype(np.uint16)
    return _code_block(values, contexts + one * np.uint16(_OF_SET), histograms, code)


def _code_block(
    values: np.ndarray, contexts: np.ndarray, histograms: _Histograms, code: Code
) -> np.ndarray:
    """Code ``values`` [rows, columns], each in its context; the order is that of the contexts."""
    flat = contexts.ravel()
    order = np.argsort(flat, kind="stable")
    sorted_values = values.ravel()[order]
    sizes, start = np.bincount(flat), 0
    for context in np.flatnonzero(sizes).tolist():
        end = start + int(sizes[context])
        _code_context(sorted_values[start:end], context, histograms, code)
        start = end
    coded = np.empty_like(sorted_values)
    coded[order] = sorted_values
    return coded.reshape(values.shape)


def _code_context(values: np.ndarray, context: int, histograms: _Histograms, code: Code) -> None:
    """Code ``values`` [number], all in one context, in place.

    Pieces grow with what the histogram has seen, so that it learns early.
    """
    numbers = histograms.numbers(context)
    if not len(numbers):
        raise DamageError("a plane leaves the range that it declares")
    if len(numbers) == 1:
        values[:] = numbers
        return
    histogram, seen, start = histograms.of(context), int(histograms.seen[context]), 0
    while start < len(values):
        piece = values[start : start + max(_FIRST_PIECE, (seen + start) // 4)]
        piece[:] = indices = code(piece, numbers, histogram)
        histograms.learn(context, indices)
        start += len(piece)
    values[:] = numbers.take(values)


class _Histograms:
    """Counts by context of the numbers that may be coded in it, for one plane."""

    def __init__(self, sets: list[np.ndarray], smooth: bool, inherited: Left) -> None:
        self.sets = sets
        self.smooth = smooth
        self.inherited = inherited
        self.counts: dict[int, np.ndarray] = {}
        self.seen = np.zeros(len(sets) * _OF_SET, np.int64)

    def numbers(self, context: int) -> np.ndarray:
        """The numbers that may be coded in ``context``."""
        return self.sets[context // _OF_SET]

    def of(self, context: int) -> np.ndarray:
        """float64 weights of the numbers, whole numbers themselves; ``learn`` changes them."""
        if context not in self.counts:
            self.counts[context] = self._start(context).astype(np.float64)
        return self.counts[context]

    def learn(self, context: int, indices: np.ndarray) -> None:
        counts, number = self.counts[context], len(indices)
        if len(counts) == 2:  # of flags and parities, bincount would be half the time
            ones = np.count_nonzero(indices)
            counts[0] += _SEEN * (number - ones)
            counts[1] += _SEEN * ones
        else:
            seen = np.bincount(indices, minlength=len(counts))
            if self.smooth and self.seen[context] < _SPREAD * len(counts):
                counts += _spread(seen, class_magnitude(context // LEVELS))
            else:
                counts += _SEEN * seen
        self.seen[context] += number

    def left(self) -> Left:
        """The counts that this plane leaves: inherited ones, replaced where it counted itself."""
        left = self.inherited.copy()
        for context, counts in self.counts.items():
            left[context] = left.get(context, _nothing()).copy()
            left[context][self.numbers(context) + REACH] = counts
        return left

    def _start(self, context: int) -> np.ndarray:
        one, within = divmod(context, _OF_SET)
        numbers = self.numbers(context)
        inherited = self.inherited.get(context, _nothing())[numbers + REACH]
        law = _of_parities(within) if one == trellis.SETS else _laplace(within, numbers)
        most = _INHERITED
        if len(self.sets) > 1:
            law, most = law * _PRIOR_OF_SET // max(int(law.sum()), 1), _INHERITED_OF_SET
        counts = law + inherited
        total = int(counts.sum())
        if total > most:
            counts = counts * most // total
        return counts + 1


@functools.cache
def _nothing() -> np.ndarray:
    return np.zeros(2 * REACH + 1, np.int64)


def _spread(seen: np.ndarray, magnitude: float) -> np.ndarray:
    """Counts to add for ``seen``, spread evenly over a quarter of ``magnitude`` each way."""
    reach = min(15, int(magnitude / 4), (len(seen) - 1) // 2)
    width = 2 * reach + 1
    sums = np.cumsum(np.pad(seen, (reach + 1, reach)))
    return (sums[width:] - sums[:-width]) * (_SEEN // width)


def _of_parities(context: int) -> np.ndarray:
    """Prior counts, as of ``_laplace``, of even and of odd indices on either grid."""
    counts = np.zeros(2, np.int64)
    for one in range(trellis.SETS):
        counts[one % 2] += _laplace(context, trellis.values_of(one, -REACH, REACH)).sum()
    return counts


def _laplace(context: int, distances: np.ndarray) -> np.ndarray:
    """Counts, about _PRIOR in all, of the geometric law on both sides of the expected value."""
    of_class, level = divmod(context, LEVELS)
    expected = round(LEVEL_CENTRES[level] * class_magnitude(of_class))
    return _geometric(of_class)[np.minimum(np.abs(distances - expected), 2 * REACH)]


@functools.cache
def _geometric(of_class: int) -> np.ndarray:
    mean = class_magnitude(of_class)
    ratio = ((1 + mean * mean) ** 0.5 - 1) / mean
    powers = np.multiply.accumulate(np.r_[1.0, np.full(2 * REACH, ratio)])
    return (powers * (1 - ratio) / (1 + ratio) * _PRIOR).astype(np.int64)
