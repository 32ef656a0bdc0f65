"""Studies: all measured points, written to disk as soon as they are measured.

A study folder holds ``frontier.json``, ``report.html``, ``best/`` and ``trials/NAME/`` with the
artifact, ``recipe.yaml`` and ``point.json`` of each point, or ``failure.json`` and ``error.txt`` where
there is none. The trials' own files are the source; all else is made from them, so a run that is
killed loses at most the trial it was in.
"""

from __future__ import annotations

import filecmp
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError

from penjing import files
from penjing.devices.artifact import Card
from penjing.errors import PenjingError
from penjing.exploration import attempt
from penjing.exploration.budget import Budget
from penjing.exploration.candidates import Candidate
from penjing.progress import say
from penjing.tasks import interval
from penjing.tasks.interval import State

BASELINE = "original"
LOCK = ".lock"
SAVED = ("model.onnx", "model.penjing", "card.json", "recipe.yaml")
"""Names of a point's files that are deployed, or that describe the deployed ones."""


class Contribution(BaseModel):
    """Figures of the model after one stage of the recipe (artifact built and run)."""

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
        test_drop_low, test_drop_high: one-sided 95 % confidence bounds of ``test_drop``.
        folder: folder of the artifact, relative to the study.
        seconds: time that compression and measurement took.
        candidate: the settings that exploration chose, from which the recipe was made.
        key: key of the study that the point belongs to.
        number: number of points that were measured before.
    """

    test_score: float | None = None
    test_drop: float | None = None
    test_drop_low: float | None = None
    test_drop_high: float | None = None
    folder: str = ""
    trained: bool = False
    seconds: float = 0.0
    candidate: dict[str, Any] = Field(default_factory=dict)
    contributions: list[Contribution] = Field(default_factory=list)
    key: str = ""
    number: int = 0


class Study:
    """A folder of measured points, its frontier, and the best point for a budget.

    Args:
        folder: folder of the study; made if missing, resumed if it holds a study.
        about: description of the study (``model``, ``data``, ``key``...); ``key`` must not change,
            nor ``threads`` of the runtime.

    Attributes:
        failures: reasons why candidates failed, by name; they are not tried again.
        dropped: reasons why candidates were not trained, under this budget.
        running: whether a search works on the study.
        stopped: whether Ctrl-C ended the search.

    Raises:
        PenjingError: the folder cannot be written, or holds a study of another model or data, or one
            measured with another number of threads.
    """

    def __init__(self, folder: Path, about: dict[str, Any], budget: Budget) -> None:
        self.folder, self.about, self.budget = folder, about, budget
        self.elapsed_s = 0.0
        self.running = self.stopped = False
        self.failures: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        try:
            (folder / "trials").mkdir(parents=True, exist_ok=True)
            (folder / ".writable").write_text("")
            (folder / ".writable").unlink()
        except OSError as error:
            raise _unwritable(folder, error) from error
        known = self._resume()
        self.points = self._read_points(known)
        self.failures |= attempt.failures(folder / "trials")
        self.elapsed_s = max(self.elapsed_s, sum(point.seconds for point in self.points.values()))

    @property
    def baseline(self) -> Point:
        """Point of the original, exported and measured like every other."""
        return self.points[BASELINE]

    @property
    def compressed(self) -> list[Point]:
        """All points except the original."""
        return [point for point in self.points.values() if point.name != BASELINE]

    @property
    def frontier(self) -> list[Point]:
        """Pareto-optimal points in packed bytes, speed and score, sorted by size."""
        points = list(self.points.values())
        best = [p for p in points if not any(self._beats(q, p) for q in points)]
        return sorted(best, key=lambda point: (point.packed_bytes, self.speed(point)))

    def _beats(self, a: Point, b: Point) -> bool:
        # Relative speeds, since latencies of different runs also depend on the machine's load.
        x, y = ((p.packed_bytes, self.speed(p), -p.score) for p in (a, b))
        return x != y and all(i <= j for i, j in zip(x, y, strict=True))

    @property
    def best(self) -> SavedPoint | None:
        """Point to deploy, None if none is within the budget.

        With a limit of drop: the least product of bytes and latency among the points that surely meet
        the budget. If the images are too few for any to be sure, among those that may meet it: the
        least such product if their classes surely agree with the original's to within the limit, else
        the least divergence from the original. The original itself if there is no other.

        Without such a limit: the least drop; among the points that the images cannot tell from that
        one, the least divergence from the original.
        """
        if self.budget.drop is None:
            chosen = self._least_lost([p for p in self.points.values() if not self.excess(p)])
        else:
            chosen = self._cheapest([p for p in self.compressed if not self.excess(p)])
            if chosen is None and BASELINE in self.points and not self.excess(self.baseline):
                chosen = self.baseline
        return SavedPoint(chosen, self.folder) if chosen else None

    def _cheapest(self, within: list[Point]) -> Point | None:
        sure = [point for point in within if self.state(point) == "met"]
        limit, judged = self.budget.drop or 0.0, len(self.compressed)
        sure = sure or [point for point in within if point.surely_agrees(limit, judged)]
        if sure:
            return min(sure, key=lambda point: point.packed_bytes * self.speed(point))
        return min(within, key=self._divergence, default=None)

    def _least_lost(self, within: list[Point]) -> Point | None:
        if not within:
            return None
        first = min(within, key=lambda point: (point.drop, point.packed_bytes))
        bounds = {point.name: self.bounds(point) for point in within}
        alike = [p for p in within if (known := bounds[p.name]) and known[0] <= first.drop]
        return min(alike or [first], key=lambda p: (self._divergence(p), p.drop, p.packed_bytes))

    def _divergence(self, point: Point) -> float:
        return math.inf if point.divergence is None else point.divergence

    def speed(self, point: Point) -> float:
        """Return the latency relative to the original's in the same interleaved run (1 = as fast)."""
        return point.latency_ms / (point.reference_latency_ms or point.latency_ms)

    def bounds(self, point: Point) -> interval.Bounds | None:
        """Return the bounds of the drop; the upper bounds of all points hold at once with 95 %
        confidence. The original's drop is 0 by definition."""
        return (0.0, 0.0) if point.name == BASELINE else point.bounds(len(self.compressed))

    def state(self, point: Point) -> State:
        """Decide whether ``point`` meets or misses the budget, or the images cannot tell."""
        if self.budget.excess(point.packed_bytes, point.latency_ms, drop=0.0):
            return "missed"
        if self.budget.drop is None or point.name == BASELINE:
            return "met"
        return point.state(self.budget.drop, len(self.compressed))

    def excess(self, point: Point) -> dict[str, tuple[float, float]]:
        """Return the budget's limits that ``point`` exceeds by its measured values."""
        return self.budget.excess(point.packed_bytes, point.latency_ms, point.drop)

    def nearest(self) -> tuple[Point, dict[str, tuple[float, float]]]:
        """Find the point nearest to the budget, and the limits that it exceeds."""
        tiny = 1e-3  # a limit of zero drop has no ratio

        def distance(point: Point) -> float:
            over = self.excess(point).values()
            return sum(math.log((found + tiny) / (limit + tiny)) for found, limit in over)

        point = min(self.points.values(), key=distance)
        return point, self.excess(point)

    def doubt(self) -> str | None:
        """Return a sentence if the images cannot tell whether the best point meets the budget, or the
        test images deny it; else None."""
        best, limit = self.best, self.budget.drop
        if best is None or limit is None:
            return None
        point, judged = best.point, len(self.compressed)
        if point.test_drop_low is not None and point.test_drop_low > limit:
            return (
                f"on the test images {point.name} loses {point.test_drop:.2%} (at least "
                f"{point.test_drop_low:.2%}), more than {limit:.2%}"
            )
        if self.state(point) != "cannot be told":
            return None
        needed, agrees = point.images_needed(limit, judged), point.surely_agrees(limit, judged)
        enough = f"; about {needed:,} would tell" if needed else ""
        why = "classes as the original's" if agrees else "outputs nearest to the original's"
        return (
            f"whether {point.name} loses at most {limit:.2%} cannot be told: it loses "
            f"{interval.described(point, judged)}, and the bounds of all {judged} points are to "
            f"hold at once{enough}; it was chosen for its {why}"
        )

    def add(self, point: Point) -> None:
        """Add a point: write its own file first, then those made from all points."""
        if point.name not in self.points:
            point.key, point.number = self.about["key"], len(self.points)
        self.points[point.name] = point
        file = self.folder / point.folder / "point.json"
        files.write_text(file, json.dumps(point.model_dump(mode="json"), indent=1))
        self.write()

    def fail(self, name: str, folder: str, reason: str, error: BaseException | None = None) -> None:
        """Record why a candidate failed: write its own file in ``trials/folder`` first."""
        self.failures[name] = reason
        attempt.fail(self.folder / "trials" / folder, name, reason, error)
        self.write()

    def write(self) -> None:
        """Write ``study.json``, ``frontier.json`` and, if there is a best point, ``best/``."""
        state = {"about": self.about, "elapsed_s": self.elapsed_s}
        files.write_text(self.folder / "study.json", json.dumps(state, indent=1))
        if BASELINE not in self.points:
            return
        files.write_text(self.folder / "frontier.json", json.dumps(self.to_dict(), indent=1))
        target = self.folder / "best"
        if self.best is None:
            files.remove(target)
        elif not self.best.lies_in(target):
            self.best.put(target)

    def to_dict(self) -> dict[str, Any]:
        """Return the study as plain data, the contents of ``frontier.json``."""
        best = self.best
        return {
            "version": 1,
            **self.about,
            "budget": self.budget.model_dump(),
            "elapsed_s": round(self.elapsed_s, 1),
            "baseline": self._judged(self.baseline),
            "best": best.name if best else None,
            "nearest": None if best else self.nearest()[0].name,
            "doubt": self.doubt(),
            "frontier": [point.name for point in self.frontier],
            "points": [self._judged(point) for point in self.points.values()],
            "failures": self.failures | self.dropped,
        }

    def _judged(self, point: Point) -> dict[str, Any]:
        """Return a point as plain data, with its state and the bounds that decide it."""
        low, high = self.bounds(point) or (None, None)
        state = {"state": self.state(point), "drop_low": low, "drop_high": high}
        return point.model_dump(mode="json") | state

    def _resume(self) -> bool:
        """Read ``study.json``; returns whether it shows that all points belong to this study."""
        file = self.folder / "study.json"
        state = _record(file)
        if state is None or not isinstance(state.get("about"), dict):
            if file.exists():
                say(
                    f"{file} cannot be read; its contents are rebuilt from {self.folder / 'trials'}"
                )
            return False
        self._check(state["about"])
        self.about = state["about"] | self.about
        self.elapsed_s = float(state.get("elapsed_s", 0.0))
        # An earlier version kept failures here, among them decisions by an earlier budget.
        former = dict(state.get("failures", {})).items()
        self.failures = {k: v for k, v in former if not v.startswith("not trained: ")}
        return True

    def _check(self, before: dict[str, Any]) -> None:
        threads, now = (about.get("threads", 1) for about in (before, self.about))
        if before.get("key") != self.about["key"]:
            seeds = before.get("seed"), self.about.get("seed")
            other = "other weights or data"
            if None not in seeds and seeds[0] != seeds[1]:
                other = f"seed {seeds[0]}, not {seeds[1]}"
            raise PenjingError(
                f"{self.folder} holds a study of {before.get('model')} on "
                f"{before.get('data')} with {other}; choose another folder with -o"
            )
        if threads != now:
            raise PenjingError(
                f"{self.folder} holds a study measured with {threads} threads of the runtime, not "
                f"{now}; give --threads {threads}, or choose another folder with -o"
            )

    def _read_points(self, known: bool) -> dict[str, Point]:
        found = {}
        for file in sorted((self.folder / "trials").glob("*/point.json"), key=os.path.getmtime):
            point = _point(file)
            if point is None:
                say(f"{file} or its model is incomplete; {file.parent.name} is measured again")
            elif point.key == self.about["key"] or (known and not point.key):
                found[point.name] = point
        # Files of points that were rewritten are younger than their measurements.
        return dict(sorted(found.items(), key=lambda entry: entry[1].number))


