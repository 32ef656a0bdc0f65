"""Integers of at most 8 bits, one a symbol, in the order of their values."""

from __future__ import annotations

import numpy as np

from penjing.container.planes.view import Content, Plane, Read, View, mode, wrong_type


def _split(raw: np.ndarray, content: Content) -> list[Plane] | None:
    if content.type.bits > 8:
        return None
    symbols = to_symbols(raw, content)
    return [Plane(symbols, content.shape(len(symbols)), zero(symbols, content))]


def _join(content: Content, read: Read) -> np.ndarray:
    return from_symbols(read(content.shape(count(content))), content)


def count(content: Content) -> int:
    """The number of symbols in ``content``; raises DamageError for wider elements."""
    if content.type.bits > 8:
        raise wrong_type()
    return content.size * (8 // content.type.bits)


def to_symbols(raw: np.ndarray, content: Content) -> np.ndarray:
    """uint8 symbols of the bytes ``raw``; elements in the lowest bits of a byte come first."""
    bits = content.type.bits
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    symbols = ((raw[:, None] >> shifts) & (2**bits - 1)).astype(np.uint8).ravel()
    return symbols ^ _sign(content)


def from_symbols(symbols: np.ndarray, content: Content) -> np.ndarray:
    """The bytes that ``to_symbols`` took apart."""
    shifts = np.arange(0, 8, content.type.bits, dtype=np.uint8)
    parts = (symbols ^ _sign(content)).reshape(-1, len(shifts)) << shifts
    return np.bitwise_or.reduce(parts, axis=1).astype(np.uint8)


def _sign(content: Content) -> np.uint8:
    """The bit to turn over so that two's complement sorts by value."""
    return np.uint8(1 << (content.type.bits - 1) if content.type.signed else 0)


def zero(symbols: np.ndarray, content: Content) -> int:
    """The symbol of zero where it lies in the range of a signed type, else the most frequent one."""
    sign = int(_sign(content))
    return sign if sign and symbols.min() <= sign <= symbols.max() else mode(symbols)


def few(raw: np.ndarray, content: Content) -> tuple[np.ndarray, int, np.ndarray] | None:
    """Symbols, the one of zero, and which ones (bool) are others; None unless fewer than half are."""
    if content.type.bits > 8 or not len(raw):
        return None
    symbols = to_symbols(raw, content)
    centre = zero(symbols, content)
    there = symbols != centre
    return (symbols, centre, there) if 0 < there.sum() < len(symbols) // 2 else None


INTEGERS = View("integers", lambda _: ["integers"], _split, _join)
