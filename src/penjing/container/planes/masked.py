"""Integers of which most are zero, for a coder that knows rows and columns.

Two planes say where the others are, and which.
"""

from __future__ import annotations

import numpy as np

from penjing.container.planes.integers import count, few, from_symbols
from penjing.container.planes.view import WHOLE, Content, Plane, Read, View, centred, flat, whole


def _split(raw: np.ndarray, content: Content) -> list[Plane] | None:
    if not (found := few(raw, content)):
        return None
    symbols, centre, there = found
    others = symbols[there]
    mask = Plane(there.astype(np.uint8), content.shape(len(symbols)), 0)
    head = np.array([centre], np.uint8)
    return [whole(head), mask, centred(others, flat(len(others)), centre)]


def _join(content: Content, read: Read) -> np.ndarray:
    number = count(content)
    symbols = np.repeat(read(flat(1)), number)
    there = read(content.shape(number)) > 0
    symbols[there] = read(flat(int(there.sum())))
    return from_symbols(symbols, content)


MASKED = View("masked", lambda _: [WHOLE, "mask", "nonzero"], _split, _join, coder="arithmetic")
