"""Whole bytes as they are, in one plane."""

from __future__ import annotations

import numpy as np

from penjing.container.planes.view import WHOLE, Content, Plane, Read, View, flat, whole


def _split(raw: np.ndarray, content: Content) -> list[Plane]:
    return [whole(raw)]


def _join(content: Content, read: Read) -> np.ndarray:
    return read(flat(content.size))


RAW = View("raw", lambda _: [WHOLE], _split, _join)
