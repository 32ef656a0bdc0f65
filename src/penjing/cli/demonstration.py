"""``penjing demo``: the whole job on traffic signs as a camera sees them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from penjing.cli import signs
from penjing.exploration import Budget, Study
from penjing.progress import say
from penjing.report.live import explore
from penjing.tasks import Task, from_arrays
from penjing.training import TrainSettings, train

BUDGET = Budget(size="400KB", drop="2%")
TIME = "210s"
SIDE = 48
TRAINING, VALIDATION, TEST = 1500, 750, 750
NEXT_STEPS = """With a model of yours:
  penjing profile MODEL
  penjing explore MODEL --weights FILE --data FOLDER --max-size 300KB --max-drop 1% --time 30m -o study/
  penjing bench study/best/model.onnx
MODEL is torchvision:NAME, timm:NAME or FILE.py:FACTORY, FOLDER holds train/CLASS/*.jpg."""


class SignNet(nn.Sequential):
    """A residual CNN for colour pictures (about 680 thousand parameters, 50 million MACs):
    ``[N, 3, 48, 48]`` to 10 classes."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 24, 3, 2, 1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            Block(24, 48, 1),
            Block(48, 96, 2),
            Block(96, 192, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(192, len(signs.CLASSES)),
        )


class Block(nn.Module):
    """Two convolutions beside a shortcut: ``[N, inputs, H, W]`` to ``[N, outputs, H / stride, ...]``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, images: Tensor) -> Tensor:
        return (self.body(images) + self.shortcut(images)).relu()


def traffic_signs(seed: int = 0) -> Task:
    """3,000 drawn pictures of traffic signs, 48×48 in colour, as a task."""
    count = TRAINING + VALIDATION + TEST
    images, labels = signs.pictures(count, SIDE, seed)
    classes = signs.CLASSES
    return from_arrays(images, labels, validation=VALIDATION, test=TEST, classes=classes, seed=seed)


def run(
    folder: Path,
    *,
    time: str | None = None,
    trials: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    threads: int = 1,
) -> Study:
    """Draw the pictures, train the net (a minute), then explore; a demo that was stopped resumes in
    ``folder``.

    Args:
        time: of the exploration in total, over all runs; None is 210 s, or no limit with ``trials``.
        trials: candidates in total, over all runs.
        seed: of all that is random.
        device: to train and calibrate on.
        threads: of the runtime, for the latencies.
    """
    torch.manual_seed(seed)
    say("drawing traffic signs as a camera sees them, and training a small CNN on them")
    task, model = traffic_signs(seed), SignNet().to(device)
    settings = TrainSettings(epochs=8, batch_size=32, optimizer="adamw", lr=3e-3, augment=False)
    train(model, task, settings, checkpoint=folder / "training", discard=True, progress=True)
    return explore(
        model,
        task,
        BUDGET,
        folder=folder,
        time=TIME if time is None and trials is None else time,
        trials=trials,
        name="traffic sign CNN",
        data="drawn traffic signs",
        threads=threads,
    )
