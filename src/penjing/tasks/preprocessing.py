"""How an image file becomes the model's input."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F


class Preprocessing(BaseModel):
    """Resize, centre crop, scale to [0, 1], subtract ``mean``, divide by ``std``.

    The same arithmetic as torchvision's ``ImageClassification`` preset on a PIL image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(gt=0)
    """Side of the model's square input, px."""
    channels: int = 3
    """3 = RGB, 1 = grey."""
    resize: int | None = Field(default=None, gt=0)
    """Short side before the centre crop, px; None resizes straight to ``size`` x ``size``."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    mean: tuple[float, ...]
    """One value a channel, of pixels in [0, 1]."""
    std: tuple[float, ...]
    """One positive value a channel, of pixels in [0, 1]."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels}, expected 1 (grey) or 3 (RGB)")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std need {self.channels} values each, one a channel")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize={self.resize} is smaller than the crop, size={self.size}")
        return self

    def pixels(self, image: Image.Image) -> Tensor:
        """``image`` resized and cropped: uint8 ``[C, size, size]``."""
        mode = "L" if self.channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        square = [self.size, self.size]
        interpolation = InterpolationMode(self.interpolation)
        if self.resize is not None:
            image = F.center_crop(F.resize(image, [self.resize], interpolation), square)
        elif image.size != (self.size, self.size):
            image = F.resize(image, square, interpolation)
        pixels = torch.from_numpy(np.array(image))
        return pixels.view(self.size, self.size, self.channels).permute(2, 0, 1)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Model input, float32 ``[N, C, H, W]``, from uint8 pixels of that shape."""
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return (pixels.float() / 255 - mean) / std


CIFAR = Preprocessing(size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
MNIST = Preprocessing(size=28, channels=1, mean=(0.1307,), std=(0.3081,))
FASHION_MNIST = Preprocessing(size=28, channels=1, mean=(0.2860,), std=(0.3530,))
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
