"""Adaptive arithmetic coding of a plane of byte symbols, through constriction's range coder.

Each context (see ``contexts``) has its own adaptive histogram, which starts from a Laplace
distribution or from the histogram that earlier tensors left. Symbols of one context in one block
are coded with one call, which is what makes it fast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import constriction
import numpy as np

from penjing.container.contexts import (
    CLASSES,
    LEVEL_CENTRES,
    LEVELS,
    Contexts,
    Shape,
    Values,
    class_magnitude,
)
from penjing.container.damage import DamageError

RangeEncoder = constriction.stream.queue.RangeEncoder
RangeDecoder = constriction.stream.queue.RangeDecoder
Categorical = constriction.stream.model.Categorical

REACH = 255
"""Largest distance between a symbol and its plane's centre."""
HEAD = 4
"""Bytes before the words: low, high, centre, smooth."""
_SEEN = 32
"""What one coded symbol adds to a count; an unseen symbol keeps a count of at least 1."""
_PRIOR = 24 * _SEEN
_INHERITED = 96 * _SEEN
_FIRST_PIECE = 32
_SMOOTH = 4
"""Symbols for each distance that a smooth histogram has seen when it stops to spread them."""


Left = dict[int, np.ndarray]
"""int64 counts [511] by distance from the plane's centre, of each context that occurred."""
Memory = dict[tuple[str, bool], Left]
"""What planes left for later ones, by their kind and smoothness."""
Code = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Codes indices by a histogram and gives them back; a decoder knows only how many they are."""


def encode(
    symbols: np.ndarray, shape: Shape, centre: int, kind: str, memory: Memory
) -> tuple[bytes, Memory]:
    """Code ``symbols`` (uint8, at least two different ones, in ``shape``).

    ``centre`` is the symbol that means zero; ``memory`` is what planes before this one left.
    Returns the code, and what this plane leaves for later ones of its ``kind``.
    """
    low, high = int(symbols.min()), int(symbols.max())
    values = Values(low - centre, high - centre, smooth=_looks_smooth(symbols))
    encoder = RangeEncoder()

    def code(indices: np.ndarray, histogram: np.ndarray) -> np.ndarray:
        encoder.encode(indices, Categorical(histogram, perfect=False))
        return indices

    distances = symbols.astype(np.int16) - np.int16(centre)
    _, left = _code(distances, shape, values, memory.get((kind, values.smooth), {}), code)
    words = encoder.get_compressed().astype(">u4").tobytes()
    head = bytes((low, high, centre, values.smooth))
    return head + words.rstrip(b"\0"), {(kind, values.smooth): left}


def is_smooth(data: bytes | memoryview) -> bool:
    """Whether the plane that ``data`` code is smooth, which says whose histograms it inherits."""
    return data[3] == 1


def decode(data: bytes, shape: Shape, kind: str, memory: Memory) -> tuple[np.ndarray, Memory]:
    """The uint8 symbols that ``encode`` coded, and what their plane leaves.

    Raises:
        DamageError: ``data`` cannot be the output of ``encode``.
    """
    if len(data) < HEAD or not data[0] <= data[2] <= data[1] or data[0] == data[1] or data[3] > 1:
        raise DamageError("an arithmetic-coded plane has no valid range of symbols")
    low, high, centre = data[:3]
    values = Values(low - centre, high - centre, smooth=is_smooth(data))
    words = np.frombuffer(data[HEAD:] + bytes(-len(data) % 4), ">u4").astype(np.uint32)
    decoder = RangeDecoder(words)

    def code(indices: np.ndarray, histogram: np.ndarray) -> np.ndarray:
        return decoder.decode(Categorical(histogram, perfect=False), len(indices))

    blank = np.zeros(shape[0] * shape[1] * shape[2], np.int16)
    try:
        distances, left = _code(blank, shape, values, memory.get((kind, values.smooth), {}), code)
    except AssertionError as error:  # how constriction reports bits that no symbol has
        raise DamageError("an arithmetic-coded plane holds an invalid code") from error
    return (distances + centre).astype(np.uint8), {(kind, values.smooth): left}


def _looks_smooth(symbols: np.ndarray) -> bool:
    """Whether they look like finely rounded numbers: many, most of the range, none frequent."""
    counts = np.bincount(symbols)
    used = np.flatnonzero(counts)
    fine = len(used) >= 64 and 2 * len(used) > used[-1] - used[0]
    return bool(fine and counts.max() < 0.15 * len(symbols))


def _code(
    distances: np.ndarray, shape: Shape, values: Values, inherited: Left, code: Code
) -> tuple[np.ndarray, Left]:
    """Code the ``distances`` from the centre block by block, in place.

    Encoder and decoder take the same steps. Returns the distances, and the counts that are left.
    """
    contexts = Contexts(shape, values)
    histograms = _Histograms(contexts, inherited)
    plane = distances.reshape(contexts.rows, -1)
    for rows, columns in contexts.blocks():
        block = contexts.of(columns)
        found = plane[rows, columns].astype(np.int32)
        differences = ((found - block.offsets) * block.signs).ravel()
        coded = _code_block(differences, block.contexts.ravel(), histograms, code)
        found = coded.reshape(found.shape) * block.signs + block.offsets
        plane[rows, columns] = found
        contexts.learn(columns, found, block)
    return distances, histograms.left()


def _code_block(
    values: np.ndarray, contexts: np.ndarray, histograms: _Histograms, code: Code
) -> np.ndarray:
    order = np.argsort(contexts, kind="stable")
    indices = values[order] - histograms.low
    for context, start, stop in _pieces(np.bincount(contexts), histograms):
        indices[start:stop] = code(indices[start:stop], histograms.of(context))
        histograms.learn(context, indices[start:stop])
    coded = np.empty_like(values)
    coded[order] = indices + histograms.low
    return coded


def _pieces(sizes: np.ndarray, histograms: _Histograms) -> Iterator[tuple[int, int, int]]:
    """Each context in pieces that grow with what its histogram has seen: it learns early."""
    start = 0
    for context in np.flatnonzero(sizes).tolist():
        end = start + int(sizes[context])
        while start < end:
            stop = min(end, start + max(_FIRST_PIECE, int(histograms.seen[context]) // 4))
            yield context, start, stop
            start = stop


class _Histograms:
    """Counts by context of the distances low..high from the centre of one plane."""

    def __init__(self, contexts: Contexts, inherited: Left) -> None:
        low, high = contexts.coded_range()
        self.smooth = contexts.values.smooth
        self.low = low
        self.distances = np.arange(low, high + 1)
        self.inherited = inherited
        self.counts: Left = {}
        self.seen = np.zeros(CLASSES * LEVELS, np.int64)

    def of(self, context: int) -> np.ndarray:
        """float64 weights of the distances, whole numbers."""
        if context not in self.counts:
            self.counts[context] = self._start(context)
        return self.counts[context].astype(np.float64)

    def learn(self, context: int, indices: np.ndarray) -> None:
        seen = np.bincount(indices, minlength=len(self.distances))
        if self.smooth and self.seen[context] < _SMOOTH * len(self.distances):
            self.counts[context] += _spread(seen, class_magnitude(context // LEVELS))
        else:
            self.counts[context] += _SEEN * seen
        self.seen[context] += len(indices)

    def left(self) -> Left:
        """What was inherited, with the counts of this plane in its contexts and distances."""
        left = self.inherited.copy()
        for context, counts in self.counts.items():
            left[context] = left.get(context, _nothing()).copy()
            left[context][self.distances + REACH] = counts
        return left

    def _start(self, context: int) -> np.ndarray:
        inherited = self.inherited.get(context, _nothing())[self.distances + REACH]
        counts = _laplace(context, self.distances) + inherited
        total = int(counts.sum())
        if total > _INHERITED:
            counts = counts * _INHERITED // total
        return counts + 1


@functools.cache
def _nothing() -> np.ndarray:
    return np.zeros(2 * REACH + 1, np.int64)


def _spread(seen: np.ndarray, magnitude: float) -> np.ndarray:
    """What ``seen`` adds to the counts, spread evenly over a quarter of the magnitude each way."""
    reach = min(15, int(magnitude / 4), (len(seen) - 1) // 2)
    width = 2 * reach + 1
    sums = np.cumsum(np.pad(seen, (reach + 1, reach)))
    return (sums[width:] - sums[:-width]) * (_SEEN // width)


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
