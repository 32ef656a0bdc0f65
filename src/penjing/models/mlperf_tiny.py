"""The two image nets of MLPerf Tiny (arXiv:2106.07597).

Parameter counts are those of the benchmark's Keras models, which also count the running statistics
of batch norm. Strided convolutions pad by 1 on each side, Keras only on the far side: sizes and
costs are the same, weights trained there do not fit exactly.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Residual block of two 3 x 3 convolutions; its shortcut is convolved when the size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


def resnet8(num_classes: int = 10, channels: int = 3) -> nn.Module:
    """Make the net for image classification at 32 x 32: 78,666 parameters with running statistics."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


SEPARABLE = (
    (16, 1),
    (32, 2),
    (32, 1),
    (64, 2),
    (64, 1),
    (128, 2),
    *[(128, 1)] * 5,
    (256, 2),
    (256, 1),
)
"""Output channels and stride of the depthwise separable convolutions at a quarter of the width."""


def mobilenet_v1_025(num_classes: int = 2, channels: int = 3) -> nn.Module:
    """Make the net for visual wake words at 96 x 96: MobileNetV1 (arXiv:1704.04861) of width 0.25.

    221,794 parameters with running statistics.
    """
    layers = _convolution(channels, 8, 3, stride=2)
    width = 8
    for outputs, stride in SEPARABLE:
        layers += _convolution(width, width, 3, stride, groups=width)
        layers += _convolution(width, outputs, 1)
        width = outputs
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *pool, nn.Linear(width, num_classes))


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
