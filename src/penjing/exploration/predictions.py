"""Classes that a point gives validation images, beside those the original gives."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from penjing.tasks import Task
from penjing.tasks.divergence import columns
from penjing.tasks.outputs import logits

MOST_CLASSES = 20
MOST_PICTURES = 10
WIDEST = 160  # pixels of a picture


def predictions(task: Task, expected: Any, output: Any, targets: Tensor) -> dict[str, Any]:
    """Compare the outputs of two classifiers on the validation images, as plain data.

    Args:
        expected: output of the original for all images.
        output: that of the point.
        targets: classes, int64 ``[N]``.

    Returns:
        ``changed``, how many images got another class; ``classes``, the names of the classes that
        are told, those with the most changed images if there are more than ``MOST_CLASSES``; the
        confusion ``before`` and ``after``, rows of true and columns of given classes; up to
        ``MOST_PICTURES`` ``pictures`` that got another class, those now wrong first, each a PNG
        (base64) with the names of its class and of the two given ones.
    """
    before, after = (columns(logits(each)).argmax(dim=1) for each in (expected, output))
    told = _told(before, after, targets, len(task.classes))
    changed = torch.nonzero(before != after).flatten()
    lost = (before[changed] == targets[changed]).int()
    chosen = changed[lost.argsort(descending=True, stable=True)][:MOST_PICTURES]
    return {
        "changed": len(changed),
        "images": len(targets),
        "classes": [task.classes[index] for index in told.tolist()],
        "before": _confusion(before, targets, told),
        "after": _confusion(after, targets, told),
        "pictures": _pictures(task, chosen, [targets, before, after]),
    }


def _told(before: Tensor, after: Tensor, targets: Tensor, classes: int) -> Tensor:
    """The classes to tell of, int64, ascending."""
    moved = torch.cat([targets, before, after])[(before != after).repeat(3)]
    counts = torch.bincount(moved, minlength=classes)
    return counts.argsort(descending=True, stable=True)[:MOST_CLASSES].sort().values


def _confusion(given: Tensor, targets: Tensor, told: Tensor) -> list[list[int]]:
    return [[int(((targets == i) & (given == j)).sum()) for j in told] for i in told]


def _pictures(task: Task, chosen: Tensor, classes: list[Tensor]) -> list[dict[str, str]]:
    if not len(chosen):
        return []
    pixels = next(task.splits["validation"].batches(chosen, len(chosen)))[0]
    found = []
    for index, picture in zip(chosen.tolist(), pixels, strict=True):
        names = [task.classes[int(each[index])] for each in classes]
        named = dict(zip(("true", "before", "after"), names, strict=True))
        found.append({"png": _png(picture)} | named)
    return found


def _png(pixels: Tensor) -> str:
    """Base64 of a picture, uint8 ``[C, H, W]`` with 1 or 3 channels (of others the first)."""
    planes = pixels if len(pixels) == 3 else pixels[:1]
    array = planes.permute(1, 2, 0).numpy()
    image = Image.fromarray(array if len(planes) == 3 else array[..., 0])
    image.thumbnail((WIDEST, WIDEST))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
