"""COCO files: boxes as shares, and files that are not what they should be."""

import json
from pathlib import Path

import numpy as np
import pytest

from penjing import PenjingError
from penjing.tasks import coco


def write(folder: Path, **changes) -> Path:
    (folder / "a.png").write_bytes(b"")
    document = {
        "images": [{"id": 7, "file_name": "a.png", "width": 200, "height": 100}],
        "annotations": [{"id": 1, "image_id": 7, "bbox": [20, 10, 40, 30]}],
    } | changes
    (path := folder / "boxes.json").write_text(json.dumps(document))
    return path


def test_boxes_are_shares_of_the_image(tmp_path: Path):
    crowd = {"id": 2, "image_id": 7, "bbox": [180, 90, 40, 30], "iscrowd": 1}
    path = write(tmp_path, annotations=[{"id": 1, "image_id": 7, "bbox": [20, 10, 40, 30]}, crowd])
    (image,) = coco.read(path)
    assert np.allclose(image.boxes, [[0.1, 0.1, 0.3, 0.4, 1], [0.9, 0.9, 1, 1, 0]])
    assert (image.width, image.height, image.path) == (200, 100, tmp_path / "a.png")


def test_an_image_without_boxes_belongs_to_the_set(tmp_path: Path):
    assert coco.read(write(tmp_path, annotations=[]))[0].boxes.shape == (0, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [{"id": 7}]}, "not a COCO annotation file"),
        ({"annotations": [{"id": 1, "image_id": 8, "bbox": [0, 0, 1, 1]}]}, "image 8"),
        ({"annotations": [{"id": 1, "image_id": 7, "bbox": [0, 0, 0, 9]}]}, "no area"),
        ({"annotations": [{"id": 1, "image_id": 7, "bbox": [300, 0, 9, 9]}]}, "no area"),
        ({"annotations": [{"id": 1, "image_id": 7, "bbox": "wide"}]}, "not a COCO"),
        ({"images": [{"id": 7, "file_name": "b.png", "width": 2, "height": 1}]}, "b.png"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(PenjingError, match=message):
        coco.read(write(tmp_path, **changes))


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(PenjingError, match=r"none\.json: cannot be read"):
        coco.read(tmp_path / "none.json")
