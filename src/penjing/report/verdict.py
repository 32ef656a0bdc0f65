"""Whether a point meets the budget, and how near it came where it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penjing.report import study, units
from penjing.report.study import Point, Study


@dataclass(frozen=True)
class Verdict:
    """One limit of the budget (``found`` and ``limit`` in bytes, ms or score) beside what was
    measured. ``found`` is None where it was not measured; such a limit is not met."""

    name: str
    found: float | None
    limit: float
    write: Callable[[float], str]

    @property
    def met(self) -> bool:
        return self.found is not None and self.found <= self.limit + 1e-12

    def __str__(self) -> str:
        found = "not measured" if self.found is None else self.write(self.found)
        return f"{self.name} {found} of at most {self.write(self.limit)}"


def verdicts(record: Study, point: Point, unit: units.ScoreUnit) -> list[Verdict]:
    """One verdict for every limit that the budget sets on size, latency or drop."""
    limits = record["budget"] or {}
    asked = {
        "size": (point.get("packed_bytes"), units.size),
        "latency": (point.get("latency_ms"), lambda ms: f"{units.milliseconds(ms)} ms"),
        "drop": (point.get("drop"), unit.drop_with_unit),
    }
    return [
        Verdict(name, found, limits[name], write)
        for name, (found, write) in asked.items()
        if limits.get(name) is not None
    ]


def shown(record: Study) -> Point | None:
    """The point that the report is about: the best, else the one that comes nearest to the budget,
    else (nothing but the baseline was measured) None."""
    name = record["best"] or (study.others(record) and record["nearest"])
    everything = [record["baseline"], *study.others(record)]
    return next((point for point in everything if point["name"] == name), None)
