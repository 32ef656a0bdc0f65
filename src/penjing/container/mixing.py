"""Context mixing of the graphs of small nets: predictors give each bit's probability together.

Each context (the last few bytes, or some of them) remembers how often a bit was set behind it, and a
match model expects what followed the last time. A mixture of these predictions, whose weights
learn, is the probability that the bit is coded with. The model starts from having read ``PHRASES``.

Sources: Mahoney 2005, "Adaptive weighing of context models for lossless data compression", for the
mixing; Martin 1979, "Range encoding", for the coder. All arithmetic is in integers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from operator import mul
from pathlib import Path

from penjing.container.arithmetic import shortest

PHRASES = Path(__file__).with_name("phrases.bin").read_bytes()
"""Parts of graphs that small nets have in common, in their short form; frozen with the format.

The rarer ones come first: shared weights, integer kernels, a depthwise net in float, a residual net
and a plain one in 8 bits, as penjing exports them.
"""
CONTEXTS: tuple[Callable[[bytes], bytes], ...] = (
    lambda read: read[-1:],
    lambda read: read[-2:],
    lambda read: read[-3:],
    lambda read: read[-6:],
    lambda read: read[-3:-1],
    lambda read: read[-4:-2],
    lambda read: read[-8:-4],
    lambda read: read[-5:-3] + b"|" + read[-1:],
)
"""Contexts of the next byte: functions of up to ``REACH`` bytes read before it."""
REACH = 8
_SHORTEST = 4
"""Bytes of the shortest match, whose next byte is expected again."""
_LONGEST = 16
"""Length of match from which all longer ones share a state."""
_ONE = 1 << 16
"""Probability 1 of a bit, and weight 1 of a prediction."""
_HALF = _ONE >> 1
_UNSEEN = _HALF << 5
"""State of a context that has not been seen; it predicts nothing."""
_NEVER = 16
"""Least probability of a bit."""
_COUNTED = 20
"""Bits after which a context forgets old ones as fast as it learns new ones."""
_PART = [2 * _ONE // (2 * seen + 3) for seen in range(_COUNTED + 1)]
"""Part of its error by which a bit corrects a probability, by the bits that the context has seen."""
_FIRST_WEIGHT = 2 * _ONE // 5
_LEARNED = 4
"""Learning rate of the weights."""
_SURE_OF_MATCH = 58_000
_BIAS = 64
_FLAT = 2047
"""Largest prediction, in 1/256: the logarithm of the odds of a bit."""

# No value comes near to where it would be rounded otherwise, so that every machine has the same.
_SQUASHED = [round(_ONE / (1 + math.exp(-x / 256))) for x in range(-_FLAT, _FLAT + 1)]
_STRETCHED = [round(256 * math.log((p + 0.5) / (4095.5 - p))) for p in range(4096)]

Code = Callable[[int], int]
"""Codes a bit of the given probability of being 1, and gives the bit."""


def compress(data: bytes) -> bytes:
    """The shortest code of ``data``, which ``decompress`` reads given its size.

    Takes about 0.1 ms a byte.
    """
    coder, bits = _Encoder(), iter(_bits(data))
    _run(len(data), lambda probability: coder.code(next(bits), probability))
    return coder.finish()


def decompress(data: bytes | memoryview, size: int) -> bytes:
    """The ``size`` bytes that were compressed; others if ``data`` is damaged."""
    return _run(size, _Decoder(bytes(data)).code)


def _bits(data: bytes) -> list[int]:
    return [byte >> place & 1 for byte in data for place in range(7, -1, -1)]


def _run(size: int, code: Code) -> bytes:
    model = _informed().successor()
    start = len(model.read)
    for _ in range(size):
        model.byte(code)
    return bytes(model.read[start:])


@functools.cache
def _informed() -> _Model:
    """A model that has read ``PHRASES``."""
    model, bits = _Model(), iter(_bits(PHRASES))
    for _ in PHRASES:
        model.byte(lambda _: next(bits))
    return model


class _Model:
    """The bytes read so far, and the statistics of what followed what.

    ``tables`` are by context, then by the bits of the byte so far (with a 1 before them), ``matches`` by
    the length of the match. Each state in them is a probability, of a 1 or of going on, with the
    number of bits that it comes from in its lowest 5 bits. What is not in ``tables`` yet starts from
    those ``before``.
    """

    def __init__(self) -> None:
        self.read = bytearray()
        self.tables: list[dict[bytes, dict[int, int]]] = [{} for _ in CONTEXTS]
        self.before: list[dict[bytes, dict[int, int]]] = [{} for _ in CONTEXTS]
        self.weights: dict[tuple[int, bool], list[int]] = {}
        self.places: dict[bytes, int] = {}
        self.matches = [_SURE_OF_MATCH << 5] * (_LONGEST + 1)
        self.place = self.matched = 0

    def successor(self) -> _Model:
        """A model that goes on from here and leaves this one as it is."""
        other = _Model()
        other.read, other.before = self.read.copy(), self.tables
        other.weights = {key: weights.copy() for key, weights in self.weights.items()}
        other.places, other.matches = self.places.copy(), self.matches.copy()
        other.place, other.matched = self.place, self.matched
        return other

    def byte(self, code: Code) -> None:
        """Code one byte, and learn from it."""
        recent = bytes(self.read[-REACH:])
        known = [self._known(at, context(recent)) for at, context in enumerate(CONTEXTS)]
        expected = self.read[self.place] | 256 if self.matched else 0
        node = 1
        for place in range(7, -1, -1):
            again = expected >> place & 1 if expected >> (place + 1) == node else None
            node = 2 * node + self._bit(node, known, again, code)
        self.read.append(node - 256)
        self._look_for_match(went_on=node == expected)

    def _known(self, at: int, context: bytes) -> dict[int, int]:
        if context not in self.tables[at]:
            self.tables[at][context] = self.before[at].get(context, {}).copy()
        return self.tables[at][context]

    def _bit(self, node: int, known: list[dict[int, int]], again: int | None, code: Code) -> int:
        """Code the bit after ``node``, which the match model expects to be ``again``."""
        states = [one.get(node, _UNSEEN) for one in known]
        predictions = [_STRETCHED[state >> 9] for state in states]
        length = min(self.matched, _LONGEST)
        sure = self.matches[length]
        predictions.append(0 if again is None else (2 * again - 1) * _STRETCHED[sure >> 9])
        predictions.append(_BIAS)
        key = len(states) - states.count(_UNSEEN), again is not None
        weights = self.weights.setdefault(key, [_FIRST_WEIGHT] * len(predictions))
        together = sum(map(mul, weights, predictions)) >> 16
        probability = _SQUASHED[max(-_FLAT, min(together, _FLAT)) + _FLAT]
        probability = max(_NEVER, min(probability, _ONE - _NEVER))
        bit = code(probability)
        wrong = ((bit << 16) - probability) * _LEARNED
        for at, prediction in enumerate(predictions):
            weights[at] += (wrong * prediction + _HALF) >> 16
        for one, state in zip(known, states, strict=True):
            one[node] = _learned(state, bit)
        if again is not None:
            self.matches[length] = _learned(sure, int(bit == again))
        return bit

    def _look_for_match(self, *, went_on: bool) -> None:
        self.matched, self.place = (self.matched + 1, self.place + 1) if went_on else (0, 0)
        last = bytes(self.read[-_SHORTEST:])
        if not self.matched and last in self.places:
            self.place = self.places[last]
            self.matched = self._same_before(self.place)
        self.places[last] = len(self.read)

    def _same_before(self, place: int) -> int:
        """The length of the match that ends before ``place`` and with the last byte read."""
        for length in range(min(place, _LONGEST)):
            if self.read[place - 1 - length] != self.read[-1 - length]:
                return length
        return min(place, _LONGEST)


def _learned(state: int, bit: int) -> int:
    probability, seen = state >> 5, state & 31
    probability += ((_ONE - 1 - probability if bit else -probability) * _PART[seen]) >> 16
    return probability << 5 | (seen + 1 if seen < _COUNTED else seen)


class _Encoder:
    """Range coder; ``low`` is the whole code so far, so that carries need no care."""

    def __init__(self) -> None:
        self.low, self.range, self.size = 0, _ONE << 16, 4

    def code(self, bit: int, probability: int) -> int:
        part = (self.range >> 16) * probability
        if bit:
            self.range = part
        else:
            self.low += part
            self.range -= part
        while self.range < _ONE << 8:
            self.low, self.range, self.size = self.low << 8, self.range << 8, self.size + 1
        return bit

    def finish(self) -> bytes:
        """The shortest bytes that, with zeros behind them, lie within the range."""
        return shortest(self.low, self.range).to_bytes(self.size, "big").rstrip(b"\0")


class _Decoder:
    """Range decoder; reads zeros behind the end."""

    def __init__(self, data: bytes) -> None:
        self.rest = iter(data)
        self.range, self.at = _ONE << 16, 0
        for _ in range(4):
            self._next()

    def _next(self) -> None:
        self.at = self.at << 8 | next(self.rest, 0)

    def code(self, probability: int) -> int:
        part = (self.range >> 16) * probability
        bit = int(self.at < part)
        if bit:
            self.range = part
        else:
            self.at -= part
            self.range -= part
        while self.range < _ONE << 8:
            self.range <<= 8
            self._next()
        return bit
