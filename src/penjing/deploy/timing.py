"""How long things take: the clock behind every latency. Needs no PyTorch, so that a device has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Wall time of one inference at batch 1, over ``runs`` runs."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int


def time_calls(
    calls: Sequence[Callable[[], object]],
    *,
    runs: int = 300,
    warmup: int = 10,
    seconds: float = 10.0,
) -> list[Latency]:
    """Time every call in turns, as ``latency`` does files."""
    for call in calls:
        for _ in range(warmup):
            call()
    round_s = sum(_seconds(call) for call in calls)
    runs = max(int(min(runs, seconds / round_s)), min(runs, 20))
    times = np.empty((len(calls), runs))
    order = np.random.default_rng(0)
    for run in range(runs):
        for index in order.permutation(len(calls)):
            times[index, run] = _seconds(calls[index])
    return [_summary(row) for row in times]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _summary(seconds: np.ndarray) -> Latency:
    p10, median, p90 = (float(q) for q in np.percentile(seconds * 1000, [10, 50, 90]))
    return Latency(median, p10, p90, len(seconds))
