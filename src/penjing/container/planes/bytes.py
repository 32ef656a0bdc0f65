"""Elements of several bytes as one plane a byte, lowest first.

The sign is rotated to the low end, so that in floats of 32 bits and bfloat16 the exponent is a
plane of its own.
"""

from __future__ import annotations

import numpy as np

from penjing.container.contexts import Shape
from penjing.container.planes.view import Content, Plane, Read, View, mode, wrong_type


def kinds(content: Content) -> list[str]:
    """The planes of one element type's bytes, each a kind of its own."""
    return [f"{content.type.name}/{index}" for index in range(content.width)]


def _split(raw: np.ndarray, content: Content) -> list[Plane] | None:
    words = to_words(raw, content)
    if words is None:
        return None
    return to_planes(words, content, content.shape(len(words)))


def _join(content: Content, read: Read) -> np.ndarray:
    return from_planes(content, content.shape(count(content)), read).view(np.uint8)


def to_words(raw: np.ndarray, content: Content) -> np.ndarray | None:
    """The elements of ``raw`` as unsigned integers, or None where they are not of several bytes."""
    if content.width == 1 or len(raw) % content.width:
        return None
    return raw.view(f"<u{content.width}")


def count(content: Content) -> int:
    """The number of elements in ``content``; raises DamageError if they are not of several bytes."""
    if content.width == 1 or content.size % content.width:
        raise wrong_type()
    return content.size // content.width


def to_planes(words: np.ndarray, content: Content, shape: Shape) -> list[Plane]:
    """The planes of ``words``, each in ``shape``."""
    bits = words.dtype.type(content.type.bits - 1)
    rotated = (words << words.dtype.type(1)) | (words >> bits)
    columns = rotated.astype(rotated.dtype.newbyteorder("<")).view(np.uint8)
    columns = columns.reshape(-1, content.width).T
    return [Plane(plane := np.ascontiguousarray(column), shape, mode(plane)) for column in columns]


def from_planes(content: Content, shape: Shape, read: Read) -> np.ndarray:
    """The words that ``to_planes`` took apart."""
    columns = [read(shape) for _ in range(content.width)]
    rotated = np.stack(columns, axis=1).view(f"<u{content.width}").ravel()
    bits = rotated.dtype.type(content.type.bits - 1)
    return (rotated >> rotated.dtype.type(1)) | (rotated << bits)


BYTES = View("bytes", kinds, _split, _join)
