"""Integers of which most are zero, for a coder that knows rows and columns.

Two planes say where the others are, and which.
"""

from __future__ import annotations

import numpy as np

from penjing.container.planes.integers import count, from_symbols, to_symbols, zero
from penjing.container.planes.view import WHOLE, Content, Plane, Read, View, centred, flat, whole


def _kinds(content: Content) -> list[str]:
    return [WHOLE, "mask", "nonzero"]


def _split(raw: np.ndarray, content: Content) -> list[Plane] | None:
    if content.type.bits > 8 or not len(raw):
        return None
    symbols = to_symbols(raw, content)
    centre = zero(symbols, content)
    there = (symbols != centre).astype(np.uint8)
    if not 0 < np.count_nonzero(there) < len(symbols) // 2:
        return None
    others = symbols[there > 0]
    mask = Plane(there, content.shape(len(symbols)), 0)
    head = np.array([centre], np.uint8)
    return [whole(head), mask, centred(others, flat(len(others)), centre)]


def _join(content: Content, read: Read) -> np.ndarray:
    number = count(content)
    symbols = np.repeat(read(flat(1)), number)
    there = read(content.shape(number)) > 0
    symbols[there] = read(flat(int(there.sum())))
    return from_symbols(symbols, content)


MASKED = View("masked", _kinds, _split, _join, coder="arithmetic")
