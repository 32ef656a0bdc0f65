"""LeNet-300-100 and LeNet-5 for 28 x 28 grey digits, on which compression papers report."""

from __future__ import annotations

from torch import nn


def lenet_300_100(num_classes: int = 10, channels: int = 1) -> nn.Module:
    """Make LeNet-300-100 (LeCun et al. 1998): two hidden layers; 266,610 parameters for digits."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * 28 * 28, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, num_classes),
    )


def lenet5(num_classes: int = 10, channels: int = 1) -> nn.Module:
    """Make LeNet-5 as in Caffe and Deep Compression (arXiv:1510.00149); 431,080 parameters."""
    return nn.Sequential(
        nn.Conv2d(channels, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * 4 * 4, 500),
        nn.ReLU(),
        nn.Linear(500, num_classes),
    )
