"""The page's plots, as plotly figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from penjing import units
from penjing.report.comparison import Difference
from penjing.report.study import Point, Study, others, speedup
from penjing.report.verdict import bounds

# Okabe and Ito's palette: told apart with every common kind of colour blindness.
BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c959f"
BLACK = "#1f2328"
MARKERS: dict[str, dict[str, Any]] = {
    "dominated": {"color": GREY, "size": 8, "opacity": 0.45},
    "on the frontier": {"color": BLUE, "size": 10},
    "original": {"color": PURPLE, "size": 11, "symbol": "square"},
    "best": {"color": VERMILION, "size": 16, "symbol": "star"},
    "nearest to the budget": {"color": VERMILION, "size": 16, "symbol": "star-open"},
}
GRID = "rgba(140,149,159,0.25)"
LONGEST_LABEL = 40
LOWEST = 0.88
"""Share of the original's score where plots begin, so that a useless point does not flatten all."""


@dataclass(frozen=True)
class Axis:
    """An axis that the score is plotted against: ``field`` of a point, ``limit`` of the budget."""

    field: str
    limit: str
    title: str
    divisor: float
    log: bool
    spread: tuple[str, str] | None = None

    def of(self, point: Point) -> float | None:
        value = point.get(self.field)
        return None if value is None else value / self.divisor


SIZE = Axis("packed_bytes", "size", "packed file, KB (log scale)", 1e3, log=True)
LATENCY = Axis(
    "latency_ms",
    "latency",
    "latency of one image, ms",
    1.0,
    log=False,
    spread=("latency_p10_ms", "latency_p90_ms"),
)


def frontier(study: Study, shown: Point, axis: Axis, unit: units.ScoreUnit) -> go.Figure:
    """Score against ``axis`` for every point (at least one) that was measured on it, with a star at
    ``shown``."""
    points = measured(study, axis)
    figure = go.Figure(layout=_layout(axis.title, f"validation score {unit.name}".strip()))
    figure.add_trace(_line(not_dominated(points, axis), axis, unit))
    for name, marker in MARKERS.items():
        members = [point for point in points if _group(point, study, shown) == name]
        if members:
            figure.add_trace(_markers(name, members, marker, axis, unit))
    seen = [point for point in points if point not in below(study, shown)]
    _limits(figure, study, shown, seen or points, axis, unit)
    for point in points:
        if point["name"] in (shown["name"], study["baseline"]["name"]):
            figure.add_annotation(_label(point, axis, unit))
    return figure


def measured(study: Study, axis: Axis) -> list[Point]:
    """The points that have a value on ``axis``."""
    return [point for point in [study["baseline"], *others(study)] if axis.of(point) is not None]


def below(study: Study, shown: Point) -> list[Point]:
    """The points whose score is so low that the plots begin above them, and above ``shown`` not."""
    lowest = min(LOWEST * study["baseline"]["score"], shown["score"])
    return [point for point in others(study) if 0 <= point["score"] < lowest]


def not_dominated(points: list[Point], axis: Axis) -> list[Point]:
    """Those that no other beats in both the measure (less) and the score (more), by measure."""
    ordered = sorted(points, key=lambda p: (axis.of(p), -p["score"]))
    found: list[Point] = []
    for point in ordered:
        if not found or point["score"] > found[-1]["score"]:
            found.append(point)
    return found


def layers(differences: list[Difference], name: str) -> go.Figure:
    """Weight bytes of each layer, in the original and in the point ``name``, first layer on top."""
    names = [escape(difference.name) for difference in differences]
    figure = go.Figure(layout=_layout("weights, KB before entropy coding", ""))
    for title, color, sizes in (
        ("original", GREY, [difference.bytes_before for difference in differences]),
        (escape(name), BLUE, [difference.bytes_after for difference in differences]),
    ):
        figure.add_bar(
            y=names,
            x=[size / 1e3 for size in sizes],
            name=title,
            orientation="h",
            marker_color=color,
            hovertemplate="%{x:,.1f} KB",
        )
    figure.update_layout(height=120 + 26 * len(names), bargap=0.25, hovermode="y unified")
    # As categories even where all names are numbers, as in an nn.Sequential.
    figure.update_yaxes(autorange="reversed", type="category", dtick=1, showgrid=False)
    return figure


