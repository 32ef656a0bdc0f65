"""Sum a study up in a sentence and a few figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penjing import units
from penjing.report.study import Point, Study, speedup
from penjing.report.verdict import Verdict, bounds, shown, verdicts

if TYPE_CHECKING:
    from penjing.tasks.interval import State

NOISE = 1.05
"""Medians whose ratio is below cannot be told apart on a machine that does other things too."""
OVERFIT = 0.02
"""A baseline this much better on validation than on test has probably seen the validation images:
well beyond what the choice of a thousand images explains."""


@dataclass(frozen=True)
class Figure:
    """A number to be read first: ``value`` large, ``label`` and ``detail`` around it."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Headline:
    """``point`` is None when there is nothing beside the baseline to speak about."""

    text: str
    point: Point | None
    status: str
    state: State | None
    figures: list[Figure] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    warning: str | None = None


def headline(study: Study, unit: units.ScoreUnit) -> Headline:
    """The best point of ``study`` against its baseline, and against the budget."""
    baseline, point = study["baseline"], shown(study)
    warning = _seen_validation(baseline, unit)
    if point is None:
        return Headline(
            "Nothing but the baseline has been measured yet.",
            None,
            "No point to judge yet",
            None,
            warning=warning,
        )
    judged = verdicts(study, point, unit)
    return Headline(
        _sentence(study, point, unit),
        point,
        _status(study, judged),
        _state(judged),
        _figures(point, baseline, unit),
        judged,
        warning,
    )


def _sentence(study: Study, point: Point, unit: units.ScoreUnit) -> str:
    baseline = study["baseline"]
    if point["name"] == baseline["name"]:
        closest = "the best point" if study["best"] else "nearest to the budget"
        return f"The original is {closest}: no compressed one was better."
    parts = [_ratio(baseline["packed_bytes"] / point["packed_bytes"], "smaller", "larger")]
    gain = speedup(point)
    if gain is not None:
        parts.append(_speed(gain))
    said = f"{', '.join(parts)}, {_change(point['drop'], unit)}"
    return said if study["best"] else f"Nearest to the budget: {said}"


def _ratio(value: float, better: str, worse: str) -> str:
    return f"{units.times(value)} {better}" if value >= 1 else f"{units.times(1 / value)} {worse}"


def _speed(gain: float) -> str:
    """A speed, which is the same within what two measurements of one file may differ by."""
    return "as fast" if 1 / NOISE < gain < NOISE else _ratio(gain, "faster", "slower")


def _change(drop: float, unit: units.ScoreUnit) -> str:
    if unit.text(abs(drop)).strip("0.") == "":
        return "score unchanged"
    return f"score {unit.drop_with_unit(abs(drop))} {'lower' if drop > 0 else 'higher'}"


def _state(judged: list[Verdict]) -> State | None:
    """State of the whole budget."""
    states = {verdict.state for verdict in judged}
    ordered: tuple[State, ...] = ("missed", "cannot be told", "met")
    return next((state for state in ordered if state in states), None)


def _status(study: Study, judged: list[Verdict]) -> str:
    if not judged:
        return "No budget was given"
    missed = [str(verdict) for verdict in judged if verdict.state == "missed"]
    open_ones = [str(verdict) for verdict in judged if verdict.state == "cannot be told"]
    if not study["best"]:
        found = ", ".join(missed + open_ones)
        return f"No point meets the budget; the nearest has {found}"
    if missed:
        return f"The best point misses {', '.join(missed)}"
    if open_ones:
        return f"Whether the budget is met cannot be told: {', '.join(open_ones)}"
    return "Budget met"


def _figures(point: Point, baseline: Point, unit: units.ScoreUnit) -> list[Figure]:
    figures = [
        _size("Packed file", point["packed_bytes"], baseline["packed_bytes"]),
        _size("ONNX file", point["onnx_bytes"], baseline["onnx_bytes"]),
    ]
    gain = speedup(point)
    if gain is not None:
        before = f"from {units.milliseconds(point['reference_latency_ms'])} ms in the same run"
        now = f"{units.milliseconds(point['latency_ms'])} ms"
        detail = f"{before}: {_speed(gain)}"
        figures.append(Figure("Latency, one image", now, detail))
    figures.append(_score("Score, validation", point, baseline, unit, "score", "drop"))
    if point.get("test_score") is not None and baseline.get("test_score") is not None:
        figures.append(_score("Score, test", point, baseline, unit, "test_score", "test_drop"))
    return figures


def _size(label: str, now: float, before: float) -> Figure:
    detail = f"from {units.size(before)}: {_ratio(before / now, 'smaller', 'larger')}"
    return Figure(label, units.size(now), detail)


def _score(
    label: str, point: Point, baseline: Point, unit: units.ScoreUnit, score: str, drop: str
) -> Figure:
    now, before = point[score], baseline[score]
    detail = f"from {unit.with_unit(before)}: {_change(before - now, unit)}"
    if known := bounds(point, drop):
        low, high = map(unit.text, known)
        detail += f" (drop between {low} and {high} {unit.difference}".rstrip() + ")"
    return Figure(label, unit.with_unit(now), detail)


def _seen_validation(baseline: Point, unit: units.ScoreUnit) -> str | None:
    test = baseline.get("test_score")
    if test is None or baseline["score"] - test <= OVERFIT:
        return None
    return (
        f"The original scores {unit.with_unit(baseline['score'])} on the validation images but "
        f"{unit.with_unit(test)} on the test images. It has probably been trained on the "
        "validation images, so drops on validation overstate the loss on new images: "
        "trust the test column."
    )
