"""A small net with the patterns that lowering must know, and images for it, as fixtures."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from penjing.tasks import Task, from_arrays


class SmallNet(nn.Module):
    """The patterns that lowering must know: padding, depthwise, SiLU, ReLU6, residual, pools."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            nn.SiLU(),
            nn.Conv2d(16, 32, 1),
            nn.ReLU6(),
            nn.MaxPool2d(2),
            nn.ZeroPad2d((0, 1, 0, 1)),
        )
        self.branch = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = torch.relu(x + self.branch(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="session")
def net() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet().eval()


@pytest.fixture(scope="session")
def task() -> Task:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (96, 16, 16, 3), dtype=np.uint8)
    return from_arrays(images, np.arange(96) % 10, validation=16, test=16)
