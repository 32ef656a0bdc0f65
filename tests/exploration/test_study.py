from __future__ import annotations

import json
from pathlib import Path

import pytest

from penjing.deploy.artifact import Card
from penjing.errors import PenjingError
from penjing.exploration import Budget, Point, Study

ABOUT = {"model": "net", "data": "images", "key": "abc", "started": 0.0}


def point(name: str, size: int, latency: float, score: float) -> Point:
    """A point of a study whose original has score 0.9 and 10 ms."""
    fields = {"name": name, "packed_bytes": size, "latency_ms": latency, "score": score}
    required = Card.model_construct(recipe={"name": name}, reference_latency_ms=10.0)
    compared = {"drop": 0.9 - score, "drop_low": 0.9 - score, "drop_high": 0.9 - score}
    values = required.model_dump() | fields | compared | {"folder": f"trials/{name}"}
    return Point.model_construct(**values)


def fill(study: Study, *points: Point) -> Study:
    for entry in (point("original", 1000, 10.0, 0.9), *points):
        (study.folder / entry.folder).mkdir(parents=True)
        (study.folder / entry.folder / "model.onnx").write_text(entry.name)
        study.points[entry.name] = entry
    return study


def test_the_frontier_is_what_nothing_beats_in_all_three(tmp_path: Path) -> None:
    study = fill(
        Study(tmp_path, ABOUT, Budget()),
        point("small", 100, 10.0, 0.8),
        point("fast", 900, 2.0, 0.85),
        point("worse", 120, 10.0, 0.8),
        point("same size, better", 100, 10.0, 0.82),
    )
    assert [p.name for p in study.frontier] == ["same size, better", "fast", "original"]


def test_the_best_meets_the_budget_with_least_bytes_and_time(tmp_path: Path) -> None:
    study = fill(
        Study(tmp_path, ABOUT, Budget(size=500, drop=0.02)),
        point("too large", 600, 1.0, 0.9),
        point("loses too much", 50, 1.0, 0.8),
        point("enough", 400, 5.0, 0.89),
        point("smaller, slower", 380, 9.0, 0.89),
    )
    assert study.best is not None
    assert study.best.name == "enough"


def test_without_a_limit_of_drop_the_best_loses_least(tmp_path: Path) -> None:
    points = point("a", 100, 1.0, 0.7), point("b", 450, 9.0, 0.8)
    study = fill(Study(tmp_path, ABOUT, Budget(size=500)), *points)
    assert study.best is not None
    assert study.best.name == "b"


def test_when_nothing_is_enough_the_nearest_says_by_how_much(tmp_path: Path) -> None:
    points = point("near", 60, 1.0, 0.895), point("far", 20, 1.0, 0.5)
    study = fill(Study(tmp_path, ABOUT, Budget(size=50, drop=0.01)), *points)
    assert study.best is None
    nearest, excess = study.nearest()
    assert nearest.name == "near"
    assert excess == {"size": (60, 50)}


def test_the_best_is_saved_with_its_artifact(tmp_path: Path) -> None:
    study = fill(Study(tmp_path / "study", ABOUT, Budget()), point("a", 10, 1.0, 0.95))
    assert study.best is not None
    study.best.save(tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_text() == "a"


def test_another_model_is_refused_and_nothing_overwritten(tmp_path: Path) -> None:
    Study(tmp_path, ABOUT, Budget()).write()
    before = (tmp_path / "study.json").read_text()
    with pytest.raises(PenjingError, match="choose another folder"):
        Study(tmp_path, ABOUT | {"key": "other"}, Budget())
    assert (tmp_path / "study.json").read_text() == before


def test_time_spent_is_carried_over(tmp_path: Path) -> None:
    study = Study(tmp_path, ABOUT, Budget())
    study.elapsed_s = 12.5
    study.write()
    assert Study(tmp_path, ABOUT, Budget()).elapsed_s == 12.5
    assert json.loads((tmp_path / "study.json").read_text())["about"] == ABOUT


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PenjingError, match="choose another with -o"):
        Study(tmp_path / "file", ABOUT, Budget())
