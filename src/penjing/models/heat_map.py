"""The heat-map network: predicts centres of objects and distances from there to their boxes' sides."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.errors import PenjingError

STRIDE = 4
"""Stride of the output maps: input pixels a cell."""
SMALLEST_SIDE, LARGEST_SIDE = 64, 320
"""Limits of the input's height and width, px."""
COARSEST = 16
"""Stride of the coarsest features, px; height and width are multiples of it."""
CENTRE_PRIOR = 0.01
"""Probability of a centre that the untrained net gives, as in RetinaNet (arXiv:1708.02002)."""


class Design(BaseModel):
    """Architecture of a heat-map network.

    Attributes:
        height, width: size of the input, px, multiples of 16, from 64 to 320.
        channels: 3 (RGB) or 1 (grey).
        features: channels of the features at 1/2, 1/4, 1/8 and 1/16 of the input's size.
        blocks: depthwise-separable blocks at 1/8 and at 1/16 after the first of each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int = Field(ge=SMALLEST_SIDE, le=LARGEST_SIDE, multiple_of=COARSEST)
    width: int = Field(ge=SMALLEST_SIDE, le=LARGEST_SIDE, multiple_of=COARSEST)
    channels: Literal[1, 3] = 3
    features: tuple[int, int, int, int]
    blocks: tuple[int, int]


FAMILY: dict[int, tuple[tuple[int, int, int, int], tuple[int, int]]] = {
    12_000: ((4, 8, 16, 20), (1, 2)),
    20_000: ((8, 16, 28, 36), (1, 2)),
    45_000: ((16, 32, 44, 52), (2, 3)),
    100_000: ((16, 32, 64, 96), (2, 3)),
    200_000: ((24, 48, 96, 144), (2, 3)),
}
"""Features and blocks by the largest size of the packed detector, bytes, at 8 bits a weight."""


def member(budget: int, height: int, width: int, channels: Literal[1, 3] = 3) -> Design:
    """Return the largest design of the family whose packed detector has at most ``budget`` bytes.

    Raises PenjingError when even the smallest is larger.
    """
    fitting = [size for size in FAMILY if size <= budget]
    if not fitting:
        raise PenjingError(
            f"a budget of {budget:,} bytes is too small for a detector; give at least "
            f"{min(FAMILY):,}."
        )
    features, blocks = FAMILY[max(fitting)]
    return Design(height=height, width=width, channels=channels, features=features, blocks=blocks)


def heat_map(budget: int, channels: Literal[1, 3] = 3) -> nn.Module:
    """Make the family's net of ``budget`` bytes, untrained; it takes any multiple of 16 pixels."""
    return HeatMapNet(member(budget, SMALLEST_SIDE, SMALLEST_SIDE, channels))


class HeatMapNet(nn.Module):
    """Fully convolutional, anchor-free detector: a heat map of centres (CenterNet, arXiv:1904.07850)
    and, at each cell, the distances to the four sides of a box (FCOS, arXiv:1904.01355).

    Input float32 ``[N, channels, height, width]`` in [0, 1]; output float32 ``[N, 5, height / 4,
    width / 4]``: the logit that an object's centre lies in the cell, and the logarithms of the
    distances, in cells, from the cell's centre to the left, top, right and bottom side.
    """

    def __init__(self, design: Design) -> None:
        super().__init__()
        half, quarter, eighth, sixteenth = design.features
        self.stem = _conv(design.channels, half, 3, stride=2)
        self.quarter = _conv(half, quarter, 3, stride=2)
        self.eighth = nn.Sequential(
            _separable(quarter, eighth, stride=2),
            *(_separable(eighth, eighth) for _ in range(design.blocks[0])),
        )
        self.sixteenth = nn.Sequential(
            _separable(eighth, sixteenth, stride=2),
            *(_separable(sixteenth, sixteenth) for _ in range(design.blocks[1])),
        )
        self.to_eighth = _conv(sixteenth, eighth, 1, activation=False)
        self.merged_eighth = _separable(eighth, eighth)
        self.to_quarter = _conv(eighth, quarter, 1, activation=False)
        self.merged_quarter = _separable(quarter, quarter)
        self.head = _separable(quarter, quarter)
        self.centre = nn.Conv2d(quarter, 1, 1)
        self.sides = nn.Conv2d(quarter, 4, 1)
        nn.init.constant_(self.centre.bias, math.log(CENTRE_PRIOR / (1 - CENTRE_PRIOR)))  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        quarter = self.quarter(self.stem(image))
        eighth = self.eighth(quarter)
        eighth = self.merged_eighth(eighth + _doubled(self.to_eighth(self.sixteenth(eighth))))
        quarter = self.merged_quarter(quarter + _doubled(self.to_quarter(eighth)))
        seen = self.head(quarter)
        return torch.cat([self.centre(seen), self.sides(seen)], dim=1)


def _conv(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: bool = True,
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        *([nn.ReLU(inplace=True)] if activation else []),
    )


def _separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Make a depthwise 5 x 5, then a 1 x 1 convolution: a large receptive field for few weights."""
    depthwise = _conv(inputs, inputs, 5, stride, groups=inputs)
    return nn.Sequential(*depthwise, *_conv(inputs, outputs, 1))


def _doubled(features: Tensor) -> Tensor:
    return F.interpolate(features, scale_factor=2.0, mode="nearest")
