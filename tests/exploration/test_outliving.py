"""A study outlives its candidates, its process, its disk, and its neighbours."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import math
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import engine
import numpy as np
import pytest
import torch

from penjing import files
from penjing.errors import PenjingError
from penjing.exploration import Budget, attempt, search
from penjing.exploration.candidates import is_trained, ladder
from penjing.exploration.study import Study, alone

BUDGET = Budget(drop=0.05)


def recurse() -> None:
    recurse()


def loop() -> None:
    while True:
        pass


def loop_that_catches_everything() -> None:
    while True:
        with contextlib.suppress(Exception):
            loop()


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


EXPLOSIONS = {
    "RuntimeError: shapes do not fit": raising(RuntimeError("shapes do not fit\nmore of it")),
    "MemoryError": raising(MemoryError()),
    "OutOfMemoryError: CUDA out of memory": raising(torch.OutOfMemoryError("CUDA out of memory")),
    "AssertionError": raising(AssertionError()),
    "KeyError: 'weight'": raising(KeyError("weight")),
    "RecursionError: maximum recursion depth": recurse,
    "LinAlgError: Singular matrix": lambda: np.linalg.inv(np.zeros((2, 2))),
    "PermissionError: [Errno 13]": raising(PermissionError(errno.EACCES, "Permission denied")),
    "layer conv1 has no weights": raising(PenjingError("layer conv1 has no weights")),
    "ONNX Runtime was killed by signal 11": raising(
        PenjingError("ONNX Runtime was killed by signal 11 (segmentation fault)")
    ),
    "TooLongError: it took longer than": loop,
    "TooLongError: it took longer": loop_that_catches_everything,
}


@pytest.mark.parametrize("reason", EXPLOSIONS)
def test_a_candidate_that_explodes_is_a_failed_point_and_not_tried_again(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        search._Search, "longest_s", lambda self, it: 0.3 if it.name == "W16" else None
    )
    run = engine.install(monkeypatch, lambda name: EXPLOSIONS[reason]() if name == "W16" else None)
    study = engine.explored(tmp_path, trials=6)
    assert study.failures["W16"].startswith(reason)
    assert "\n" not in study.failures["W16"]
    assert {"original", "W8A8", "W4A8"} <= set(study.points)
    folder = tmp_path / "trials" / "W16"
    assert "Traceback" in (folder / "error.txt").read_text()
    assert not (folder / "started.json").exists()

    run.clear()
    again = engine.explored(tmp_path, trials=8)
    assert again.failures == study.failures
    assert set(study.points) < set(again.points) and "W16" not in run
    assert json.loads((tmp_path / "frontier.json").read_text())["failures"] == again.failures


def test_outputs_that_are_not_numbers_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments, **options):
        card = engine.build(*arguments, **options)
        return card.model_copy(update={"divergence": float("nan")} if card.name == "W16" else {})

    engine.install(monkeypatch)
    monkeypatch.setattr(search.artifact, "build", build)
    study = engine.explored(tmp_path, trials=4)
    assert study.failures == {"W16": "its outputs are not finite numbers"}


def test_what_follows_a_study_is_called_after_each_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.install(monkeypatch)
    seen: list[tuple[int, bool]] = []

    def follow(study: search.Study) -> None:
        seen.append((len(study.points), study.running))
        if len(seen) == 1:
            raise RuntimeError("what follows is no candidate")

    study = engine.explored(tmp_path, trials=6, on_change=follow)
    assert seen[0] == (2, True) and seen[-1] == (len(study.points), False)
    assert all(running for _, running in seen[:-1]) and len(seen) > 4


def test_a_failure_is_on_disk_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(name: str) -> None:
        if name == "W16":
            raise RuntimeError("no")
        if name == "W4A8":
            recorded = json.loads((tmp_path / "frontier.json").read_text())["failures"]
            assert recorded == {"W16": "RuntimeError: no"}

    engine.install(monkeypatch, act)
    assert set(engine.explored(tmp_path, trials=6).failures) == {"W16"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(3)])
def test_what_ends_a_process_ends_the_search(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.install(monkeypatch, lambda name: raising(stop)() if name == "W16" else None)
    if isinstance(stop, KeyboardInterrupt):
        for _ in range(3):
            assert engine.explored(tmp_path, trials=6).stopped
        assert list(Study(tmp_path, about(tmp_path), BUDGET).points) == ["original", "W8A8"]
        return
    for _ in range(2):
        with pytest.raises(SystemExit):
            engine.explored(tmp_path, trials=6)
    study = engine.explored(tmp_path, trials=6)
    expected = "the process ended while it ran, 2 times (SystemExit: 3)"
    assert study.failures == {"W16": expected} and "W4A8" in study.points


def about(folder: Path) -> dict:
    return json.loads((folder / "study.json").read_text())["about"]


def test_ctrl_c_while_the_original_is_measured_leaves_a_study_that_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.install(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(search.artifact, "build", lambda *a, **k: raising(KeyboardInterrupt())())
        study = engine.explored(tmp_path, trials=3)
        assert study.stopped and not study.points and study.best is None
    assert len(engine.explored(tmp_path, trials=3).points) > 3


def test_an_original_that_cannot_be_measured_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.install(monkeypatch)
    monkeypatch.setattr(search.artifact, "build", lambda *a, **k: raising(ValueError("odd\nnet"))())
    with pytest.raises(PenjingError, match=r"original cannot be measured \(ValueError: odd\)"):
        engine.explored(tmp_path, trials=3)


def test_a_model_that_cannot_be_trained_is_compressed_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.install(monkeypatch)
    monkeypatch.setattr(search, "seconds_per_epoch", lambda *a, **k: raising(RuntimeError("no"))())
    study = engine.explored(tmp_path, time=1000)
    assert len(study.points) > 15 and not any(point.trained for point in study.points.values())


def test_a_candidate_that_crashes_the_process_twice_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(name: str) -> None:
        if name == "W16":
            os.kill(os.getpid(), signal.SIGSEGV)

    engine.install(monkeypatch, act)

    def work() -> None:
        faulthandler.disable()  # pytest's own, which writes elsewhere
        engine.explored(tmp_path, trials=6)

    codes = [engine.killed_after(60, work) for _ in range(3)]
    assert codes == [-signal.SIGSEGV, -signal.SIGSEGV, 0]
    reason = attempt.failures(tmp_path / "trials")["W16"]
    assert reason.startswith("the process ended while it ran, 2 times (Fatal Python error: Segm")


def test_a_candidate_for_which_memory_ran_out_is_given_up_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(name: str) -> None:
        if name == "W16":
            os.kill(os.getpid(), signal.SIGKILL)

    engine.install(monkeypatch, act)
    monkeypatch.setattr(attempt, "_killed", lambda: 7)
    assert engine.killed_after(60, lambda: engine.explored(tmp_path, trials=6)) == -9
    monkeypatch.setattr(attempt, "_killed", lambda: 8)
    study = engine.explored(tmp_path, trials=6)
    assert study.failures == {"W16": "the process ended while it ran, 1 time (memory ran out)"}


def test_a_candidate_during_which_the_process_was_killed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a user, a scheduler, or with the machine: not for ever, since it may yet be its own fault."""

    def act(name: str) -> None:
        if name == "W16":
            os.kill(os.getpid(), signal.SIGKILL)

    engine.install(monkeypatch, act)
    work = lambda: engine.explored(tmp_path, trials=6)  # noqa: E731
    codes = [engine.killed_after(60, work) for _ in range(attempt.MOST_ENDS)]
    assert set(codes) == {-9}
    assert engine.killed_after(60, work) == 0
    assert "it was killed" in attempt.failures(tmp_path / "trials")["W16"]


