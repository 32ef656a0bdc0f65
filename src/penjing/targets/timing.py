"""Latency: time calls in turns until their medians are settled. Needs no PyTorch, as on a device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

FEWEST = 20
"""Fewest runs before a median counts as settled."""
FEWEST_LATE = 3
"""Fewest runs, made even when no time is left."""
EVERY = 10
"""Number of runs between two checks of the medians."""
SETTLED = 0.01
"""Width of a settled median's confidence interval, as a share of the median."""


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
    settled: float = SETTLED,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Latency]:
    """Time every call in turns, in an order that changes each time.

    Timing ends, for all calls alike, when the medians of all of them have settled, after ``runs``
    runs of each, or when another run would take longer than ``seconds``.

    Args:
        runs: most runs of each call; with ``settled=0`` and ``seconds=inf`` exactly so many.
        warmup: runs of each call before the first that counts, as many as fit in a tenth of
            ``seconds``, at least one.
        seconds: most seconds of timing; at least 3 runs of each call are made, however long they take.
        settled: widest confidence interval (95 %) of a median, as a share of it, that ends the
            timing once each call has had 20 runs.
        clock: gives the time in seconds.
    """
    _warm_up(calls, warmup, seconds / 10, clock)
    times: list[list[float]] = [[] for _ in calls]
    order = np.random.default_rng(0)
    start = clock()
    for run in range(runs):
        if run >= FEWEST_LATE and (clock() - start) * (run + 1) / run > seconds:
            break
        if run >= FEWEST and run % EVERY == 0 and all(_width(row) < settled for row in times):
            break
        for index in order.permutation(len(calls)):
            times[index].append(_seconds(calls[index], clock))
    return [_summary(np.array(row)) for row in times]


def median_interval(values: Iterable[float]) -> tuple[float, float]:
    """Return the narrowest symmetric order statistics that hold the median with 95 % probability.

    The number of values below the median is binomial with p = 1/2, whatever their distribution
    (David and Nagaraja, Order Statistics, 3rd ed. 2003, section 7.1). Below 6 values no pair holds
    it: the interval is then unbounded.
    """
    ordered = sorted(values)
    rank = _rank(len(ordered))
    return (ordered[rank - 1], ordered[-rank]) if rank else (-math.inf, math.inf)


@cache
def _rank(number: int) -> int:
    """Find the largest r such that fewer than r of ``number`` fair coins show heads with at most
    2.5 %."""
    ways, below, rank = 1, 1, 0
    while 40 * below <= 2**number:
        ways = ways * (number - rank) // (rank + 1)
        below, rank = below + ways, rank + 1
    return rank


def _width(seconds: list[float]) -> float:
    low, high = median_interval(seconds)
    return (high - low) / max(float(np.median(seconds)), 1e-12)


def _warm_up(
    calls: Sequence[Callable[[], object]], runs: int, seconds: float, clock: Callable[[], float]
) -> None:
    start = clock()
    for run in range(runs):
        if run and clock() - start >= seconds:
            break
        for call in calls:
            call()


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def _summary(seconds: np.ndarray) -> Latency:
    p10, median, p90 = (float(q) for q in np.percentile(seconds * 1000, [10, 50, 90]))
    return Latency(median, p10, p90, len(seconds))
