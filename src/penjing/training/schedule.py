"""Schedules of learning rate, momentum and sparsity over a training."""

from __future__ import annotations

import math

from penjing.training.settings import TrainSettings

ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = 1e-4 / 25
MOMENTUM_LOW, MOMENTUM_HIGH = 0.85, 0.95

RAMP_END = 0.7
"""Share of the training after which sparsity is full: the rest trains the remaining weights."""


def cubic(progress: float, end: float = RAMP_END) -> float:
    """Return the share of the final sparsity at ``progress`` in [0, 1] of the training.

    ``1 - (1 - t)**3`` with ``t = progress / end``: fast first, while much is redundant, and slow
    towards the end (Zhu and Gupta 2017, arXiv:1710.01878, equation 1).
    """
    time = min(max(progress / end, 0.0), 1.0)
    return 1.0 - (1.0 - time) ** 3


def learning_rate(settings: TrainSettings, progress: float) -> float:
    """Return the learning rate at ``progress`` in [0, 1] of the training."""
    warmup, lr = settings.warmup, settings.lr
    rising = progress / warmup if warmup else 1.0
    falling = (progress - warmup) / (1 - warmup)
    if settings.schedule == "one_cycle":
        if rising < 1:
            return _cosine(lr * ONE_CYCLE_START, lr, rising)
        return _cosine(lr, lr * ONE_CYCLE_END, falling)
    return lr * rising if rising < 1 else _cosine(lr, 0.0, falling)


def momentum(settings: TrainSettings, progress: float) -> float:
    """Return the momentum of SGD at ``progress`` in [0, 1] of the training."""
    if settings.schedule == "cosine":
        return settings.momentum
    warmup = settings.warmup
    if progress < warmup:
        return _cosine(MOMENTUM_HIGH, MOMENTUM_LOW, progress / warmup)
    return _cosine(MOMENTUM_LOW, MOMENTUM_HIGH, (progress - warmup) / (1 - warmup))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
