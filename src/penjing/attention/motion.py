"""A motion gate, which runs the detector only when something moves."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

WIDTH = 80
"""Width of the grey pictures that are compared, px."""


class Motion(BaseModel):
    """Settings of the motion gate.

    The frame, grey and 80 pixels wide, is compared with a running average of the frames before
    (Wren et al. 1997, "Pfinder"); changed pixels are counted after the median change is subtracted,
    so that a cloud or the camera's gain is no motion. Objects smaller than a square of some 30 pixels
    in a frame 1280 pixels wide are seen at a heartbeat only, unless ``area`` is lowered.

    Attributes:
        difference: grey levels (of 255) by which a pixel must differ from the background.
        area: share of the picture that must differ.
        memory: frames over which the background follows the scene.
        heartbeat: number of frames within which the detector runs at least once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    difference: float = Field(default=12.0, gt=0, le=255)
    area: float = Field(default=0.001, gt=0, le=1)
    memory: float = Field(default=20.0, ge=1)
    heartbeat: int = Field(default=30, ge=1)


class Gate:
    """The motion gate of one camera, with its background and the number of still frames."""

    def __init__(self, motion: Motion) -> None:
        self.motion = motion
        self._background: NDArray[np.float32] | None = None
        self._still = 0

    def __call__(self, frame: NDArray[np.uint8]) -> bool:
        """Decide whether the detector runs on ``frame`` uint8 ``[H, W, 3]``."""
        height = max(1, round(frame.shape[0] * WIDTH / frame.shape[1]))
        # 16 pixels for each compared one: a gate that read them all would cost as much as it saves.
        sample = cv2.resize(frame, (4 * WIDTH, 4 * height), interpolation=cv2.INTER_NEAREST)
        sample = cv2.cvtColor(sample, cv2.COLOR_RGB2GRAY)
        grey = cv2.resize(sample, (WIDTH, height), interpolation=cv2.INTER_AREA).astype(np.float32)
        moved = self._moved(grey)
        self._still = 0 if moved else self._still + 1
        if self._still >= self.motion.heartbeat:
            self._still = 0
            return True
        return moved

    def _moved(self, grey: NDArray[np.float32]) -> bool:
        background = self._background
        if background is None or background.shape != grey.shape:
            self._background = grey
            return True
        change = grey - background
        change -= np.median(change)
        cv2.accumulateWeighted(grey, background, 1 / self.motion.memory)
        share = np.count_nonzero(np.abs(change) > self.motion.difference) / grey.size
        return bool(share >= self.motion.area)
