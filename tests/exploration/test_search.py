"""The engine on a net that trains in a second: what it tries, keeps, and survives."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from penjing.exploration import Budget, search
from penjing.exploration.candidates import Candidate, ladder
from penjing.report.live import explore
from penjing.tasks import Task, from_arrays
from penjing.training import TrainSettings, train

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_search import net_and_task
from penjing.exploration import Budget
from penjing.report.live import explore
model, task = net_and_task()
explore(model, task, Budget(drop=0.05), folder=Path(sys.argv[1]), trials=int(sys.argv[2]))
"""


def net_and_task() -> tuple[nn.Module, Task]:
    """A trained two-layer net that tells stripes across from stripes down."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 600)
    images = rng.integers(0, 120, (600, 12, 12, 1)).astype(np.uint8)
    images[labels == 0, ::3] += 100
    images[labels == 1, :, ::3] += 100
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    task = from_arrays(images, labels)
    train(net, task, TrainSettings(epochs=4, batch_size=32, optimizer="adamw", lr=1e-2))
    return net.eval(), task


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Task]:
    return net_and_task()


def test_combinations_are_found_and_every_point_is_a_real_file(
    trained: tuple[nn.Module, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "ladder", lambda: [ladder()[0], ladder()[-2]])
    budget = Budget(drop=0.05, size=6000)
    study = explore(*trained, budget, folder=tmp_path, trials=2, progress=False)
    assert not study.failures
    assert any(
        len(point.recipe["stages"]) > 1 for point in study.points.values() if point.candidate
    )
    assert any(point.trained for point in study.points.values())
    for point in study.points.values():
        folder = tmp_path / point.folder
        assert (folder / "model.onnx").stat().st_size == point.onnx_bytes
        assert (folder / "model.penjing").stat().st_size == point.packed_bytes
        assert point.drop == pytest.approx(study.baseline.score - point.score)
    assert study.best is not None
    assert study.best.point.packed_bytes <= 6000 < study.baseline.packed_bytes
    for point in study.points.values():
        # A penalty is of no use without training, and its size is set beforehand.
        if point.trained and not Candidate(**point.candidate).weights.startswith("small"):
            untrained = study.points[Candidate(**{**point.candidate, "epochs": 0.0}).name]
            assert untrained.packed_bytes <= 6600, "what is too large is not trained"
    for point in study.frontier:
        assert point.test_score is not None
        if point.candidate:
            stages = point.recipe["stages"]
            assert len(point.contributions) == len(stages)
            assert point.contributions[-1].packed_bytes == point.packed_bytes
    told = json.loads((tmp_path / study.best.point.folder / "predictions.json").read_text())
    right = sum(told["after"][index][index] for index in range(2))
    assert right / told["images"] == pytest.approx(study.best.point.score)
    assert (told["classes"], told["images"]) == (["0", "1"], trained[1].size("validation"))


@pytest.mark.slow
def test_a_killed_study_is_whole_and_goes_on(tmp_path: Path) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", script, str(tmp_path), "8"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    frontier = tmp_path / "frontier.json"
    while len(list(tmp_path.glob("trials/*/point.json"))) < 3 and process.poll() is None:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = json.loads(frontier.read_text())
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.glob("trials/*/model.onnx")}
    measured = {point["name"] for point in before["points"]}
    assert len(measured) >= 2

    subprocess.run([*command[:-1], "4"], check=True)
    after = json.loads(frontier.read_text())
    assert measured < {point["name"] for point in after["points"]}
    for point in before["points"]:
        file = tmp_path / point["folder"] / "model.onnx"
        assert file.stat().st_mtime_ns == stamps[file], "a measured point is not made again"
    assert after["elapsed_s"] > before["elapsed_s"]
    assert (tmp_path / "report.html").exists()


def test_ctrl_c_ends_the_search_with_what_was_measured(
    trained: tuple[nn.Module, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = search.compress, []

    def interrupt(*arguments: object, **options: object) -> nn.Module:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(search, "compress", interrupt)
    study = explore(*trained, folder=tmp_path, trials=8, progress=False)
    assert len(study.points) == 3
    assert len(json.loads((tmp_path / "frontier.json").read_text())["points"]) == 3
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_kills_change_nothing_in_what_is_found(
    trained: tuple[nn.Module, Task], tmp_path: Path
) -> None:
    """Ten kills at random moments of trainings, exports and measurements."""
    script, dice = SCRIPT.format(tests=str(Path(__file__).parent)), random.Random(0)
    command = [sys.executable, "-c", script, str(tmp_path / "killed"), "6"]
    for _ in range(10):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "killed" / "study.json").exists():
            time.sleep(0.1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(dice.uniform(0, 12))
        process.kill()
        process.wait()
    subprocess.run(command, check=True)
    whole = explore(
        *trained, Budget(drop=0.05), folder=tmp_path / "whole", trials=6, progress=False
    )
    found = json.loads((tmp_path / "killed" / "frontier.json").read_text())
    assert not found["failures"]
    expected = {point.name: (point.packed_bytes, point.score) for point in whole.points.values()}
    assert {p["name"]: (p["packed_bytes"], p["score"]) for p in found["points"]} == expected