def assert_whole(folder: Path) -> None:
    """Whatever a user may read is readable, and ``best/`` holds one point's files."""
    for file in [*folder.glob("*.json"), *folder.glob("best/*.json")]:
        json.loads(file.read_text())
    if (folder / "best").exists():
        assert {path.name for path in (folder / "best").iterdir()} >= {"model.onnx", "card.json"}
        assert len(engine.names_in(folder / "best")) == 1


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(
    kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice, options = random.Random(0), {"budget": BUDGET, "trials": 12 if kills == 3 else 40}
    engine.install(monkeypatch)
    whole = engine.explored(tmp_path / "whole", **options)
    killed = 0
    while killed < kills:
        folder = tmp_path / f"after{killed}"
        work = lambda f=folder: engine.explored(f, **options)  # noqa: E731
        while killed < kills and engine.killed_after(dice.uniform(0, 0.5), work) != 0:
            killed += 1
            assert_whole(folder)
        study = engine.explored(folder, **options)
        assert_whole(folder)
        assert not study.failures
        assert list(study.points) == list(whole.points)
        assert study.best and whole.best and study.best.name == whole.best.name
        assert not list(folder.glob("trials/*/started.json"))


def test_a_full_disk_is_one_sentence_and_the_same_command_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up at the first write of a study, a fifth of them later, and so on."""
    engine.install(monkeypatch)
    real, count = files._flush_one, [0]

    def flush(path: Path) -> None:
        count[0] -= 1
        if count[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path)

    monkeypatch.setattr(files, "_flush_one", flush)
    count[0] = 10**6
    whole = engine.explored(tmp_path / "whole", budget=BUDGET, trials=8)
    writes = 10**6 - count[0]
    assert writes > 30
    for room in range(0, writes, writes // 5):
        folder = tmp_path / f"room{room}"
        count[0] = room
        with pytest.raises(PenjingError, match="no space is left"):
            engine.explored(folder, budget=BUDGET, trials=8)
        assert_whole(folder)
        count[0] = 10**6
        study = engine.explored(folder, budget=BUDGET, trials=8)
        assert list(study.points) == list(whole.points) and not study.failures
        shutil.rmtree(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB, which the files of this engine's candidates fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a tmpfs cannot be mounted here: it needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_file_system_is_one_sentence_and_the_same_command_resumes(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.install(monkeypatch)
    for _ in range(2):
        with pytest.raises(PenjingError, match="no space is left"):
            engine.explored(small_disk / "study", trials=20)
        assert_whole(small_disk / "study")
    before = set(Study(small_disk / "study", about(small_disk / "study"), BUDGET).points)
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    after = engine.explored(small_disk / "study", trials=20)
    assert {"original"} <= before < set(after.points)
    assert len(after.points) > 20 and not after.failures


def test_two_processes_do_not_share_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.install(monkeypatch)
    with alone(tmp_path), pytest.raises(PenjingError, match="another process is exploring in"):
        engine.explored(tmp_path, trials=2)
    assert not list(tmp_path.glob("trials/*"))

    def hold() -> None:
        with alone(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert engine.killed_after(60, hold) == -9
    assert len(engine.explored(tmp_path, trials=2).points) == 3, "a dead process holds nothing"


def test_broken_files_are_passed_over_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = engine.install(monkeypatch)
    before = engine.explored(tmp_path, trials=8)
    (tmp_path / "study.json").write_text('{"about": {"mod')
    (tmp_path / "trials" / "W16" / "point.json").write_text("")
    (tmp_path / "trials" / "W4A8" / "model.onnx").write_text("half")
    (tmp_path / "trials" / "odd").mkdir()
    (tmp_path / "trials" / "odd" / "failure.json").write_text("[1")
    (tmp_path / "best" / "model.onnx").write_text("another point's")
    run.clear()
    after = engine.explored(tmp_path, trials=8)
    assert set(after.points) == set(before.points)
    assert set(run) == {"W16", "W4A8"}
    said = capsys.readouterr().err
    assert "study.json cannot be read" in said and "W4A8 is measured again" in said
    assert_whole(tmp_path)


def test_points_that_an_earlier_version_named_are_kept_under_their_name_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine.install(monkeypatch)
    before = engine.explored(tmp_path, trials=8)
    old = tmp_path / "trials" / "int4a8"
    (tmp_path / "trials" / "W4A8").rename(old)
    point = json.loads((old / "point.json").read_text())
    (old / "point.json").write_text(
        json.dumps(point | {"name": "int4a8", "folder": "trials/int4a8"})
    )
    run.clear()
    after = engine.explored(tmp_path, trials=8)
    assert not run and set(after.points) == set(before.points)
    assert after.points["W4A8"].folder == "trials/int4a8"


def test_points_of_another_model_are_not_taken_when_nothing_says_whose_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.install(monkeypatch)
    engine.explored(tmp_path, trials=2)
    known = about(tmp_path)
    (tmp_path / "study.json").unlink()
    assert len(Study(tmp_path, known, BUDGET).points) == 3
    assert not Study(tmp_path, known | {"key": "other"}, BUDGET).points


def test_another_seed_is_told(tmp_path: Path) -> None:
    known = {"key": "a", "model": "net", "data": "images", "seed": 0}
    Study(tmp_path, known, BUDGET).write()
    with pytest.raises(PenjingError, match="with seed 0, not 1; choose another folder"):
        Study(tmp_path, known | {"key": "b", "seed": 1}, BUDGET)


def test_what_was_too_large_is_trained_under_a_wider_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine.install(monkeypatch)
    narrow = engine.explored(tmp_path, budget=Budget(size=300), trials=12)
    assert any("not trained: " in reason for reason in narrow.dropped.values())
    assert not narrow.failures
    few = {name for name in run if is_trained(name)}
    wide = engine.explored(tmp_path, budget=Budget(size=10_000), trials=20)
    assert not wide.dropped
    assert len({name for name in run if is_trained(name)}) > len(few)


def test_an_earlier_versions_verdicts_on_a_budget_are_not_failures(tmp_path: Path) -> None:
    failures = {"a": "not trained: without training it has size", "b": "it cannot be exported"}
    state = {"about": {"key": "k"}, "elapsed_s": 1.0, "failures": failures}
    (tmp_path / "study.json").write_text(json.dumps(state))
    assert set(Study(tmp_path, {"key": "k"}, BUDGET).failures) == {"b"}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Candidates that are run while the clock ticks a second each time it is looked at, and an epoch
    takes ten seconds."""
    run, clock = engine.install(monkeypatch), iter(range(10**9))
    monkeypatch.setattr(search, "ladder", lambda: ladder()[:3])
    monkeypatch.setattr(search.clock, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(search, "seconds_per_epoch", lambda *arguments, **options: 10.0)
    return run


def test_more_time_gives_longer_trainings(tmp_path: Path, timed: list[str]) -> None:
    """Eight trainings get 45 % of the time; long ones have three times the epochs."""
    for time, expected in (
        (200, (" 1.1 epochs", " 3.3 epochs")),
        (400, (" 2.3 epochs", " 6.9 epochs")),
    ):
        timed.clear()
        engine.explored(tmp_path, time=time)
        trained = {name for name in timed if is_trained(name)}
        assert trained and all(name.endswith(expected) for name in trained)


def test_trainings_have_a_limit_from_what_was_promised(tmp_path: Path, timed: list[str]) -> None:
    study = engine.explored(tmp_path, time=200)
    trained = [point for point in study.points.values() if point.trained]
    for point in trained:
        for stage in point.recipe["stages"]:
            epochs = stage["train"]["epochs"]
            assert stage["train"]["time_budget"] == pytest.approx(30 + 80 * epochs, abs=0.1)
    assert trained


def test_the_same_seed_and_trials_give_the_same_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine.install(monkeypatch)
    orders = []
    for folder in ("a", "b"):
        run.clear()
        engine.explored(tmp_path / folder, trials=30)
        orders.append(list(run))
    assert orders[0] == orders[1]
    run.clear()
    engine.explored(tmp_path / "b", trials=30)
    assert not run, "what is done is done"


@pytest.mark.parametrize("trials", [1, 2, 7, 40])
def test_so_many_candidates_are_tried(
    trials: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.install(monkeypatch, lambda name: raising(ValueError())() if name == "W16" else None)
    study = engine.explored(tmp_path, trials=trials)
    rungs = {candidate.name for candidate in ladder()[: math.ceil(trials / 2)]}
    tried = [*(point.name for point in study.compressed), *study.failures]
    assert sum(name in rungs or is_trained(name) for name in tried) == trials


def test_a_number_of_trials_is_positive(tmp_path: Path) -> None:
    with pytest.raises(PenjingError, match="trials must be a positive number"):
        engine.explored(tmp_path, trials=0)
