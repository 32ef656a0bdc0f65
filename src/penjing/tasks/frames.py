"""Camera frames: read, check and stretch them to the detector's input."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from penjing.errors import PenjingError


def read(path: Path) -> NDArray[np.uint8]:
    """Read the image in ``path`` as RGB, uint8 ``[H, W, 3]``, turned as its EXIF orientation says;
    the upper 8 of 16 bits. Raises PenjingError when it cannot be read."""
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if pixels is None:
        raise PenjingError(
            f"{path}: cannot be read as an image; repair or remove the file, or save it with 8 or 16 "
            "bits a channel."
        )
    return pixels  # type: ignore[return-value]


def check(frame: NDArray[np.uint8]) -> None:
    """Raise PenjingError when ``frame`` is not uint8 ``[H, W, 3]``."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
        raise PenjingError(
            f"The frame is {frame.dtype} {list(frame.shape)}; expected uint8 [H, W, 3], red first. "
            "Convert it, of a grey camera with cv2.COLOR_GRAY2RGB."
        )


def to_input(frame: NDArray[np.uint8], height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """Stretch ``frame`` uint8 ``[H, W, 3]`` to the detector's input, uint8 ``[1, height, width,
    channels]``."""
    # Means over 2 x 2 pixels are many times faster than over other areas, and what is then left to
    # reduce is too little for bilinear sampling to skip pixels.
    while frame.shape[0] >= 2 * height or frame.shape[1] >= 2 * width:
        rows = frame.shape[0] // 2 if frame.shape[0] >= 2 * height else frame.shape[0]
        columns = frame.shape[1] // 2 if frame.shape[1] >= 2 * width else frame.shape[1]
        frame = cv2.resize(frame, (columns, rows), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    small = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
    if channels == 1:
        small = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)[..., None]
    return small[None]  # type: ignore[return-value]
