"""Contributions: the change that each stage of a point's recipe made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penjing.report.study import Point

MEASURES = ("params", "macs", "packed_bytes", "latency_ms", "score")


@dataclass(frozen=True)
class Contribution:
    """One stage, by the names of ``MEASURES``: ``after`` is what was measured after it, ``change``
    that minus what was measured before it. None where either was not measured."""

    stage: str
    techniques: str
    after: dict[str, float | None]
    change: dict[str, float | None]


def contributions(point: Point, baseline: Point) -> list[Contribution]:
    """Stage by stage from ``baseline`` to ``point``; a measure's changes add up to the whole."""
    found, before = [], baseline
    measured = point.get("contributions") or []
    recipe = (point.get("recipe") or {}).get("stages") or []
    for index, stage in enumerate(measured):
        # The recipe knows the settings; a record of some of its stages only has their names.
        made = recipe[index] if len(recipe) == len(measured) else stage
        after = {measure: stage.get(measure) for measure in MEASURES}
        change = {measure: _change(after[measure], before.get(measure)) for measure in MEASURES}
        found.append(Contribution(str(stage["stage"]), _names(made), after, change))
        before = stage
    return found


def _change(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _names(stage: dict[str, Any]) -> str:
    """Describe a stage, as ``quantize (weight_bits 4) + training (2 epochs)``."""
    written = []
    for entry in stage.get("techniques") or []:
        for name, settings in entry.items() if isinstance(entry, dict) else [(entry, None)]:
            said = ", ".join(f"{key} {value}" for key, value in (settings or {}).items())
            written.append(f"{name} ({said})" if said else str(name))
    if stage.get("train"):
        epochs = stage["train"].get("epochs", 1)
        written.append(f"training ({epochs:g} {'epoch' if epochs == 1 else 'epochs'})")
    return " + ".join(written)
