"""Selective attention: a tiny detector finds the region of interest, a big model sees only that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penjing import lazy
from penjing.errors import PenjingError

if TYPE_CHECKING:
    from penjing.attention.build import train
    from penjing.attention.bundle import load, save
    from penjing.attention.crop import Crop
    from penjing.attention.detector import Detector
    from penjing.attention.motion import Motion
    from penjing.attention.pipeline import Found, Pipeline

__all__ = ["Crop", "Detector", "Found", "Motion", "Pipeline", "load", "save", "train"]

STEPS = 12_000
"""Default number of steps of a detector's training."""
MOST_EPOCHS = 1000
"""Largest number of passes over the images for these steps."""

_HOME = {
    "Crop": "crop",
    "Detector": "detector",
    "Found": "pipeline",
    "Motion": "motion",
    "Pipeline": "pipeline",
    "load": "bundle",
    "save": "bundle",
    "train": "build",
}


_find = lazy.attributes(__name__, _HOME)


def __getattr__(name: str) -> Any:
    try:
        return _find(name)
    except ModuleNotFoundError as error:
        if error.name not in ("cv2", "pycocotools"):
            raise
        raise PenjingError(
            f"penjing.attention needs {error.name}; pip install penjing[attention]."
        ) from error
