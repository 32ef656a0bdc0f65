"""The context model: what each weight is expected to be, from the weights already coded.

A plane is seen as rows x channels x positions: output channels, input channels and kernel positions
of a convolution. It is coded in blocks: of a group of rows, one kernel position (or every eighth
channel) at a time. Three things are estimated for each value of a block before it is coded:

- its *expected value*, by least squares from the values at other positions of its kernel, because
  trained kernels are smooth. The coefficients come from the rows already coded;
- the *magnitude* of its difference from that, from the mean of such magnitudes in its row, channel,
  column and kernel;
- from both, its *context*: the class of the magnitude in half octaves, and the level of the
  expected value in parts of that magnitude.

Planes of few different values are coded as they are, in the context. In smooth planes the
difference from the expected value is coded, and the level is not used.

Everything here is integer arithmetic, or single IEEE operations on float64 (no exp, log or sums
whose order may change), so that encoder and decoder agree on every machine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, int, int]
"""Rows, channels, positions."""

CLASSES = 32
LOWEST = -14
"""Class 0 is a mean magnitude of 2 ** (LOWEST / 2)."""
LEVELS = 8
LEVEL_CENTRES = (0.0, 0.07, 0.15, 0.25, 0.38, 0.55, 0.85, 1.2)
"""Expected value of each level, in mean magnitudes of its class."""

_LEVEL_EDGES = (0.04, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0)
_MOST_POSITIONS = 64
"""Larger kernels count as channels: a block for each position would be too small."""
BLOCK = 1 << 18
"""Symbols of a block at most."""
_NEIGHBOURS = 8
"""Kernel positions that an expected value is computed from, the nearest ones."""
_RIDGE = 1024
"""The least squares are regularized by this part of the position's second moment."""
_LARGEST = _RIDGE**0.5
"""No coefficient of exact least squares with this ridge is larger; a rounded one might be."""
_UNIT = 64
"""Coefficients and expected values are multiples of 1 / _UNIT."""
_MANTISSA = 44
"""Bits of a float64 below its sign, its exponent and the 8 bits of its mantissa that ``_log`` reads."""
_BIAS = 1022
"""Exponent bits of a float64 in [0.5, 1): ``_log`` of 1 is an octave.

For that the class of a magnitude lies above it, by 5 half octaves or, with several positions, 7.
"""


def class_magnitude(of_class: int) -> float:
    """The mean magnitude in the middle of a class."""
    octaves, half = divmod(of_class + LOWEST, 2)
    return math.ldexp(math.sqrt(2) if half else 1.0, octaves)


@functools.cache
def _level_table() -> np.ndarray:
    """Levels, uint8 [classes, sizes], of expected values by size in 1 / _UNIT; the last is of all
    larger ones."""
    edges = [[edge * class_magnitude(k) * _UNIT for edge in _LEVEL_EDGES] for k in range(CLASSES)]
    sizes = np.arange(int(edges[-1][-1]) + 2)
    return np.stack([np.searchsorted(of_class, sizes) for of_class in edges]).astype(np.uint8)


@functools.cache
def _log_table() -> np.ndarray:
    """The values of ``_log``, by the bits of a positive float64 above ``_MANTISSA``."""
    within = np.array([round(16 * math.log2(i / 256)) for i in range(256, 512)])
    octaves = 16 * (np.arange(2048) - _BIAS)
    return (octaves[:, None] + within).astype(np.int32).ravel()


@dataclass(frozen=True)
class Values:
    """The values of a plane: symbols minus their centre, from ``low`` to ``high``.

    ``smooth`` planes hold finely rounded numbers: they are coded as differences from the expected
    value, and their histograms are spread while they are young.
    """

    low: int
    high: int
    smooth: bool


@dataclass(frozen=True)
class Block:
    """The coding of a block's values: as ``signs * (value - offsets)`` in ``contexts``.

    A sign of -1 says that a negative value is expected, so that both directions share a histogram.
    ``expected`` is in units of 1 / 64. Arrays of [rows, columns of the block], or [values that count],
    or [1].
    """

    contexts: np.ndarray
    signs: np.ndarray
    offsets: np.ndarray
    expected: np.ndarray


