"""How strength grows during training."""

from __future__ import annotations

RAMP_END = 0.7
"""Share of the training after which strength is full: the rest trains what is left."""


def cubic(progress: float, end: float = RAMP_END) -> float:
    """Share of the final sparsity at ``progress`` in [0, 1] of the training.

    ``1 - (1 - t)**3`` with ``t = progress / end``: fast first, while much is redundant, and slow
    towards the end (Zhu and Gupta 2017, arXiv:1710.01878, equation 1).
    """
    time = min(max(progress / end, 0.0), 1.0)
    return 1.0 - (1.0 - time) ** 3