def _layout(x: str, y: str) -> go.Layout:
    return go.Layout(
        template="simple_white",
        # The page behind shows through, whether light or dark; its script colours the text.
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": BLACK},
        xaxis={"title": x, "showgrid": True, "gridcolor": GRID, "automargin": True},
        yaxis={"title": y, "showgrid": True, "gridcolor": GRID, "automargin": True},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        modebar={"orientation": "v", "bgcolor": "rgba(0,0,0,0)"},
        margin={"l": 10, "r": 44, "t": 10, "b": 10},
        height=460,
        hoverlabel={"bgcolor": "white", "font": {"color": BLACK}, "align": "left"},
    )


def _group(point: Point, study: Study, shown: Point) -> str:
    """The legend entry, of ``MARKERS``, that ``point`` belongs to."""
    if point["name"] == study["baseline"]["name"]:
        return "original"
    if point["name"] == shown["name"]:
        return "best" if study["best"] else "nearest to the budget"
    return "on the frontier" if point["name"] in study["frontier"] else "dominated"


def _line(points: list[Point], axis: Axis, unit: units.ScoreUnit) -> go.Scatter:
    return go.Scatter(
        x=[axis.of(point) for point in points],
        y=[unit.scaled(point["score"]) for point in points],
        mode="lines",
        line={"color": BLUE, "width": 1.5},
        name="best of these two measures",
        hoverinfo="skip",
    )