class Contexts:
    """Follows the coding of one plane of values.

    For each of ``blocks`` in turn: ``of`` says how to code it, ``learn`` takes what it was. In
    ``sparse`` planes columns of a channel differ more from one another.
    """

    def __init__(self, shape: Shape, values: Values, *, sparse: bool = False) -> None:
        self.values = values
        self.column_power = 6 if sparse else 3
        self.rows, self.channels, self.positions = shape
        if self.positions > _MOST_POSITIONS:
            self.channels, self.positions = self.channels * self.positions, 1
        self.columns = self.channels * self.positions
        self.column_sum = np.zeros(self.columns)
        self.column_seen = np.zeros(self.columns)
        self.channel_sum = np.zeros(self.channels)
        self.channel_seen = np.zeros(self.channels)
        self.total, self.number = 2.0 * _UNIT, 4.0
        self.kernels = Kernels(self.positions)
        self.predicted = self.positions > 1
        self.mirrored = self.predicted and not values.smooth and values.low < 0 < values.high

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Row groups that grow, and in each the kernel positions (or the eighths of a row)."""
        phases = self._phases()
        width = -(-self.columns // phases)
        group = max(1, -(-256 // width))
        largest = max(group, min(self.rows // 8, BLOCK // width))
        start = 0
        while start < self.rows:
            rows = slice(start, min(self.rows, start + group))
            self._new_rows(rows.stop - rows.start)
            for phase in range(phases):
                yield rows, slice(phase, self.columns, phases)
            start, group = rows.stop, min(max(group + 1, group * 8 // 5), largest)

    def order(self) -> np.ndarray:
        """The columns of a row in the order in which they are coded."""
        phases = self._phases()
        return np.concatenate([np.arange(phase, self.columns, phases) for phase in range(phases)])

    def _phases(self) -> int:
        if self.positions > 1:
            return self.positions
        return max(min(8, self.channels // 4), -(-self.channels // BLOCK), 1)

    def _new_rows(self, rows: int) -> None:
        self.row_sum, self.row_seen = np.zeros(rows), np.zeros(rows)
        self.kernel_sum = np.zeros((rows, self.channels))
        self.kernel_seen = np.zeros(())
        self.kernels.new_rows(rows, self.channels)

    def of(self, columns: slice, some: np.ndarray | None = None) -> Block:
        """The coding of the block at ``columns`` of the current rows, or of its values at the indices
        ``some`` only."""
        classes = self._classes(columns, some)
        contexts = classes * np.uint16(LEVELS)
        none = np.zeros(1, np.int32)
        if not self.predicted:
            return Block(contexts, none + 1, none, none)
        expected = self.kernels.expect(columns.start, some)
        if self.values.smooth:
            nearest = np.clip((expected + _UNIT // 2) // _UNIT, self.values.low, self.values.high)
            return Block(contexts, none + 1, nearest.astype(np.int32), expected)
        signs = np.where(self.mirrored & (expected < 0), -1, 1).astype(np.int32)
        table = _level_table()
        sizes = np.minimum(np.abs(expected), table.shape[1] - 1)
        return Block(contexts + table[classes, sizes], signs, none, expected)

    def coded_range(self) -> tuple[int, int]:
        """The least and the largest number that ``signs * (value - offsets)`` can be."""
        low, high = self.values.low, self.values.high
        if self.predicted and self.values.smooth:
            return low - high, high - low
        return (min(low, -high), max(high, -low)) if self.mirrored else (low, high)

    def _classes(self, columns: slice, some: np.ndarray | None) -> np.ndarray:
        mean = self.total / self.number
        level = 8 * _log(np.array(mean / _UNIT))
        by_row = level + 7 * _log(_ratio(self.row_sum, self.row_seen, mean, 4))
        by_column = self._column_level(columns, mean)
        if some is None:
            level = by_row[:, None] + by_column
        else:
            row, column = np.divmod(some, len(by_column))
            level = by_row[row] + by_column[column]
        if self.positions > 1:
            kernel = _ratio(_at(self.kernel_sum, some), _at(self.kernel_seen, some), mean, 2)
            level += 4 * _log(kernel)
        level += 32
        level >>= 6
        level -= LOWEST
        return np.minimum(np.maximum(level, 0), CLASSES - 1).astype(np.uint16)

    def _column_level(self, columns: slice, mean: float) -> np.ndarray:
        totals, seen = self.column_sum[columns], self.column_seen[columns]
        if self.positions == 1:
            return 6 * _log(_ratio(totals, seen, mean, 4))
        channel = _ratio(self.channel_sum, self.channel_seen, mean, 4)
        column = _ratio(totals, seen, mean * channel, 4)
        return 6 * _log(channel) + self.column_power * _log(column)

    def learn(
        self, columns: slice, values: np.ndarray, block: Block, some: np.ndarray | None = None
    ) -> None:
        """Learn the ``values`` (int32 [rows, columns]) of the block at ``columns`` of the current rows.

        Of their magnitudes, those at the indices ``some`` count, or all.
        """
        magnitudes = np.abs(_UNIT * _at(values, some) - block.expected)
        if some is None:
            by_column, by_row = values.shape
            sums, row_sums = magnitudes.sum(axis=0), magnitudes.sum(axis=1)
        else:
            row, column = np.divmod(some, values.shape[1])
            by_row, row_sums = _counts(row, magnitudes, values.shape[0])
            by_column, sums = _counts(column, magnitudes, values.shape[1])
        self.row_sum += row_sums
        self.row_seen += by_row
        self.column_sum[columns] += sums
        self.column_seen[columns] += by_column
        self.total += float(sums.sum())
        self.number += magnitudes.size
        if self.positions > 1:
            self.channel_sum += sums
            self.channel_seen += by_column
            self._learn_kernels(magnitudes, some)
            self.kernels.learn(columns.start, values)

    def _learn_kernels(self, magnitudes: np.ndarray, some: np.ndarray | None) -> None:
        if some is None:
            self.kernel_sum += magnitudes
            self.kernel_seen += 1
        else:
            if not self.kernel_seen.ndim:
                self.kernel_seen = np.zeros(self.kernel_sum.shape)
            self.kernel_sum.ravel()[some] += magnitudes
            self.kernel_seen.ravel()[some] += 1


def _at(values: np.ndarray, some: np.ndarray | None) -> np.ndarray:
    """The ``values`` at the flat indices ``some``, or all; a single one counts for all."""
    return values if some is None or not values.ndim else values.ravel()[some]


def _counts(of: np.ndarray, magnitudes: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The count of each index below ``number`` in ``of``, and the sum of its ``magnitudes``."""
    return np.bincount(of, minlength=number), np.bincount(of, magnitudes, number)


