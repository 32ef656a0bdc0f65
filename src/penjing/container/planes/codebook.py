"""Elements of several bytes with at most 256 distinct values: a table in rising order, and indices."""

from __future__ import annotations

import numpy as np

from penjing.container.damage import DamageError
from penjing.container.planes.bytes import count, to_words
from penjing.container.planes.view import WHOLE, Content, Plane, Read, View, flat, mode, whole


def _split(raw: np.ndarray, content: Content) -> list[Plane] | None:
    words = to_words(raw, content)
    if words is None or len(np.unique(words[:4096])) > 256:
        return None
    table = np.unique(words)
    if len(table) > 256:
        return None
    table = table[np.argsort(_as_numbers(table, content), kind="stable")]
    order = np.argsort(table)
    indices = order[np.searchsorted(table, words, sorter=order)].astype(np.uint8)
    plane = Plane(indices, content.shape(len(words)), _zero(table, indices))
    stored = table.view(np.uint8)
    return [whole(np.array([len(table) - 1], np.uint8)), whole(stored), plane]


def _join(content: Content, read: Read) -> np.ndarray:
    number = count(content)
    distinct = int(read(flat(1))[0]) + 1
    table = read(flat(distinct * content.width)).view(f"<u{content.width}")
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


def _zero(table: np.ndarray, indices: np.ndarray) -> int:
    """The index of zero, or the most frequent one."""
    found = np.flatnonzero(table == 0)
    return int(found[0]) if len(found) else mode(indices)


CODEBOOK = View("codebook", lambda _: [WHOLE, WHOLE, "integers"], _split, _join)
