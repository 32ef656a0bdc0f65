"""The study as a table for the terminal, at most 100 columns wide."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from penjing import units
from penjing.report.headline import headline
from penjing.report.study import Point, Study, others, speedup

NAME_WIDTH = 36
"""Width that the figures leave of 100 columns; longer names are folded."""

CAPTION = (
    "★ best   ● on the frontier   1 KB = 1000 bytes\n"
    "at most: upper bound of the drop, for all points together with 95 %"
)


def table(study: Study) -> Table:
    """One row a point, the baseline first, then by packed size.

    Sizes are in KB of 1000 bytes, latencies are medians in ms with the speed-up against the
    original measured in the same run, scores are those on the validation images, drops have an upper
    bound.
    """
    points = [study["baseline"], *others(study)]
    unit = units.ScoreUnit.of(point["score"] for point in points)
    said = headline(study, unit)
    found = Table(
        title=Text(f"{said.text}\n{said.status}"),
        title_justify="left",
        caption=Text(CAPTION),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    found.add_column("", no_wrap=True)
    found.add_column("point", max_width=NAME_WIDTH, overflow="fold")
    for title in (
        "packed KB",
        "ONNX KB",
        "ms",
        "speed",
        _with(unit.name, "score"),
        "drop",
        "at most",
    ):
        found.add_column(title, justify="right", no_wrap=True)
    for point in points:
        found.add_row(*_cells(point, study, unit), style=_style(point, study))
    return found


def _with(unit: str, title: str) -> str:
    return f"{title} {unit}".strip()


def _cells(point: Point, study: Study, unit: units.ScoreUnit) -> list[Text | str]:
    latency, gain = point.get("latency_ms"), speedup(point)
    return [
        _mark(point, study),
        Text(point["name"]),
        units.kilobytes(point["packed_bytes"]),
        units.kilobytes(point["onnx_bytes"]),
        units.MISSING if latency is None else units.milliseconds(latency),
        units.MISSING if gain is None else units.times(gain),
        unit.text(point["score"]),
        unit.text(point["drop"]),
        units.MISSING if point.get("drop_high") is None else unit.text(point["drop_high"]),
    ]


def _mark(point: Point, study: Study) -> str:
    if point["name"] == study["best"]:
        return "★"
    return "●" if point["name"] in study["frontier"] else ""


def _style(point: Point, study: Study) -> str:
    if point["name"] == study["best"]:
        return "bold green"
    return "" if point["name"] in study["frontier"] else "dim"
