"""Random changes to training images that keep their class, on whole batches."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

SHIFT = 1 / 8
"""Default largest shift of an image, as a share of its side."""


def shift(pixels: Tensor, generator: Generator, share: float = SHIFT) -> Tensor:
    """Shift each image of ``pixels`` ``[N, C, H, W]`` at random by up to ``share`` of its height and
    width, and fill the border with zeros.

    This is the padded random crop of He et al. 2016 (arXiv:1512.03385, section 4.2): 4 px at 32 x 32.
    """
    count, channels, height, width = pixels.shape
    up, aside = int(height * share), int(width * share)
    padded = F.pad(pixels, (aside, aside, up, up))
    top = torch.randint(2 * up + 1, (count, 1), generator=generator)
    left = torch.randint(2 * aside + 1, (count, 1), generator=generator)
    rows = (top + torch.arange(height)).view(count, 1, height, 1)
    columns = (left + torch.arange(width)).view(count, 1, 1, width)
    image = torch.arange(count).view(count, 1, 1, 1)
    return padded[image, torch.arange(channels).view(1, channels, 1, 1), rows, columns]


def flip(pixels: Tensor, generator: Generator) -> Tensor:
    """Mirror each image of ``pixels`` ``[N, C, H, W]`` left to right with probability 1/2."""
    mirrored = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, pixels.flip(-1), pixels)
