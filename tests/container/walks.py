"""Integers that follow the trellis, made by walking its states."""

import numpy as np

from penjing.container import trellis
from penjing.container.contexts import Contexts, Shape, Values


def walk(shape: Shape, scale: float, rng: np.random.Generator) -> np.ndarray:
    """int64 [rows, columns]: each the nearest on its grid to a number from Laplace's law."""
    contexts = Contexts(shape, Values(0, 0, smooth=False))
    values = np.zeros((contexts.rows, contexts.columns), np.int64)
    for row in values:
        state = 0
        for column in contexts.order():
            wanted = np.clip(rng.laplace(0, scale), -120, 120)
            grid = state & 1
            allowed = np.union1d(*(trellis.values_of(2 * grid + p, -127, 127) for p in (0, 1)))
            row[column] = allowed[np.abs(allowed - wanted).argmin()]
            state = trellis.step(state, (abs(int(row[column])) + 1) // 2 & 1)
    return values
