"""Preprocessing: from an image file to the model's input."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from penjing.errors import PenjingError, invalid
from penjing.tasks.image_files import eight_bits

LARGEST = 2**28
"""Largest number of pixels of a resized image."""
Size = int | tuple[int, int]
"""Side of a square, or height and width, px."""


class Preprocessing(BaseModel):
    """Resize, centre crop, scale to [0, 1], subtract ``mean``, divide by ``std``.

    The arithmetic is that of torchvision's ``ImageClassification`` preset on a PIL image.

    Raises:
        ValidationError: the settings contradict each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Size
    """Size of the model's input, px: the side of a square, or height and width."""
    channels: int = 3
    """Number of input channels: 3 for RGB, 1 for grey."""
    resize: int | None = Field(default=None, gt=0)
    """Short side before the centre crop, px; None resizes straight to ``size``.

    For an oblong input the image is resized, with its own aspect, until it covers a rectangle of the
    input's aspect with that short side, as timm's ``ResizeKeepRatio`` does.
    """
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    mean: tuple[float, ...]
    """Mean of each channel, for pixels in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each channel, positive, for pixels in [0, 1]."""

    @field_validator("size")
    @classmethod
    def _square_is_one_number(cls, size: Size) -> Size:
        height, width = sides(size)
        if min(height, width) <= 0:
            raise ValueError(f"size={size}, expected positive numbers")
        return height if height == width else (height, width)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels}, expected 1 (grey) or 3 (RGB)")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std need {self.channels} values each, one a channel")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        if self.resize is not None and self.resize < min(self.height, self.width):
            raise ValueError(f"resize={self.resize} is smaller than the crop, size={self.size}")
        return self

    @property
    def height(self) -> int:
        """Height of the model's input, px."""
        return sides(self.size)[0]

    @property
    def width(self) -> int:
        """Width of the model's input, px."""
        return sides(self.size)[1]

    def pixels(self, image: Image.Image, name: str = "The image") -> Tensor:
        """Convert ``image`` to 8 bits a channel, resize and crop it: uint8 ``[C, height, width]``.

        Raises:
            PenjingError: a depth that cannot be scaled to 8 bits (see
                ``penjing.tasks.image_files.eight_bits``), or an image so oblong that it would be huge
                when resized; ``name`` says which image.
        """
        image = eight_bits(image, "L" if self.channels == 1 else "RGB", name)
        crop = [self.height, self.width]
        interpolation = InterpolationMode(self.interpolation)
        if self.resize is not None:
            covering = self._covering(self.resize, image.height, image.width)
            if covering[0] * covering[1] > LARGEST:
                raise PenjingError(
                    f"{name}: is {image.height} x {image.width} pixels, which would be resized to "
                    f"{covering[0]} x {covering[1]} before the crop; crop it, or remove it."
                )
            image = F.center_crop(F.resize(image, covering, interpolation), crop)
        elif image.size != (self.width, self.height):
            image = F.resize(image, crop, interpolation)
        pixels = torch.from_numpy(np.array(image))
        return pixels.view(self.height, self.width, self.channels).permute(2, 0, 1)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize uint8 pixels ``[N, C, H, W]`` to the model's input, float32 of that shape."""
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return (pixels.float() / 255 - mean) / std

    def _covering(self, short: int, height: int, width: int) -> list[int]:
        """Return the height and width that an image of ``height`` x ``width`` is resized to."""
        scale = short / min(self.height, self.width)
        high, wide = round(self.height * scale), round(self.width * scale)
        if high * width >= wide * height:
            return [high, high * width // height]
        return [wide * height // width, wide]


def sides(size: Size) -> tuple[int, int]:
    """Return the height and width of ``size``, px."""
    return (size, size) if isinstance(size, int) else size


def parse_size(text: str) -> Size:
    """Parse a size in px: ``224`` for a square, or height x width as ``192x320``.

    Raises:
        PenjingError: the text is neither.
    """
    found = re.fullmatch(r"\s*([1-9]\d*)\s*(?:[xX×]\s*([1-9]\d*)\s*)?", text)
    if found is None:
        raise PenjingError(
            f"The image size {text!r} is neither a side in pixels, as 224, nor height x width, as "
            "192x320; give one of the two."
        )
    height, width = found.groups()
    return int(height) if width is None else (int(height), int(width))


def adapted(known: Preprocessing | None, **given: Any) -> Preprocessing | None:
    """Return ``known`` with the fields in ``given`` that are not None replaced.

    A new ``size`` alone changes ``resize`` in proportion, so that the same part of each image is
    seen. Without ``known`` there are as many channels as ``mean`` has values.

    Raises:
        PenjingError: a field that must be there is missing, or fields contradict each other.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return known
    if known is None:
        options = {"size": "--image-size", "mean": "--mean", "std": "--std"}
        missing = [option for name, option in options.items() if name not in given]
        if missing:
            raise PenjingError(
                f"This model does not say how its input is prepared; give {', '.join(missing)} too."
            )
        values = {"channels": len(given["mean"])} | given
    else:
        values = known.model_dump() | given
        if known.resize is not None and "size" in given and "resize" not in given:
            scale = min(sides(given["size"])) / min(known.height, known.width)
            values["resize"] = round(known.resize * scale)
    try:
        return Preprocessing(**values)
    except ValidationError as error:
        place, reason = invalid(error)
        field = place.partition(".")[0]
        raise PenjingError(
            f"The preprocessing is contradictory: {field and field + ': '}{reason}; change it."
        ) from error


CIFAR = Preprocessing(size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
MNIST = Preprocessing(size=28, channels=1, mean=(0.1307,), std=(0.3081,))
FASHION_MNIST = Preprocessing(size=28, channels=1, mean=(0.2860,), std=(0.3530,))
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
