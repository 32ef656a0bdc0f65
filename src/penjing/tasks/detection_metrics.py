"""Detection metrics: COCO's average precision, and recall at a rate of false positives."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Boxes = Sequence[NDArray[np.floating]]

AREA = 1000.0
"""Side of the image, px, that shares are scaled to, because COCO counts by area in pixels."""


def average_precision(found: Boxes, truth: Boxes) -> dict[str, float]:
    """Compute COCO's ``AP`` (over IoU 0.50 to 0.95), ``AP50`` and ``AP75`` with pycocotools.

    Args:
        found: detections of each image ``[n, 5]``: left, top, right, bottom as shares of the image's
            size, and score.
        truth: boxes of each image ``[m, 4]``: left, top, right, bottom in the same unit.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = _dataset(truth)
        reference.createIndex()
        results = _results(found)
        if not results:
            return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
        evaluation = COCOeval(reference, reference.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap50, ap75 = (float(value) for value in evaluation.stats[:3])
    return {"AP": ap, "AP50": ap50, "AP75": ap75}


def recall_at(
    found: Boxes, truth: Boxes, false_positives: float = 0.1, iou: float = 0.5
) -> tuple[float, float]:
    """Return the highest recall with at most ``false_positives`` an image, and its score threshold.

    A detection is right when it overlaps a box by ``iou`` that no better one has taken; all others
    are false positives. The threshold lies halfway to the next lower score, so that a last bit does
    not decide. Boxes are as in ``average_precision``.
    """
    matched = [_matches(boxes, real, iou) for boxes, real in zip(found, truth, strict=True)]
    scores = np.concatenate([boxes[:, 4] for boxes in found]) if found else np.empty(0)
    right = np.concatenate(matched) if matched else np.empty(0, bool)
    total = sum(len(real) for real in truth)
    if not total or not len(scores):
        return 0.0, 1.0
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], right[order]
    # A threshold lies between two different scores, never inside a tie.
    last = np.append(scores[1:] < scores[:-1], True)
    allowed = last & (np.cumsum(~right) <= false_positives * len(truth) + 1e-9)
    if not allowed.any():
        return 0.0, float(np.nextafter(scores[0], 2))
    best = int(np.flatnonzero(allowed)[-1])
    lower = scores[best + 1] if best + 1 < len(scores) else 0.0
    return float(right[: best + 1].sum() / total), float((scores[best] + lower) / 2)


def count(found: Boxes, truth: Boxes, iou: float = 0.5) -> tuple[int, int]:
    """Count the detections that are right, and the false positives, as in ``recall_at``."""
    matched = [_matches(boxes, real, iou) for boxes, real in zip(found, truth, strict=True)]
    right = sum(int(part.sum()) for part in matched)
    return right, sum(len(part) for part in matched) - right


def overlaps(one: NDArray[np.floating], other: NDArray[np.floating]) -> NDArray[np.floating]:
    """Compute the IoU of each box of ``one`` ``[n, 4]`` with each of ``other`` ``[m, 4]``:
    ``[n, m]``."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:4], other[None, :, 2:4])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(boxes[:, 2:4] - boxes[:, :2]).prod(axis=1) for boxes in (one, other)]
    return shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-12)


def outside(
    found: NDArray[np.floating], truth: NDArray[np.floating], crowds: NDArray[np.floating]
) -> NDArray[np.floating]:
    """Remove the detections ``[n, 5]`` that lie by half or more in one of ``crowds`` ``[m, 4]`` and
    overlap no box of ``truth`` ``[k, 4]`` by an IoU of 0.5."""
    if not len(crowds) or not len(found):
        return found
    low = np.maximum(found[:, None, :2], crowds[None, :, :2])
    high = np.minimum(found[:, None, 2:4], crowds[None, :, 2:4])
    shared = np.clip(high - low, 0, None).prod(axis=2).max(axis=1)
    inside = shared >= 0.5 * (found[:, 2:4] - found[:, :2]).prod(axis=1)
    return found[~inside | _matches(found, truth, 0.5)]


def _matches(
    found: NDArray[np.floating], real: NDArray[np.floating], iou: float
) -> NDArray[np.bool_]:
    """Mark the detections that are right, bool ``[n]``; the best score chooses its box first."""
    right = np.zeros(len(found), bool)
    if not len(real):
        return right
    shared = overlaps(found, real)
    for index in np.argsort(-found[:, 4], kind="stable"):
        best = int(shared[index].argmax())
        if shared[index, best] >= iou:
            right[index] = True
            shared[:, best] = -1.0
    return right


def _dataset(truth: Boxes) -> dict:
    boxes = [(image, box) for image, real in enumerate(truth, 1) for box in real]
    return {
        "images": [{"id": image} for image in range(1, len(truth) + 1)],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": 1, "iscrowd": 0} | _rectangle(box)
            for i, (image, box) in enumerate(boxes, 1)
        ],
    }


def _results(found: Boxes) -> list[dict]:
    return [
        {
            "image_id": image,
            "category_id": 1,
            "score": float(box[4]),
            "bbox": _rectangle(box)["bbox"],
        }
        for image, boxes in enumerate(found, 1)
        for box in boxes
    ]


def _rectangle(box: NDArray[np.floating]) -> dict:
    left, top, right, bottom = (float(value) * AREA for value in box[:4])
    width, height = right - left, bottom - top
    return {"bbox": [left, top, width, height], "area": width * height}
