"""The parts of a view: one way to see the bytes of tensors as planes of symbols."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from penjing.container.contexts import Shape
from penjing.container.damage import DamageError
from penjing.container.planes.elements import ElementType

_MOST_DIMS = 16
WHOLE = "whole"
"""The kind of a plane of bytes without a model: stored or compressed by LZMA."""


@dataclass(frozen=True)
class Content:
    """The elements of one type, shaped ``dims``, that a stream codes.

    ``parts`` are the bytes of each tensor in it, of which there are several where small ones are joined.
    """

    type: ElementType
    dims: tuple[int, ...]
    parts: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(self.parts)

    @property
    def width(self) -> int:
        """Bytes of an element, at least 1."""
        return max(1, self.type.bits // 8)

    def shape(self, number: int) -> Shape:
        """``dims`` as rows, channels and positions, if they are ``number`` symbols."""
        dims = list(self.dims[:_MOST_DIMS])
        while len(dims) > 1 and dims[0] == 1:
            del dims[0]
        if not dims or math.prod(dims) != number:
            return flat(number)
        return dims[0], math.prod(dims[1:2]), math.prod(dims[2:])


@dataclass(frozen=True)
class Plane:
    """uint8 symbols in ``shape``, of which ``centre`` means zero."""

    symbols: np.ndarray
    shape: Shape
    centre: int


Read = Callable[[Shape], np.ndarray]
"""Gives the next plane's symbols (flat uint8) for its shape."""


@dataclass(frozen=True)
class View:
    """One way to see a tensor as planes; planes of one kind share statistics within a file.

    ``kinds`` names the planes in their order, before any of them is read. ``split`` gives the planes
    of a tensor's bytes (uint8), or None where the view does not suit them. ``join`` asks for the
    planes in the same order and gives the bytes back.
    """

    name: str
    kinds: Callable[[Content], list[str]]
    split: Callable[[np.ndarray, Content], list[Plane] | None]
    join: Callable[[Content, Read], np.ndarray]
    coder: str | None = None
    """The only entropy coder that it is tried with; None for any."""


def flat(number: int) -> Shape:
    """The shape of ``number`` symbols that are all rows."""
    return number, 1, 1


def whole(data: np.ndarray) -> Plane:
    """The plane of bytes without a model."""
    return Plane(data, flat(len(data)), 0)


def mode(symbols: np.ndarray) -> int:
    """The most frequent of the uint8 ``symbols``; the smallest of several."""
    return int(np.bincount(symbols, minlength=1).argmax())


def centred(values: np.ndarray, shape: Shape, centre: int) -> Plane:
    """The plane of ``values`` around the one nearest to ``centre``, which may be out of their range."""
    return Plane(values, shape, min(max(centre, int(values.min())), int(values.max())))


def entropy(symbols: np.ndarray) -> float:
    """Zeroth-order entropy of the uint8 ``symbols``, in bits a symbol."""
    counts = np.bincount(symbols)
    shares = counts[counts > 0] / len(symbols)
    return float(-(shares * np.log2(shares)).sum())


def wrong_type() -> DamageError:
    """The error for a view that the element type of a tensor does not have."""
    return DamageError("a tensor is coded as another element type than its own")
