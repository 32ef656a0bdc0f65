"""The study: every measured point, on disk as soon as it is measured.

A study folder holds ``frontier.json``, ``report.html``, ``best/`` and ``trials/NAME/`` with the
artifact, ``recipe.yaml`` and ``point.json`` of each point. The points' own files are the truth; all
else is made from them, so a run that is killed loses at most the trial it was in.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from penjing.deploy.artifact import Card
from penjing.errors import PenjingError
from penjing.exploration.budget import Budget

BASELINE = "original"


class Contribution(BaseModel):
    """What the model measured after one stage of the recipe (artifact built and run)."""

    stage: int
    techniques: list[str]
    params: int
    macs: int
    packed_bytes: int
    latency_ms: float
    score: float


class Point(Card):
    """A measured artifact within a study.

    Attributes:
        test_score, test_drop: score and drop on the test part, read once, for frontier points only.
        folder: of the artifact, relative to the study.
        seconds: that making and measuring it took.
        candidate: the settings that exploration chose, from which the recipe was made.
    """

    test_score: float | None = None
    test_drop: float | None = None
    folder: str = ""
    trained: bool = False
    seconds: float = 0.0
    candidate: dict[str, Any] = Field(default_factory=dict)
    contributions: list[Contribution] = Field(default_factory=list)


class Study:
    """A folder of measured points, its frontier, and the best point for a budget.

    Args:
        folder: where the study lives; made if missing, gone on with if it holds a study.
        about: what the study is of (``model``, ``data``, ``key``...); ``key`` must not change, nor
            ``threads`` of the runtime.

    Attributes:
        stopped: whether Ctrl-C ended the search.

    Raises:
        PenjingError: the folder cannot be written, or holds a study of another model or data, or one
            measured with another number of threads.
    """

    def __init__(self, folder: Path, about: dict[str, Any], budget: Budget) -> None:
        self.folder, self.about, self.budget = folder, about, budget
        self.elapsed_s = 0.0
        self.stopped = False
        self.failures: dict[str, str] = {}
        try:
            (folder / "trials").mkdir(parents=True, exist_ok=True)
            (folder / ".writable").write_text("")
            (folder / ".writable").unlink()
        except OSError as error:
            raise PenjingError(
                f"cannot write the study to {folder}: {error.strerror}; choose another with -o"
            ) from error
        self._resume()
        self.points = self._read_points()

    @property
    def baseline(self) -> Point:
        """The original, exported and measured like every other point."""
        return self.points[BASELINE]

    @property
    def frontier(self) -> list[Point]:
        """The points that no other beats in packed bytes, speed and score at once, by size."""
        points = list(self.points.values())
        best = [p for p in points if not any(self._beats(q, p) for q in points)]
        return sorted(best, key=lambda point: (point.packed_bytes, self.speed(point)))

    def _beats(self, a: Point, b: Point) -> bool:
        # Speeds, since milliseconds of different runs also tell how busy the machine was.
        x, y = ((p.packed_bytes, self.speed(p), -p.score) for p in (a, b))
        return x != y and all(i <= j for i, j in zip(x, y, strict=True))

    @property
    def best(self) -> SavedPoint | None:
        """The point to deploy: of those within the budget, the one with the highest score if no drop
        was allowed for, else with the smallest product of bytes and milliseconds; None if the budget
        was met by none."""
        points = [p for p in self.points.values() if not self.excess(p)]
        if not points:
            return None
        if self.budget.drop is None:
            chosen = max(points, key=lambda p: (p.score, -p.packed_bytes))
        else:
            chosen = min(points, key=lambda p: p.packed_bytes * self.speed(p))
        return SavedPoint(chosen, self.folder)

    def speed(self, point: Point) -> float:
        """Latency relative to the original's in the same interleaved run (1 = as fast)."""
        return point.latency_ms / (point.reference_latency_ms or point.latency_ms)

    def excess(self, point: Point) -> dict[str, tuple[float, float]]:
        """The budget's limits that ``point`` exceeds."""
        return self.budget.excess(point.packed_bytes, point.latency_ms, point.drop)

    def nearest(self) -> tuple[Point, dict[str, tuple[float, float]]]:
        """The point that comes nearest to the budget, and the limits it still exceeds."""
        tiny = 1e-3  # a limit of zero drop has no ratio

        def distance(point: Point) -> float:
            over = self.excess(point).values()
            return sum(math.log((found + tiny) / (limit + tiny)) for found, limit in over)

        point = min(self.points.values(), key=distance)
        return point, self.excess(point)

    def add(self, point: Point) -> None:
        """Keep a point: its own file first, then what is made from all."""
        self.points[point.name] = point
        write_json(self.folder / point.folder / "point.json", point.model_dump(mode="json"))
        self.write()

    def write(self) -> None:
        """Write ``study.json``, ``frontier.json`` and ``best/``."""
        state = {"about": self.about, "elapsed_s": self.elapsed_s, "failures": self.failures}
        write_json(self.folder / "study.json", state)
        if BASELINE not in self.points:
            return
        write_json(self.folder / "frontier.json", self.to_dict())
        if self.best is not None:
            self.best.save(self.folder / "best")

    def to_dict(self) -> dict[str, Any]:
        """The study as plain data: what ``frontier.json`` holds."""
        best = self.best
        return {
            "version": 1,
            **self.about,
            "budget": self.budget.model_dump(),
            "elapsed_s": round(self.elapsed_s, 1),
            "baseline": self.baseline.model_dump(mode="json"),
            "best": best.name if best else None,
            "nearest": None if best else self.nearest()[0].name,
            "frontier": [point.name for point in self.frontier],
            "points": [point.model_dump(mode="json") for point in self.points.values()],
            "failures": self.failures,
        }

    def _resume(self) -> None:
        file = self.folder / "study.json"
        if not file.exists():
            return
        state = json.loads(file.read_text())
        if state["about"]["key"] != self.about["key"]:
            raise PenjingError(
                f"{self.folder} holds a study of {state['about']['model']} on "
                f"{state['about']['data']} with other weights or data; choose another folder with -o"
            )
        before, now = (about.get("threads", 1) for about in (state["about"], self.about))
        if before != now:
            raise PenjingError(
                f"{self.folder} holds a study measured with {before} threads of the runtime, not "
                f"{now}; give --threads {before}, or choose another folder with -o"
            )
        self.about = state["about"] | self.about
        self.elapsed_s, self.failures = state["elapsed_s"], state["failures"]

    def _read_points(self) -> dict[str, Point]:
        files = sorted((self.folder / "trials").glob("*/point.json"), key=os.path.getmtime)
        points = [Point.model_validate_json(file.read_text()) for file in files]
        return {point.name: point for point in points}


class SavedPoint:
    """A point together with the study folder its artifact lies in."""

    def __init__(self, point: Point, study: Path) -> None:
        self.point, self.folder = point, study / point.folder

    @property
    def name(self) -> str:
        """The point's name."""
        return self.point.name

    def save(self, folder: str | Path) -> None:
        """Copy ``model.onnx``, ``model.penjing``, ``card.json`` and ``recipe.yaml`` to ``folder``."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name in ("model.onnx", "model.penjing", "card.json", "recipe.yaml"):
            if (self.folder / name).exists():
                partial = target / f".{name}"
                shutil.copyfile(self.folder / name, partial)
                partial.replace(target / name)


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that a reader, or a later run after a kill, never sees half of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1))
    partial.replace(path)
