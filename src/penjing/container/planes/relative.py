"""Integers of which most are zero, as Deep Compression stores them (Han et al. 2016, figure 2).

Each other integer is stored with its distance from the one before it. Where that is more than five
bits can say, or more than a byte can if this takes fewer bits, a zero is stored as a filler.
"""

from __future__ import annotations

import numpy as np

from penjing.container.damage import DamageError
from penjing.container.planes.integers import count, few, from_symbols
from penjing.container.planes.view import (
    WHOLE,
    Content,
    Plane,
    Read,
    View,
    centred,
    entropy,
    flat,
    mode,
    whole,
)

_FARTHEST = (32, 254)
"""The longest distances that are tried."""


def _split(raw: np.ndarray, content: Content) -> list[Plane] | None:
    if not (found := few(raw, content)):
        return None
    symbols, centre, there = found
    at = np.flatnonzero(there)
    distances = np.diff(at, prepend=0)
    ways = [_entries(distances, symbols[at], centre, one) for one in _FARTHEST]
    gaps, values = min(ways, key=lambda way: len(way[0]) * sum(map(entropy, way)))
    head = np.frombuffer(bytes([centre]) + len(gaps).to_bytes(4, "little"), np.uint8)
    shape = flat(len(gaps))
    return [whole(head), Plane(gaps, shape, mode(gaps)), centred(values, shape, centre)]


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


def _join(content: Content, read: Read) -> np.ndarray:
    number, head = count(content), read(flat(5)).tobytes()
    stored = int.from_bytes(head[1:], "little")
    if stored > number:
        raise DamageError("more integers are stored than a tensor has")
    at = np.cumsum(read(flat(stored)), dtype=np.int64)
    values = read(flat(stored))
    if stored and (int(at[-1]) >= number or (np.diff(at) < 1).any()):
        raise DamageError("a stored integer lies outside its tensor")
    symbols = np.full(number, head[0], np.uint8)
    symbols[at] = values
    return from_symbols(symbols, content)


RELATIVE = View("relative", lambda _: [WHOLE, "gaps", "nonzero"], _split, _join)
