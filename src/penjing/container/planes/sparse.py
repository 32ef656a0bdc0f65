"""Elements of several bytes with many zeros: where the others are, and their bytes."""

from __future__ import annotations

import numpy as np

from penjing.container.planes import bytes
from penjing.container.planes.view import Content, Plane, Read, View, flat


def _kinds(content: Content) -> list[str]:
    return ["mask", *bytes.kinds(content)]


def _split(raw: np.ndarray, content: Content) -> list[Plane] | None:
    words = bytes.to_words(raw, content)
    if words is None or np.count_nonzero(words) > 0.95 * len(words):
        return None
    there = (words != 0).astype(np.uint8)
    mask = Plane(there, content.shape(len(words)), 0)
    others = words[there > 0]
    return [mask, *bytes.to_planes(others, content, flat(len(others)))]


def _join(content: Content, read: Read) -> np.ndarray:
    number = bytes.count(content)
    there = read(content.shape(number)) > 0
    words = np.zeros(number, f"<u{content.width}")
    words[there] = bytes.from_planes(content, flat(int(there.sum())), read)
    return words.view(np.uint8)


SPARSE = View("sparse", _kinds, _split, _join)
