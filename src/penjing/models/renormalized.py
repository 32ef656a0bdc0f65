"""Adapt a teacher to a student with other preprocessing: each sees its own normalization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.tasks.preprocessing import Preprocessing

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey (ITU-R BT.601), as Pillow converts images."""


def renormalized(model: nn.Module, given: Preprocessing, wanted: Preprocessing) -> nn.Module:
    """Adapt ``model``, trained with the preprocessing ``wanted``, to images prepared as in ``given``.

    Returns ``model`` itself where the two do not differ in size, channels, mean and deviation.
    """
    alike = all(
        getattr(given, field) == getattr(wanted, field)
        for field in ("size", "channels", "mean", "std")
    )
    return model if alike else Renormalized(model, given, wanted)


class Renormalized(nn.Module):
    """Wrapper of ``model`` that takes float32 ``[N, C, H, W]`` prepared as in ``given``, and gives it
    to ``model`` as in ``wanted``.

    Pixels in [0, 1] are recovered, made grey or repeated for three channels, resized (bilinear,
    antialiased) and normalized. The part of the image in view stays that of ``given``. Layers keep
    the names that they have in ``model``.
    """

    given_mean: Tensor
    given_std: Tensor
    wanted_mean: Tensor
    wanted_std: Tensor
    size: Tensor

    def __init__(self, model: nn.Module, given: Preprocessing, wanted: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.channels = wanted.channels
        # Buffers, so that they move with the model and are part of its state.
        for name, values in (("given", given), ("wanted", wanted)):
            self.register_buffer(f"{name}_mean", torch.tensor(values.mean).view(-1, 1, 1))
            self.register_buffer(f"{name}_std", torch.tensor(values.std).view(-1, 1, 1))
        self.register_buffer("size", torch.tensor([wanted.height, wanted.width]))
        self._size = [wanted.height, wanted.width]
        self.train(model.training)

    def forward(self, image: Tensor) -> Any:
        pixels = self._in_channels(image * self.given_std + self.given_mean)
        if list(pixels.shape[2:]) != self._size:
            pixels = F.interpolate(pixels, self._size, mode="bilinear", antialias=True)
        return self.model((pixels - self.wanted_mean) / self.wanted_std)

    def _in_channels(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1] == 3 and self.channels == 1:
            luma = pixels.new_tensor(LUMA).view(3, 1, 1)
            return (pixels * luma).sum(dim=1, keepdim=True)
        return pixels.expand(-1, self.channels, -1, -1)

    def get_submodule(self, target: str) -> nn.Module:
        return self.model.get_submodule(target)

    def named_modules(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        return self.model.named_modules(*arguments, **options)
