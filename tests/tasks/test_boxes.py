"""Training views: boxes stay on their objects, whatever is done to the image."""

from pathlib import Path

import numpy as np
import pytest
import torch

from penjing import PenjingError
from penjing.tasks import coco
from penjing.tasks.boxes import BoxImages


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
    monkeypatch.setattr("penjing.tasks.boxes.MOSAIC", 0.0)
    monkeypatch.setattr("penjing.tasks.boxes.recolour", lambda pixels, *_: pixels)
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


def test_views_and_mosaics_show_hard_negatives_more_often(boxes: Path):
    """Of an image without objects, a spot in its corner; of all others, nothing."""
    known = coco.read(boxes)
    empty = next(i for i, image in enumerate(known) if not len(image.boxes))
    spot = np.array([[0.0, 0.0, 0.1, 0.1]], np.float32)
    hard = [spot if i == empty else spot[:0] for i in range(len(known))]
    with_hard, without = (BoxImages(known, 96, 96, 3, found) for found in (hard, None))
    random = np.random.default_rng(0)
    aims = [with_hard._aim(empty, random) for _ in range(600)]
    assert 60 < sum(aim is not None for aim in aims) < 140
    assert all(np.allclose(aim, 0.05) for aim in aims if aim is not None)
    assert without._aim(empty, random) is None
    shares = with_hard._chances / without._chances
    assert shares[empty] == pytest.approx(2 * len(known) / (len(known) + 1))
