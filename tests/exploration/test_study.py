from __future__ import annotations

import json
from pathlib import Path

import pytest

from penjing.devices.artifact import Card
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


def uncertain(name: str, size: int, divergence: float, **bounds: float) -> Point:
    fields = {"divergence": divergence, "drop_low": -0.1, "drop_high": 0.1} | bounds
    return point(name, size, 1.0, 0.895).model_copy(update=fields)


def test_what_is_surely_within_the_budget_comes_before_what_may_be(tmp_path: Path) -> None:
    study = fill(
        Study(tmp_path, ABOUT, Budget(drop=0.02)),
        uncertain("small", 10, 0.01),
        uncertain("sure", 400, 0.5, drop_low=0.0, drop_high=0.012),
    )
    assert study.best is not None and study.best.name == "sure"
    assert study.state(study.points["small"]) == "cannot be told"


def test_where_images_do_not_tell_agreement_and_then_divergence_chooses(tmp_path: Path) -> None:
    agreeing = {"agreement": 1.0, "agreement_images": 500}
    study = fill(
        Study(tmp_path, ABOUT, Budget(drop=0.02)),
        uncertain("far", 10, 0.3),
        uncertain("near", 90, 0.01),
        uncertain("agrees", 50, 0.2, **agreeing),
    )
    assert study.best is not None and study.best.name == "agrees"
    del study.points["agrees"]
    assert study.best.name == "near"


def test_without_a_limit_of_drop_divergence_chooses_among_what_images_cannot_tell_apart(
    tmp_path: Path,
) -> None:
    lucky = uncertain("lucky", 100, 0.4).model_copy(update={"drop": -0.02, "score": 0.92})
    close = uncertain("close", 100, 0.01)
    worse = uncertain("worse", 100, 0.0).model_copy(update={"drop": 0.3, "drop_low": 0.2})
    study = fill(Study(tmp_path, ABOUT, Budget(size=500)), lucky, close, worse)
    assert study.best is not None and study.best.name == "close"


def test_best_is_replaced_as_a_whole_and_removed_when_nothing_is_good_enough(
    tmp_path: Path,
) -> None:
    study = fill(Study(tmp_path, ABOUT, Budget(size=500)), point("a", 10, 1.0, 0.88))
    study.write()
    (tmp_path / "best" / "recipe.yaml").write_text("another point's")
    study.write()
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["model.onnx"]
    fill_one(study, point("b", 10, 1.0, 0.95))
    study.write()
    assert (tmp_path / "best" / "model.onnx").read_text() == "b"
    study.budget = Budget(size=5)
    study.write()
    assert not (tmp_path / "best").exists()


def fill_one(study: Study, entry: Point) -> None:
    (study.folder / entry.folder).mkdir(parents=True)
    (study.folder / entry.folder / "model.onnx").write_text(entry.name)
    study.points[entry.name] = entry


def test_saving_does_not_delete_what_else_is_there(tmp_path: Path) -> None:
    study = fill(Study(tmp_path / "study", ABOUT, Budget()), point("a", 10, 1.0, 0.95))
    assert study.best is not None
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(PenjingError, match=r"holds other files \(thesis\.tex\)"):
        study.best.save(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years"