class SavedPoint:
    """A point with the folder of its artifact."""

    def __init__(self, point: Point, study: Path) -> None:
        self.point, self.folder = point, study / point.folder

    @property
    def name(self) -> str:
        """Name of the point."""
        return self.point.name

    def save(self, folder: str | Path) -> None:
        """Copy ``model.onnx``, ``model.penjing``, ``card.json`` and ``recipe.yaml`` to ``folder``, which
        is replaced as a whole.

        Raises:
            PenjingError: ``folder`` holds other files, or cannot be written.
        """
        folder = Path(folder)
        others = {path.name for path in folder.iterdir()} - {*SAVED} if folder.is_dir() else set()
        if others:
            raise PenjingError(
                f"{folder} holds other files ({min(others)}), which would be lost; give a folder "
                "that is empty or new."
            )
        self.put(folder)

    def put(self, folder: Path) -> None:
        """Copy the files as ``save`` does, but replace other files in ``folder``, too."""
        with files.atomic(folder) as partial:
            partial.mkdir()
            for name in SAVED:
                if (self.folder / name).exists():
                    copyfile(self.folder / name, partial / name)

    def lies_in(self, folder: Path) -> bool:
        """Whether ``folder`` holds exactly this point's files."""
        mine = [name for name in SAVED if (self.folder / name).exists()]
        if not folder.is_dir() or {path.name for path in folder.iterdir()} != {*mine}:
            return False
        return not any(filecmp.cmpfiles(folder, self.folder, mine, shallow=False)[1:])


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock the study in ``folder`` while the block runs; the lock ends with the process.

    Raises:
        PenjingError: another process holds it, or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise PenjingError(
            f"another process is exploring in {folder}; wait until it ends, or choose another folder "
            "with -o."
        ) from error
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def _unwritable(folder: Path, error: OSError) -> PenjingError:
    return PenjingError(
        f"cannot write the study to {folder}: {error.strerror}; choose another with -o"
    )


def _record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _point(file: Path) -> Point | None:
    """Read the point in ``file``; None unless it and its model are complete."""
    try:
        point = Point.model_validate_json(file.read_text())
        if point.candidate:  # Earlier versions had other names.
            point.name = Candidate(**point.candidate).name
        sizes = {name: (file.parent / name).stat().st_size for name in SAVED[:2]}
    except (OSError, ValidationError, ValueError):
        return None
    whole = sizes == {"model.onnx": point.onnx_bytes, "model.penjing": point.packed_bytes}
    return point if whole and file.parent.name == Path(point.folder).name else None
