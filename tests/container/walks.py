"""Integers that follow the trellis, made by walking its states."""

import numpy as np

from penjing.container import trellis
from penjing.container.contexts import Shape, coding_order


def walk(shape: Shape, scale: float | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64 [rows, columns]: each the nearest on its grid to one from Laplace's law of ``scale``."""
    values = np.zeros((shape[0], shape[1] * shape[2]), np.int64)
    scales = np.broadcast_to(scale, values.shape)
    for row, row_scales in zip(values, scales, strict=True):
        state = 0
        for column in coding_order(shape):
            wanted = np.clip(rng.laplace(0, row_scales[column]), -120, 120)
            grid = state & 1
            allowed = np.union1d(*(trellis.values_of(2 * grid + p, -127, 127) for p in (0, 1)))
            row[column] = allowed[np.abs(allowed - wanted).argmin()]
            state = trellis.step(state, (abs(int(row[column])) + 1) // 2 & 1)
    return values