def _markers(
    name: str, points: list[Point], marker: dict, axis: Axis, unit: units.ScoreUnit
) -> go.Scatter:
    return go.Scatter(
        x=[axis.of(point) for point in points],
        y=[unit.scaled(point["score"]) for point in points],
        mode="markers",
        marker=marker,
        error_x=_spread(points, axis, marker["color"]),
        error_y=None if name == "dominated" else _doubt(points, unit, marker["color"]),
        name=name,
        hovertext=[hover(point, unit) for point in points],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _spread(points: list[Point], axis: Axis, color: str) -> dict | None:
    if axis.spread is None:
        return None
    low, high = axis.spread
    return {
        "array": [_difference(p.get(high), p[axis.field]) for p in points],
        "arrayminus": [_difference(p[axis.field], p.get(low)) for p in points],
        "symmetric": False,
        "color": color,
        "thickness": 1,
        "width": 2,
    }


def _doubt(points: list[Point], unit: units.ScoreUnit, color: str) -> dict:
    """How much lower or higher the scores may be for all that the drops' bounds tell."""
    ends = [_ends(point, unit) or (point["score"], point["score"]) for point in points]
    pairs = list(zip(points, ends, strict=True))
    return {
        "array": [unit.scaled(max(high - point["score"], 0.0)) for point, (_, high) in pairs],
        "arrayminus": [unit.scaled(max(point["score"] - low, 0.0)) for point, (low, _) in pairs],
        "symmetric": False,
        "color": color,
        "thickness": 1,
        "width": 3,
    }


def _ends(point: Point, unit: units.ScoreUnit) -> tuple[float, float] | None:
    """Between which the score lies, for all that the drop's bounds tell."""
    known = bounds(point)
    if known is None:
        return None
    low, high = (point["score"] + point["drop"] - drop for drop in reversed(known))
    return (max(low, 0.0), min(high, 1.0)) if unit.percent else (low, high)


def _difference(high: float | None, low: float | None) -> float:
    return 0.0 if high is None or low is None else max(high - low, 0.0)


def hover(point: Point, unit: units.ScoreUnit) -> str:
    """Every figure of ``point``, as plotly's subset of HTML."""
    lines = [
        ("packed", units.size(point["packed_bytes"])),
        ("ONNX", units.size(point["onnx_bytes"])),
        ("parameters", units.number(point["params"])),
        ("MACs", f"{units.millions(point['macs'])} M"),
        ("latency", _latency(point)),
        ("peak RAM", _optional(point.get("peak_rss_bytes"), units.size)),
        ("validation score", unit.with_unit(point["score"])),
        ("drop", _drop(point, "drop", unit)),
        ("divergence", _optional(point.get("divergence"), lambda value: units.number(value, 4))),
        ("test score", _optional(point.get("test_score"), unit.with_unit)),
        ("test drop", _drop(point, "test_drop", unit)),
    ]
    body = "<br>".join(f"{name}: {text}" for name, text in lines)
    return f"<b>{escape(point['name'])}</b><br>{body}"


def _drop(point: Point, field: str, unit: units.ScoreUnit) -> str:
    text, known = _optional(point.get(field), unit.drop_with_unit), bounds(point, field)
    return f"{text} ({unit.text(known[0])} to {unit.text(known[1])})" if known else text


def _optional(value: float | None, write) -> str:
    return units.MISSING if value is None else write(value)


def _latency(point: Point) -> str:
    if point.get("latency_ms") is None:
        return units.MISSING
    spread = [
        _optional(point.get(f"latency_{end}_ms"), units.milliseconds) for end in ("p10", "p90")
    ]
    gain = _optional(speedup(point), units.times)
    return f"{units.milliseconds(point['latency_ms'])} ms ({' to '.join(spread)}), {gain} as fast"


def _limits(
    figure: go.Figure,
    study: Study,
    shown: Point,
    points: list[Point],
    axis: Axis,
    unit: units.ScoreUnit,
) -> None:
    """Draw the budget's limits, and fix the axes so that they reach across."""
    budget = study["budget"] or {}
    limit, drop = budget.get(axis.limit), budget.get("drop")
    right = None if limit is None else limit / axis.divisor
    floor = None if drop is None else unit.scaled(study["baseline"]["score"] - drop)
    xs = _range(_extent(points, axis), right, axis.log)
    scores = [*(point["score"] for point in points), *(_ends(shown, unit) or ())]
    ys = _range([unit.scaled(score) for score in scores], floor, log=False)
    if right is not None:
        title = f"at most {right:,.4g} {'KB' if axis is SIZE else 'ms'}"
        figure.add_trace(_limit([right, right], list(ys), title, "dash"))
    if floor is not None:
        title = f"at least {floor:,.4g} {unit.name}".strip()
        figure.add_trace(_limit(list(xs), [floor, floor], title, "dot"))
    if axis.log:
        ticks = [mantissa * 10**power for power in range(-3, 9) for mantissa in (1, 2, 5)]
        figure.update_xaxes(
            type="log",
            range=[math.log10(x) for x in xs],
            tickvals=ticks,
            ticktext=[f"{tick:,g}" for tick in ticks],
        )
    else:
        figure.update_xaxes(range=xs)
    figure.update_yaxes(range=ys)


def _limit(x: list[float], y: list[float], name: str, dash: str) -> go.Scatter:
    line = {"color": GREEN, "width": 1.5, "dash": dash}
    return go.Scatter(x=x, y=y, mode="lines", line=line, name=name, hoverinfo="name")


def _extent(points: list[Point], axis: Axis) -> list[float]:
    """All values on ``axis`` that are to be seen, the ends of the error bars too."""
    fields = (axis.field, *(axis.spread or ()))
    found = [point.get(field) for point in points for field in fields]
    return [value / axis.divisor for value in found if value is not None]


def _range(values: list[float], limit: float | None, log: bool) -> tuple[float, float]:
    """From below the least to above the greatest. A limit is included unless the points would be
    squeezed into less than half of a linear axis."""
    low, high = min(values), max(values)
    if limit is not None and (log or abs(limit - (low + high) / 2) <= 1.5 * (high - low)):
        low, high = min(low, limit), max(high, limit)
    if log:
        margin = max((high / low) ** 0.08, 1.1)
        return low / margin, high * margin
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def _label(point: Point, axis: Axis, unit: units.ScoreUnit) -> dict:
    x = axis.of(point)
    assert x is not None
    name = point["name"]
    short = name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"
    return {
        "x": math.log10(x) if axis.log else x,
        "y": unit.scaled(point["score"]),
        "text": escape(short),
        "showarrow": False,
        "yshift": -18,
        "font": {"size": 12, "color": BLACK},
        "bgcolor": "rgba(255,255,255,0.8)",
    }