def coding_order(shape: Shape) -> np.ndarray:
    """The columns of a row of a plane, int64, in the order in which they are coded."""
    return Contexts(shape, Values(0, 0, smooth=False)).order()


class Kernels:
    """Expects the value at a kernel position from those at earlier positions of the kernel."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        side = math.isqrt(positions)
        self.side = side if side * side == positions else positions
        self.moments = np.zeros((positions, positions))
        self.values = np.zeros((positions, 0, 0), np.int32)

    def new_rows(self, rows: int, channels: int) -> None:
        """Learn from the rows before, and start ``rows`` new ones."""
        if self.positions > 1:
            flat = self.values.reshape(self.positions, -1).astype(np.float64)
            self.moments += flat @ flat.T  # integers below 2 ** 53: exact in any order
            self.values = np.zeros((self.positions, rows, channels), np.int32)

    def learn(self, position: int, values: np.ndarray) -> None:
        self.values[position] = values

    def expect(self, position: int, some: np.ndarray | None = None) -> np.ndarray:
        """int32 [rows, channels], or at the indices ``some`` of these: expected values in units of
        1 / 64."""
        shape = self.values.shape[1:] if some is None else some.shape
        expected = np.zeros(shape, np.int32)  # below 8 * 64 * 32 * 255
        for other, weight in self._weights(position):
            expected += weight * _at(self.values[other], some)
        return expected

    def _weights(self, position: int) -> list[tuple[int, int]]:
        if not self.moments[position, position]:
            return []
        near = sorted(range(position), key=lambda other: (self._distance(position, other), other))
        near = near[:_NEIGHBOURS]
        ridge = float(self.moments[position, position]) / _RIDGE
        matrix = [[float(self.moments[i, j]) + ridge * (i == j) for j in near] for i in near]
        weights = _solve(matrix, [float(self.moments[i, position]) for i in near])
        return [
            (other, round(_UNIT * min(max(weight, -_LARGEST), _LARGEST)))
            for other, weight in zip(near, weights, strict=True)
        ]

    def _distance(self, position: int, other: int) -> int:
        rows = position // self.side - other // self.side
        columns = position % self.side - other % self.side
        return rows * rows + columns * columns


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a positive definite system; in Python, so that no library changes the order of sums.

    Gives zeros where rounding has made the matrix singular: other positions larger than this one
    by more than float64 can hold beside its ridge.
    """
    size = len(right)
    for pivot in range(size):
        if matrix[pivot][pivot] <= 0:
            return [0.0] * size
        for row in range(pivot + 1, size):
            factor = matrix[row][pivot] / matrix[pivot][pivot]
            for column in range(pivot, size):
                matrix[row][column] -= factor * matrix[pivot][column]
            right[row] -= factor * right[pivot]
    for row in reversed(range(size)):
        for column in range(row + 1, size):
            right[row] -= matrix[row][column] * right[column]
        right[row] /= matrix[row][row]
    return right


def _ratio(
    total: np.ndarray, number: np.ndarray | float, mean: np.ndarray | float, weight: int
) -> np.ndarray:
    """A local mean over ``mean``, drawn towards 1 by ``weight`` symbols of magnitude ``mean``."""
    return (total + weight * mean) / ((number + weight) * mean)


def _log(values: np.ndarray) -> np.ndarray:
    """Sixteenths of an octave of twice the positive ``values``, int32; equal on all machines."""
    return _log_table()[values.view(np.int64) >> _MANTISSA]
