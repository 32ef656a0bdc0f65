"""Floats that are small multiples of a power of two, as rounded biases are.

Where all values of a tensor are at most 127 times the power, in size, the planes hold the power and
these integers; of the other tensors, their bytes.
"""

from __future__ import annotations

import numpy as np

from penjing.container.planes import bytes
from penjing.container.planes.view import (
    Content,
    Plane,
    Read,
    View,
    centred,
    flat,
    mode,
    wrong_type,
)

_FLOATS = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}
_ON_GRID = 7
"""Bits of the integers, without their sign."""
_NO_GRID, _POWER_ZERO = 0, 128
"""Symbols of a tensor whose values are no such multiples, and of the power 2 ** 0."""


def _kinds(content: Content) -> list[str]:
    return ["powers", "on grid", *bytes.kinds(content)]


def _split(raw: np.ndarray, content: Content) -> list[Plane] | None:
    if content.type.name not in _FLOATS or not _are_whole(content):
        return None
    numbers, words = raw.view(_FLOATS[content.type.name]), raw.view(f"<u{content.width}")
    ends = np.cumsum(content.parts)[:-1] // content.width
    found = [_on_grid(part) for part in np.split(numbers, ends)]
    powers = np.array([power for power, _ in found], np.uint8)
    if not (powers != _NO_GRID).any():
        return None
    integers = np.concatenate([part for _, part in found]).astype(np.uint8)
    others = words[np.repeat(powers == _NO_GRID, _lengths(content))]
    return [
        Plane(powers, flat(len(powers)), mode(powers)),
        centred(integers, content.shape(len(integers)), 1 << _ON_GRID),
        *bytes.to_planes(others, content, flat(len(others))),
    ]


def _on_grid(numbers: np.ndarray) -> tuple[int, np.ndarray]:
    """The symbol of the coarsest grid of ``numbers``, and those of their integers on it."""
    none = _NO_GRID, np.zeros(0, np.int64)
    wide = numbers.astype(np.float64)
    if not np.isfinite(wide).all() or (np.signbit(wide) & (wide == 0)).any():
        return none
    _, exponent = np.frexp(np.abs(wide).max())
    scaled = np.ldexp(wide, _ON_GRID - exponent)
    integers = scaled.astype(np.int64)
    if (integers != scaled).any():
        return none
    bits = int(np.bitwise_or.reduce(np.abs(integers)))
    spare = (bits & -bits).bit_length() - 1 if bits else 0
    power = _POWER_ZERO + int(exponent) - _ON_GRID + spare
    return (power, (integers >> spare) + (1 << _ON_GRID)) if 0 < power < 256 else none


def _join(content: Content, read: Read) -> np.ndarray:
    if content.type.name not in _FLOATS or not _are_whole(content):
        raise wrong_type()
    powers = np.repeat(read(flat(len(content.parts))).astype(np.int64), _lengths(content))
    fixed = powers != _NO_GRID
    words = np.empty(len(powers), f"<u{content.width}")
    integers = read(content.shape(int(fixed.sum()))).astype(np.float64) - (1 << _ON_GRID)
    with np.errstate(over="ignore"):  # of float16, in damaged files
        numbers = np.ldexp(integers, powers[fixed] - _POWER_ZERO).astype(_FLOATS[content.type.name])
    words[fixed] = numbers.view(words.dtype)
    words[~fixed] = bytes.from_planes(content, flat(int((~fixed).sum())), read)
    return words.view(np.uint8)


def _are_whole(content: Content) -> bool:
    """Tell whether no tensor ends inside an element; joined ones may do so and still add up."""
    return not any(part % content.width for part in content.parts)


def _lengths(content: Content) -> list[int]:
    """Elements of each tensor."""
    return [part // content.width for part in content.parts]


GRID = View("grid", _kinds, _split, _join)
