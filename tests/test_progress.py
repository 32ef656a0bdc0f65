"""Progress in a log: a line a minute at most, on a clock of the test's own."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from penjing import progress
from penjing.tasks import from_arrays
from penjing.training import TrainSettings, train


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    monkeypatch.setattr(progress._Lines, "last_s", float("-inf"))
    return clock


def taking(seconds: float, count: int, clock: Clock) -> Iterator[int]:
    for item in range(count):
        yield item
        clock.now += seconds


def test_a_line_a_minute_says_what_how_far_and_how_long(clock, capsys) -> None:
    """100 items of 6 s: a line each 10th item, and what is left is what is left."""
    for _ in progress.shown(taking(6.0, 100, clock), "moments", 100):
        pass
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["moments: 10%, 9 min left", "moments: 20%, 8 min left"]
    assert said[-1] == "moments: 90%, 60 s left"
    assert len(said) == 9


def test_work_of_less_than_a_minute_says_nothing(clock, capsys) -> None:
    for _ in progress.shown(taking(0.5, 100, clock), "moments", 100):
        pass
    assert capsys.readouterr().err == ""


def test_bars_within_bars_share_the_minute(clock, capsys) -> None:
    with progress.bar("exploring") as outer:
        for trial in range(5):
            outer.update(trial / 5, f"trial {trial}")
            for _ in progress.shown(taking(6.0, 40, clock), "training", 40):
                pass
    assert len(capsys.readouterr().err.splitlines()) == 5 * 40 * 6 // 60 - 1


def test_what_is_left_of_a_resumed_work_goes_by_what_was_done_now(clock, capsys) -> None:
    """Half was done before; a tenth of the whole took 2 minutes, so 4 tenths take 8."""
    with progress.bar("training") as line:
        line.update(0.5)
        clock.now += 120
        line.update(0.6)
    assert capsys.readouterr().err == "training: 60%, 8 min left\n"


def test_hidden_work_says_nothing(clock, capsys) -> None:
    for _ in progress.shown(taking(100, 10, clock), "reading", 10, long=False):
        pass
    assert capsys.readouterr().err == ""


def test_a_training_says_its_loss_and_score(clock, capsys) -> None:
    """Each step takes half a minute: 4 steps an epoch, 3 epochs."""
    images = np.random.default_rng(0).integers(0, 255, (48, 4, 4, 1)).astype(np.uint8)
    task = from_arrays(images, np.arange(48) % 2, validation=8, test=8)

    class Slow(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            clock.now += 30 if self.training else 0
            return super().forward(input.flatten(1))

    train(Slow(16, 2), task, TrainSettings(epochs=3, batch_size=8), progress=True)
    said = capsys.readouterr().err.splitlines()
    *said, done = said
    assert "validation" in done and ": done in " in done
    assert len(said) == 6, said
    assert all(line.startswith("training, loss ") for line in said)
    assert said[0].endswith(": 17%, 5 min left")
    assert "validation" in said[-1] and said[-1].endswith(": 100%")


def test_bars_are_drawn_within_each_other_on_a_terminal(monkeypatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "CONSOLE", console)
    with progress.bar("exploring") as outer:
        outer.update(0.25, "trial [1]")
        for _ in progress.shown(range(4), "training", 4):
            pass
        progress.say("a point")
    drawn = screen.getvalue()
    assert all(words in drawn for words in ("trial [1]", "25%", "training", "a point"))
