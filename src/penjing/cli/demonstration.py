"""``penjing demo``: the whole job on the handwritten digits that scikit-learn ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from penjing.exploration import Budget, Study
from penjing.report.live import explore
from penjing.tasks import Preprocessing, Task, from_arrays
from penjing.training import TrainSettings, train

BUDGET = Budget(size="20KB", drop="1%")
TIME = "150s"


class DigitsNet(nn.Sequential):
    """A small CNN for 8×8 grey digits (about 83 thousand parameters): ``[N, 1, 8, 8]`` to 10 classes."""

    def __init__(self) -> None:
        super().__init__(
            *_block(1, 32),
            *_block(32, 64),
            nn.MaxPool2d(2),
            *_block(64, 96),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(96, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def digits(seed: int = 0) -> Task:
    """The 1,797 digits of scikit-learn, 8×8 grey, as a task; ``seed`` splits them in three parts."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images[..., None] * (255 / 16)).astype(np.uint8)
    preprocessing = Preprocessing(size=8, channels=1, resize=None, mean=(0.3,), std=(0.38,))
    return from_arrays(images, data.target, preprocessing=preprocessing, seed=seed)


def run(
    folder: Path,
    *,
    time: str | None = None,
    trials: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    threads: int = 1,
) -> Study:
    """Train the net (seconds), then explore; a demo that was stopped resumes in ``folder``.

    Args:
        time: of the exploration in total, over all runs; None is 150 s, or no limit with ``trials``.
        trials: candidates in total, over all runs.
        seed: of all that is random.
        device: to train and calibrate on.
        threads: of the runtime, for the latencies.
    """
    torch.manual_seed(seed)
    task, model = digits(seed), DigitsNet().to(device)
    Console(stderr=True).print("training a small CNN on scikit-learn's handwritten digits")
    settings = TrainSettings(epochs=20, batch_size=64, optimizer="adamw", lr=2e-3)
    train(model, task, settings, checkpoint=folder / "training", discard=True, progress=True)
    return explore(
        model,
        task,
        BUDGET,
        folder=folder,
        time=TIME if time is None and trials is None else time,
        trials=trials,
        name="digits CNN",
        data="scikit-learn digits",
        threads=threads,
    )


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]
