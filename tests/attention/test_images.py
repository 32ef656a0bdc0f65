"""Training views: boxes stay on their objects, whatever is done to the image."""

from pathlib import Path

import numpy as np
import pytest
import torch

from penjing import PenjingError
from penjing.attention import coco
from penjing.attention.images import BoxImages


def bright_box(pixels: np.ndarray) -> np.ndarray:
    """Left, top, right, bottom in pixels of what is bright."""
    rows, columns = np.nonzero(pixels.min(axis=0) > 128)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def test_plain_images_keep_their_boxes(boxes: Path):
    images = BoxImages(coco.read(boxes), 96, 96, 3)
    pixels, targets = next(images.batches(torch.arange(8), 8))
    assert pixels.shape == (8, 3, 96, 96) and pixels.dtype == torch.uint8
    for image, target in zip(pixels.numpy(), targets.numpy(), strict=True):
        found = target[target[:, 4] == 1]
        assert len(found) == (1 if (image.min(axis=0) > 128).any() else 0)
        if len(found):
            assert np.allclose(found[0, :4] * 96, bright_box(image), atol=1e-3)


def test_views_move_boxes_with_their_objects(boxes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("penjing.attention.images.MOSAIC", 0.0)
    monkeypatch.setattr("penjing.attention.images.recolour", lambda pixels, *_: pixels)
    images = BoxImages(coco.read(boxes), 96, 96, 3)
    checked = 0
    for pixels, targets in images.batches(torch.arange(48), 8, torch.Generator().manual_seed(1)):
        for image, target in zip(pixels.numpy(), targets.numpy(), strict=True):
            image = np.where(image > 150, image, 0)
            found = target[target[:, 4] == 1]
            border = np.concatenate([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
            # The grey around a small view may be bright, too.
            if len(found) != 1 or (border.min(axis=0) > 128).any():
                continue
            assert np.allclose(found[0, :4] * 96, bright_box(image), atol=2.0)
            checked += 1
    assert checked > 8


def test_the_same_generator_gives_the_same_views(boxes: Path):
    images = BoxImages(coco.read(boxes), 64, 96, 1)
    one, two = (
        list(images.batches(torch.arange(9), 4, torch.Generator().manual_seed(3))) for _ in "ab"
    )
    for (pixels, targets), (again, same) in zip(one, two, strict=True):
        assert torch.equal(pixels, again) and torch.equal(targets, same)
    assert one[0][0].shape == (4, 1, 64, 96)


def test_annotations_of_another_image_are_refused(boxes: Path):
    image, *_ = coco.read(boxes)
    wrong = coco.Annotated(image.path, image.boxes, 192, 96)
    with pytest.raises(PenjingError, match="is 96 x 96, but its annotations are for 192 x 96"):
        next(BoxImages([wrong], 64, 64, 3).batches(torch.arange(1), 1))
