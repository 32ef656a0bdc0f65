"""Whether a point meets the budget, and how near it came where it does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penjing import units
from penjing.report import study
from penjing.report.study import Point, Study

if TYPE_CHECKING:
    from penjing.tasks.interval import State


@dataclass(frozen=True)
class Verdict:
    """One limit of the budget (``found`` and ``limit`` in bytes, ms or score) beside what was
    measured. ``found`` is None where it was not measured; such a limit is missed. ``bounds`` are those
    of a ``found`` that is an estimate (None where they are unknown)."""

    name: str
    found: float | None
    limit: float
    write: Callable[[float], str]
    estimate: bool = False
    bounds: tuple[float, float] | None = None

    @property
    def state(self) -> State:
        """An estimate is within the limit when its upper bound is, and misses it when its lower bound
        does."""
        if self.found is None:
            return "missed"
        unknown = (-math.inf, math.inf) if self.estimate else (self.found, self.found)
        low, high = self.bounds or unknown
        if high <= self.limit + 1e-12:
            return "met"
        return "missed" if low > self.limit + 1e-12 else "cannot be told"

    def __str__(self) -> str:
        found = "not measured" if self.found is None else self.write(self.found)
        if self.bounds:
            found += f" ({self.write(self.bounds[0])} to {self.write(self.bounds[1])})"
        return f"{self.name} {found} of at most {self.write(self.limit)}"


def bounds(point: Point, drop: str = "drop") -> tuple[float, float] | None:
    """Bounds of a drop; None where the record has none."""
    low, high = point.get(f"{drop}_low"), point.get(f"{drop}_high")
    return None if low is None or high is None else (low, high)


def verdicts(record: Study, point: Point, unit: units.ScoreUnit) -> list[Verdict]:
    """One verdict for every limit that the budget sets on size, latency or drop."""
    limits = record["budget"] or {}
    found: list[Verdict] = []
    if (limit := limits.get("size")) is not None:
        found.append(Verdict("size", point.get("packed_bytes"), limit, units.size))
    if (limit := limits.get("latency")) is not None:
        found.append(Verdict("latency", point.get("latency_ms"), limit, _milliseconds))
    if (limit := limits.get("drop")) is not None:
        write, known = unit.drop_with_unit, bounds(point)
        if point["name"] == record["baseline"]["name"]:
            known = (0.0, 0.0)
        found.append(Verdict("drop", point.get("drop"), limit, write, True, known))
    return found


def _milliseconds(value: float) -> str:
    return f"{units.milliseconds(value)} ms"


def shown(record: Study) -> Point | None:
    """The point that the report is about: the best, else the one that comes nearest to the budget,
    else (nothing but the baseline was measured) None."""
    name = record["best"] or (study.others(record) and record["nearest"])
    everything = [record["baseline"], *study.others(record)]
    return next((point for point in everything if point["name"] == name), None)
