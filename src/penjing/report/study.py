"""The record that an exploration leaves, ``frontier.json``, and the points in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from penjing.errors import PenjingError

Point = dict[str, Any]
Study = dict[str, Any]

VERSION = 1


def read(folder: Path) -> Study:
    """The study in ``folder``.

    Raises PenjingError where ``frontier.json`` is missing, is no JSON, or is of another version.
    """
    path = Path(folder) / "frontier.json"
    if not path.is_file():
        raise PenjingError(
            f"{path} does not exist: expected the folder of a study, as penjing explore writes it; "
            "run penjing explore first"
        )
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PenjingError(
            f"{path} is not readable as JSON ({error}): run penjing explore on it again"
        ) from error
    version = study.get("version") if isinstance(study, dict) else None
    if version != VERSION:
        raise PenjingError(
            f"{path} has version {version}, expected {VERSION}: "
            "run penjing explore of this release on it again"
        )
    return study


def predictions(folder: Path, point: Point) -> dict[str, Any] | None:
    """Read the predictions of ``point`` of the study in ``folder``; None where there are none."""
    path = Path(folder) / (point.get("folder") or "") / "predictions.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def others(study: Study) -> list[Point]:
    """Every measured point but the baseline, smallest packed file first."""
    baseline = study["baseline"]["name"]
    points = [point for point in study["points"] if point["name"] != baseline]
    return sorted(points, key=lambda point: point["packed_bytes"])


def best(study: Study) -> Point | None:
    """The point that the exploration chose, or None where it chose none."""
    everything = [study["baseline"], *others(study)]
    return next((point for point in everything if point["name"] == study["best"]), None)


def speedup(point: Point) -> float | None:
    """How many times faster than the fp32 model that was measured in turns with it."""
    latency, reference = point.get("latency_ms"), point.get("reference_latency_ms")
    return reference / latency if latency and reference else None
