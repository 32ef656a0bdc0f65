"""A data set of bright rectangles on noise, small enough to train on in seconds."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

SIDE = 96


def rectangles(folder: Path, count: int, seed: int) -> Path:
    """Write ``count`` images and their COCO file; each has one bright box, every fourth none."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    images, annotations = [], []
    for index in range(count):
        pixels = random.integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8)
        if index % 4:
            width, height = (int(v) for v in random.integers([20, 12], [40, 24]))
            left, top = (int(random.integers(SIDE - side)) for side in (width, height))
            pixels[top : top + height, left : left + width] = 230
            box = [left, top, width, height]
            annotations.append({"id": len(annotations), "image_id": index, "bbox": box})
        name = f"{index:03}.png"
        cv2.imwrite(str(folder / name), pixels)
        images.append({"id": index, "file_name": name, "width": SIDE, "height": SIDE})
    path = folder / "boxes.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


@pytest.fixture(scope="session")
def draw() -> Callable[..., Path]:
    return rectangles


@pytest.fixture(scope="session")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rectangles(tmp_path_factory.mktemp("rectangles"), 48, seed=0)


@pytest.fixture(scope="session")
def detector(boxes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a detector that was trained for a few seconds."""
    from penjing import attention

    folder = tmp_path_factory.mktemp("detector")
    attention.train(boxes, folder=folder, budget=12_000, epochs=25)
    return folder
