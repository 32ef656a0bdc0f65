"""Cut the model's input out of a frame around a box: margins, shape, size, scale of values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from penjing.errors import PenjingError

Frame = NDArray[np.uint8]
Box = Sequence[float] | NDArray[np.floating]

WIDER = (-0.2, 0.4)
"""Range of the margins that ``learn`` tries, as shares of the box."""


class Crop(BaseModel):
    """Settings of a crop: the region of the frame around a box, and its form as the model's input.

    Attributes:
        left, top, right, bottom: margin added on that side, as a share of the box's width or height;
            a negative one cuts into the box.
        aspect: width divided by height of the region; its shorter side grows to it, as far as the
            frame reaches. None keeps the shape.
        min_size: least width and height of the region in the frame's pixels, if the frame has them.
        align: the region's left and top, and its right and bottom unless they are the frame's, are
            multiples of it, in the frame's pixels.
        height: height of the model's input, px.
        width: width of the model's input, px; None is the region's own width at ``height``, times
            ``stretch``, rounded up to a multiple of ``multiple``, between ``min_width`` and
            ``max_width``.
        channels: 3 (RGB) or 1 (grey).
        bgr: whether the model takes blue first.
        mean, std: mean and standard deviation of pixels in [0, 1], one value, or one a channel: the
            input is (pixel - mean) / std.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    left: float = Field(default=0.0, gt=-0.5)
    top: float = Field(default=0.0, gt=-0.5)
    right: float = Field(default=0.0, gt=-0.5)
    bottom: float = Field(default=0.0, gt=-0.5)
    aspect: float | None = Field(default=None, gt=0)
    min_size: int = Field(default=8, ge=1)
    align: int = Field(default=1, ge=1)
    height: int = Field(ge=1)
    width: int | None = Field(default=None, ge=1)
    stretch: float = Field(default=1.0, gt=0)
    min_width: int = Field(default=1, ge=1)
    max_width: int = Field(default=4096, ge=1)
    multiple: int = Field(default=8, ge=1)
    channels: int = 3
    bgr: bool = False
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels}, expected 1 (grey) or 3 (RGB)")
        if {len(self.mean), len(self.std)} - {1, self.channels}:
            raise ValueError(f"mean and std need 1 or {self.channels} values each, one a channel")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        if self.min_width > self.max_width:
            raise ValueError(f"min_width={self.min_width} is over max_width={self.max_width}")
        return self

    def region(self, box: Box, frame_height: int, frame_width: int) -> tuple[int, int, int, int]:
        """Return left, top, right, bottom of the region around ``box``, both in the frame's pixels:
        integers inside the frame, with at least one pixel between."""
        left, top, right, bottom = (float(side) for side in box[:4])
        width, height = right - left, bottom - top
        left, right = left - self.left * width, right + self.right * width
        top, bottom = top - self.top * height, bottom + self.bottom * height
        wide, high = max(right - left, self.min_size), max(bottom - top, self.min_size)
        if self.aspect is not None:
            wide, high = max(wide, high * self.aspect), max(high, wide / self.aspect)
        left, right = self._side(left, right, wide, frame_width)
        top, bottom = self._side(top, bottom, high, frame_height)
        return int(left), int(top), int(right), int(bottom)

    def cut(self, frame: Frame, box: Box) -> NDArray[np.float32]:
        """Cut the model's input, float32 ``[1, channels, height, width]``, of ``box`` out of ``frame``
        uint8 RGB ``[H, W, 3]``."""
        left, top, right, bottom = self.region(box, *frame.shape[:2])
        part = frame[top:bottom, left:right]
        width = self.width or self._natural_width(right - left, bottom - top)
        # First the axes that shrink, by areas: bilinear sampling would skip pixels.
        shrunk = (min(width, part.shape[1]), min(self.height, part.shape[0]))
        if shrunk != (part.shape[1], part.shape[0]):
            part = cv2.resize(part, shrunk, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
        pixels = cv2.resize(part, (width, self.height), interpolation=cv2.INTER_LINEAR)
        if self.channels == 1:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
        elif self.bgr:
            pixels = pixels[..., ::-1]
        # One multiplication and one addition a pixel, of single precision.
        scale = (1 / (255 * np.array(self.std))).astype(np.float32)
        shift = (-np.array(self.mean) / np.array(self.std)).astype(np.float32)
        return np.ascontiguousarray((pixels * scale + shift).transpose(2, 0, 1)[None])

    def _side(self, low: float, high: float, length: float, limit: int) -> tuple[int, int]:
        """Widen ``low`` to ``high`` to a span of at least ``length``, within 0 and ``limit``."""
        spare = max(0.0, length - (high - low)) / 2
        low, high = low - spare, high + spare
        start = math.floor(round(low / self.align, 6)) * self.align
        end = math.ceil(round(high / self.align, 6)) * self.align
        # At the border the region moves inwards rather than shrink.
        size = end - start
        if start < 0:
            start, end = 0, size
        if end > limit:
            end = limit
            start = max(0, (end - size) // self.align * self.align)
        return start, max(end, start + 1)

    def _natural_width(self, width: int, height: int) -> int:
        natural = width / height * self.height * self.stretch
        rounded = math.ceil(natural / self.multiple) * self.multiple
        return min(max(rounded, self.min_width), self.max_width)


def learn(
    crop: Crop,
    samples: Sequence[tuple[Frame, Box]],
    score: Callable[[list[NDArray[np.float32]]], float],
    *,
    trials: int = 40,
    jitter: float = 0.04,
    seed: int = 0,
) -> Crop:
    """Return ``crop`` with the margins at which the model behind has the best score on ``samples``.

    The four margins are searched by Optuna's tree-structured Parzen estimator (Bergstra et al. 2011),
    starting from those of ``crop``.

    Args:
        samples: frames with a box each, true ones or a detector's.
        score: scores the model on all inputs, in the order of ``samples``; higher is better.
        trials: number of margins to try.
        jitter: standard deviation by which each side of each box is moved, as a share of its length,
            so that the margins allow for a detector's errors; 0 for a detector's own boxes.
        seed: random seed of the jitter and the search.

    Raises:
        PenjingError: no samples.
    """
    import optuna

    if not samples:
        raise PenjingError("There are no samples to learn the crop from; give at least one.")
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    moved = jittered(samples, jitter, seed)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    sides = ("left", "top", "right", "bottom")
    study.enqueue_trial({side: getattr(crop, side) for side in sides})

    def objective(trial: optuna.Trial) -> float:
        margins = {side: trial.suggest_float(side, *WIDER) for side in sides}
        tried = crop.model_copy(update=margins)
        return score([tried.cut(frame, box) for frame, box in moved])

    try:
        study.optimize(objective, n_trials=trials)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return crop.model_copy(update=study.best_params)


def jittered(
    samples: Sequence[tuple[Frame, Box]], jitter: float, seed: int
) -> list[tuple[Frame, NDArray[np.float64]]]:
    """Move each side of each box of ``samples`` at random, see ``learn``."""
    random = np.random.default_rng(seed)
    moved = []
    for frame, box in samples:
        sides = np.array(box[:4], float)
        size = np.tile(sides[2:] - sides[:2], 2)
        moved.append((frame, sides + random.normal(0, jitter, 4) * size))
    return moved
