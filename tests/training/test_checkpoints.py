"""Trainings that are stopped at any moment, and resumed: from their own checkpoint only."""

from __future__ import annotations

import copy
import os
import random
import resource
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from command_line import SERVER
from penjing.errors import PenjingError
from penjing.tasks import Task, from_arrays
from penjing.techniques.prune_weights import PruneWeights
from penjing.training import TrainResult, TrainSettings, loop, train
from penjing.training.settings import Distill

STEPS = 6


class KilledError(Exception):
    pass


def kill(*_: Any) -> None:
    raise KilledError


def press_control_c(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def arrays(images: int = 128) -> tuple[np.ndarray, np.ndarray]:
    y = np.arange(images) % 2
    x = np.random.default_rng(0).integers(0, 120, (images, 8, 8, 1)) + 100 * y[:, None, None, None]
    return x.astype(np.uint8), y


@pytest.fixture(scope="module")
def task() -> Task:
    return from_arrays(*arrays(), validation=16, test=16)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


def settings(**more: Any) -> TrainSettings:
    """Six steps: three in each of two epochs."""
    return TrainSettings(**{"epochs": 2, "batch_size": 32, "lr": 0.05} | more)


def run(task: Task, path: Path | None, **more: Any) -> tuple[nn.Module, TrainResult]:
    """A training of a pruned net, with what is given in ``more`` in the place of the usual."""
    model = more.pop("model", None) or net()
    pruning = more.pop("pruning", None) or PruneWeights(sparsity=0.5)
    pruning = pruning.attach(model, task)
    others = {key: more.pop(key) for key in ("teacher", "discard") if key in more}
    result = train(model, task, settings(**more), [pruning], checkpoint=path, **others)
    pruning.bake(model)
    return model, result


def same(one: tuple[nn.Module, TrainResult], two: tuple[nn.Module, TrainResult]) -> bool:
    pairs = zip(one[0].state_dict().values(), two[0].state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and one[1].history == two[1].history


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """``action`` in the midst of a step of the training."""
    calls, update = count(1), loop._Run._update

    def watched(self: Any, *batch: Any) -> float:
        if next(calls) == step:
            action()
        return update(self, *batch)

    monkeypatch.setattr(loop._Run, "_update", watched)


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("step", [1, 3, 4, STEPS])
def test_control_c_in_any_step_resumes_to_the_result(task, tmp_path, monkeypatch, step, ema):
    whole = run(task, None, ema=ema)
    with monkeypatch.context() as patch:
        at_step(patch, step, press_control_c)
        with pytest.raises(KeyboardInterrupt):
            run(task, tmp_path / "c", ema=ema)
    resumed = run(task, tmp_path / "c", ema=ema)
    assert same(whole, resumed)
    assert resumed[1].score == whole[1].score == resumed[1].history[-1].score
    assert same(whole, run(task, tmp_path / "c", ema=ema))  # once more, from the end


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("validation", [1, 2])
def test_killed_while_it_validates(task, tmp_path, monkeypatch, ema, validation):
    """After the last step of an epoch: the last checkpoint is from before the averages were taken."""
    whole = run(task, None, ema=ema)
    calls, evaluate = count(1), loop.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(loop, "CHECKPOINT_EVERY_S", 0.0)
        patch.setattr(
            loop, "evaluate", lambda *a: kill() if next(calls) == validation else evaluate(*a)
        )
        with pytest.raises(KilledError):
            run(task, tmp_path / "c", ema=ema)
    assert same(whole, run(task, tmp_path / "c", ema=ema))


def attempt(task: Task, path: Path, calls: int) -> None:
    """Train until so many functions have been called or left; then the process is killed."""
    loop.CHECKPOINT_EVERY_S = 0.0
    seen = count(1)

    def look(*_: Any) -> None:
        if next(seen) == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(look)
    run(task, path, ema=0.9, epochs=8)


def test_killed_by_the_system_at_any_moment(task, tmp_path):
    whole = run(task, None, ema=0.9, epochs=8)
    chance, kills = random.Random(0), 0
    for _ in range(12):
        calls = chance.randrange(1_000, 60_000)
        process = SERVER.Process(target=attempt, args=(task, tmp_path / "c", calls))
        process.start()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills > 3
    assert same(whole, run(task, tmp_path / "c", ema=0.9, epochs=8))


def fill_the_disk(task: Task, path: Path) -> None:
    # A limit on the size of files stands for the full disk: it takes no rights to set.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(PenjingError, match=r"c cannot be written: .*; free some space on the disk"):
        run(task, path)


def test_a_full_disk_leaves_the_earlier_checkpoint(task, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 4, press_control_c)
        with pytest.raises(KeyboardInterrupt):
            run(task, tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    process = SERVER.Process(target=fill_the_disk, args=(task, tmp_path / "c"))
    process.start()
    process.join()
    assert process.exitcode == 0 and (tmp_path / "c").read_bytes() == before
    assert same(run(task, None), run(task, tmp_path / "c"))


OTHERS = {
    "first weights": {"model": net(1)},
    "settings": {"lr": 0.04},
    "techniques": {"pruning": PruneWeights(sparsity=0.4)},
    "teacher": {"teacher": net(3)},
    "layers": {"model": nn.Sequential(*net()[:2], nn.Sigmoid(), *net()[3:])},
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("stop", [2, None])
def test_another_start_is_rejected(task, tmp_path, monkeypatch, what, stop):
    usual = {"distill": Distill(), "teacher": net(2)}
    with monkeypatch.context() as patch:
        if stop:
            at_step(patch, stop, kill)
            patch.setattr(loop, "CHECKPOINT_EVERY_S", 0.0)
        try:
            run(task, tmp_path / "c", **usual)
        except KilledError:
            assert stop
    other = copy.deepcopy(OTHERS[what])
    with pytest.raises(PenjingError, match=f"c is the checkpoint of a training with other {what}"):
        run(task, tmp_path / "c", **usual | other)


def test_other_data_is_rejected(task, tmp_path):
    run(task, tmp_path / "c")
    with pytest.raises(PenjingError, match="training with other data;"):
        run(from_arrays(*arrays(126), validation=16, test=16), tmp_path / "c")


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "one bit":
        path.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["cut", "one bit", "empty"])
def test_a_damaged_checkpoint_says_what_to_do(task, tmp_path, how):
    run(task, tmp_path / "c")
    damaged(tmp_path / "c", how)
    with pytest.raises(PenjingError, match=r"checkpoint.*; delete it, or name another file"):
        run(task, tmp_path / "c")


@pytest.mark.parametrize("how", ["cut", "one bit", "other"])
def test_a_checkpoint_that_the_caller_owns_is_replaced(task, tmp_path, capsys, how):
    expected = run(task, None)
    run(task, tmp_path / "c", lr=0.01)
    if how != "other":
        damaged(tmp_path / "c", how)
    assert same(expected, run(task, tmp_path / "c", discard=True))
    said = capsys.readouterr().err
    assert said.startswith("The training begins anew: ") and said.count("\n") == 1
    assert same(expected, run(task, tmp_path / "c"))


def clocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes each time that somebody looks."""
    seconds = count()
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(seconds)))


def test_a_longer_budget_makes_a_done_training_longer(task, tmp_path, monkeypatch):
    """It resumes with the weights as they were trained, and ends with averaged ones."""
    clocked(monkeypatch)
    weights: dict[str, dict[str, torch.Tensor]] = {}
    close, update = loop._Run.close_epoch, loop._Run._update

    def state(run: Any) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in run.model.named_parameters()}

    def closing(run: Any) -> None:
        weights["trained"] = state(run)
        close(run)
        weights["averaged"] = state(run)

    def updating(run: Any, *batch: Any) -> float:
        weights.setdefault("resumed", state(run))
        return update(run, *batch)

    monkeypatch.setattr(loop._Run, "close_epoch", closing)
    budget = {"epochs": 100, "ema": 0.9}
    _, short = run(task, tmp_path / "c", time_budget=30, **budget)
    first = dict(weights)
    monkeypatch.setattr(loop._Run, "_update", updating)
    model, long = run(task, tmp_path / "c", time_budget=90, **budget)
    assert short.stopped_early and long.stopped_early and long.epochs > short.epochs + 3
    assert long.history[: len(short.history)] == short.history
    for name, value in first["trained"].items():
        assert torch.equal(weights["resumed"][name], value)
    assert not torch.equal(first["averaged"]["5.bias"], first["trained"]["5.bias"])
    assert any(not torch.equal(weights["trained"][n], v) for n, v in weights["averaged"].items())
    assert torch.equal(model[5].bias, weights["averaged"]["5.bias"])
    zeros = [int((layer.weight == 0).sum()) for layer in (model[0], model[5])]
    assert sum(zeros) == (54 + 12) // 2
