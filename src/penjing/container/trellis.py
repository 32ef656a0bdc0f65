"""Dependent quantization: which integers may follow which along a row.

Every weight lies on one of two grids: the even integers, or zero and the odd ones. A value's *index*
on its grid is its absolute value halved and rounded up. The parities of the indices before it say
which grid is next, through a convolutional code of eight states, so that all sequences of integers
that are allowed lie further apart than integers do: a decibel less error for the same bits.

Sources: Ungerboeck 1982, "Channel coding with multilevel/phase signals", table I, for the code (13, 04);
Marcellin & Fischer 1990, "Trellis coded quantization"; Albrecht, Schwarz et al. 2021, "Trellis-coded
quantization for end-to-end learned image compression", for grids that both have a zero.
"""

from __future__ import annotations

import numpy as np

STATES = 8
SETS = 4
"""Even indices of the first grid, its odd ones, even ones of the second, its odd ones."""
_MEMORY = 3
"""Columns before a value that say its grid: parities and grids."""


def step(state: int, parity: int) -> int:
    """The state after an index of ``parity``; its lowest bit is the grid of the next value."""
    first, second, third = state & 1, state >> 1 & 1, state >> 2
    return (second ^ first) | (third ^ parity) << 1 | first << 2


def parities(values: np.ndarray) -> np.ndarray:
    """The parity of each value's index, 0 or 1."""
    return (np.abs(values) + 1) >> 1 & 1


def values_of(one: int, low: int, high: int) -> np.ndarray:
    """The values of set ``one`` from ``low`` to ``high``."""
    values = np.arange(low, high + 1)
    grid, parity = divmod(one, 2)
    allowed = (parities(values) == parity) & ((values & 1 == grid) | (values == 0))
    return values[allowed]


class Path:
    """Follows the grids along ``rows`` rows, all columns so far."""

    def __init__(self, rows: int) -> None:
        self.parities = np.zeros((rows, _MEMORY), np.uint8)
        self.grids = np.zeros((rows, _MEMORY), np.uint8)

    def follow(self, parities: np.ndarray) -> np.ndarray:
        """The grids, 0 or 1, of the next columns, whose indices have these ``parities``: uint8 [rows,
        columns] both. A grid is the sum modulo 2 of the grids one and three columns before and of
        the parity two columns before."""
        before = np.concatenate([self.parities, parities.astype(np.uint8)], axis=1)
        grids = np.concatenate([self.grids, before[:, 1:-2]], axis=1)
        columns = parities.shape[1]
        sums = grids[:, _MEMORY:]
        for column in range(min(columns, _MEMORY)):
            sums[:, column] ^= grids[:, column]
            if column == 0:
                sums[:, column] ^= grids[:, _MEMORY - 1]
        # What columns of this call pass on to later ones: the square of 1 + D + D^3 is 1 + D^2 + D^6.
        shift = 1
        while shift < columns:
            former = sums.copy()
            sums[:, shift:] ^= former[:, :-shift]
            sums[:, 3 * shift :] ^= former[:, : max(columns - 3 * shift, 0)]
            shift *= 2
        self.parities, self.grids = before[:, -_MEMORY:], grids[:, -_MEMORY:].copy()
        return sums


def obeyed(values: np.ndarray) -> bool:
    """Tell whether all ``values`` [rows, columns in coding order] lie on the grids that are next."""
    grids = Path(len(values)).follow(parities(values))
    return bool(((values & 1 == grids) | (values == 0)).all())
