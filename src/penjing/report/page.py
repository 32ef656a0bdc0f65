"""The study as one HTML page that opens from disk, with nothing to fetch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import plotly.graph_objects as go
import plotly.io
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from penjing import files, units
from penjing.report import plots
from penjing.report.comparison import Difference, compare
from penjing.report.contributions import contributions
from penjing.report.headline import headline
from penjing.report.study import Point, Study, others, predictions, read, speedup

HERE = Path(__file__).parent
BADGES = {"met": "met", "missed": "missed", "cannot be told": "open"}
"""CSS class of each state of a limit."""

# The buttons are listed, since plotly's own choice has one that uploads the plot to its makers.
PLOTLY = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
}


@dataclass(frozen=True)
class Column:
    """A column of figures: ``value`` takes it from a point (None where it was not measured)."""

    title: str
    unit: str
    value: Callable[[Point], float | None]
    write: Callable[[float], str]

    def text(self, point: Point) -> str:
        value = self.value(point)
        return units.MISSING if value is None else self.write(value)


def write(study: Path, target: Path, *, renews: bool = False) -> None:
    """Write the report on the study in the folder ``study`` to the HTML file ``target`` (4 to 5 MB,
    nearly all of it plotly.js). Links lead from ``target``'s folder to the study's artifacts. While
    it is open, a page that ``renews`` is read again from time to time.

    Raises PenjingError where ``study`` holds no readable ``frontier.json``.
    """
    record = read(study)
    unit = _score_unit(record)
    said = headline(record, unit)
    shown = said.point or record["baseline"]
    differences = compare(record["baseline"], shown)
    text = _template().render(
        study=record,
        renews=renews,
        predictions=predictions(study, shown),
        as_yaml=as_yaml,
        share=share,
        headline=said,
        badges=BADGES,
        unit=unit,
        units=units,
        points=[record["baseline"], *others(record)],
        columns=_columns(unit),
        differences=differences,
        shown=shown,
        contributions=lambda point: contributions(point, record["baseline"]),
        describe=describe,
        link=lambda point: _link(study, target, point),
        figures=_figures(record, shown, unit, differences),
        plotly=Markup(get_plotlyjs()),
        style=_asset("page.css"),
        script=_asset("page.js"),
        below=plots.below(record, shown),
    )
    files.write_text(target, text)


def _score_unit(study: Study) -> units.ScoreUnit:
    points = [study["baseline"], *study["points"]]
    return units.ScoreUnit.of(point.get(key) for point in points for key in ("score", "test_score"))


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["signed"] = units.signed
    return environment.get_template("page.html.jinja")


def _asset(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _columns(unit: units.ScoreUnit) -> list[Column]:
    def measured(field: str) -> Callable[[Point], float | None]:
        return lambda point: point.get(field)

    return [
        Column("packed", "KB", measured("packed_bytes"), units.kilobytes),
        Column("ONNX", "KB", measured("onnx_bytes"), units.kilobytes),
        Column("params", "", measured("params"), units.number),
        Column("MACs", "M", measured("macs"), units.millions),
        Column("latency", "ms", measured("latency_ms"), units.milliseconds),
        Column("10 %", "ms", measured("latency_p10_ms"), units.milliseconds),
        Column("90 %", "ms", measured("latency_p90_ms"), units.milliseconds),
        Column("speed", "×", speedup, lambda value: units.number(value, 2)),
        Column("peak RAM", "MB", measured("peak_rss_bytes"), units.megabytes),
        Column("validation", unit.name, measured("score"), unit.text),
        Column("drop", unit.difference, measured("drop"), unit.text),
        Column("at least", unit.difference, measured("drop_low"), unit.text),
        Column("at most", unit.difference, measured("drop_high"), unit.text),
        Column("divergence", "", measured("divergence"), lambda value: units.number(value, 4)),
        Column("test", unit.name, measured("test_score"), unit.text),
        Column("test drop", unit.difference, measured("test_drop"), unit.text),
        Column("at most", unit.difference, measured("test_drop_high"), unit.text),
    ]


def describe(layers: list[dict[str, Any]], field: str) -> str:
    """``field`` of the layers that one layer has become: ``16×3×3×3 + 16×16×1×1``."""
    written = []
    for layer in layers:
        value = layer.get(field)
        if isinstance(value, list | tuple):
            written.append("×".join(map(str, value)))
        elif isinstance(value, float):
            written.append(units.number(100 * value, 1))
        else:
            written.append(units.MISSING if value is None else str(value))
    return " + ".join(written) or "gone"


def as_yaml(recipe: dict[str, Any] | None) -> str:
    """The stages of ``recipe`` as a recipe file has them; nothing for the original."""
    stages = (recipe or {}).get("stages")
    return yaml.safe_dump({"stages": stages}, sort_keys=False) if stages else ""


def share(row: list[int], count: int) -> float:
    """The share of ``count`` in the images of ``row``, 0 for a class without images."""
    return count / max(sum(row), 1)


def _link(study: Path, target: Path, point: Point) -> str | None:
    """The way from the page to the point's folder, if it was kept."""
    if not point.get("folder"):
        return None
    folder = (Path(study) / point["folder"]).resolve()
    return quote(Path(os.path.relpath(folder, Path(target).resolve().parent)).as_posix()) + "/"


def _figures(
    study: Study, shown: Point, unit: units.ScoreUnit, differences: list[Difference]
) -> dict[str, Markup]:
    figures = {
        name: plots.frontier(study, shown, axis, unit)
        for name, axis in (("size", plots.SIZE), ("latency", plots.LATENCY))
        if plots.measured(study, axis)
    }
    if shown is not study["baseline"] and differences:
        figures["layers"] = plots.layers(differences, shown["name"])
    return {name: _embedded(figure, name) for name, figure in figures.items()}


def _embedded(figure: go.Figure, name: str) -> Markup:
    """The figure's HTML; plotly escapes what could end a script in the JSON it writes."""
    return Markup(
        plotly.io.to_html(
            figure,
            config=PLOTLY,
            include_plotlyjs=False,
            full_html=False,
            div_id=f"plot-{name}",
            default_height=f"{figure.layout.height}px",
        )
    )
