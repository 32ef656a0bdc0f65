"""Read boxes on images from COCO's JSON files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.errors import PenjingError


@dataclass(frozen=True)
class Annotated:
    """An image file, its size in pixels, and the boxes on it."""

    path: Path
    boxes: NDArray[np.float32]
    """Boxes ``[m, 5]``: left, top, right, bottom as shares of the image's size, then 1 for an object
    or 0 for a crowd, in which detections are ignored."""
    width: int
    height: int


def read(file: str | Path, images: str | Path | None = None) -> list[Annotated]:
    """Read the images of a COCO file (https://cocodataset.org/#format-data) with their boxes.

    Boxes of all categories are objects; they are clipped to the image. Images without boxes belong
    to the set: they teach the background.

    Args:
        file: JSON with ``images`` (``id``, ``file_name``, ``width``, ``height``) and ``annotations``
            (``image_id``, ``bbox`` as left, top, width, height in pixels).
        images: folder of the images; None is the folder of ``file``.

    Raises:
        PenjingError: the file is not such JSON, an image is missing, a box has no area or is of no
            image.
    """
    file = Path(file)
    folder = Path(images) if images is not None else file.parent
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        entries = {entry["id"]: entry for entry in document["images"]}
        annotations = document["annotations"]
        found: dict[Any, list[list[float]]] = {identity: [] for identity in entries}
        for annotation in annotations:
            entry = entries.get(annotation["image_id"])
            if entry is None:
                raise PenjingError(
                    f"{file}: annotation {annotation.get('id')} is of image "
                    f"{annotation['image_id']}, which is not listed; add the image or remove it."
                )
            found[entry["id"]].append(_box(file, annotation, entry))
        return [_annotated(file, folder, entry, found[key]) for key, entry in entries.items()]
    except OSError as error:
        raise PenjingError(f"{file}: cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PenjingError(
            f"{file}: is not a COCO annotation file ({type(error).__name__}: {error}); expected JSON "
            "with images (id, file_name, width, height) and annotations (image_id, bbox)."
        ) from error


def _box(file: Path, annotation: dict[str, Any], entry: dict[str, Any]) -> list[float]:
    left, top, width, height = (float(value) for value in annotation["bbox"])
    sides = np.array([left, top, left + width, top + height])
    size = np.array([entry["width"], entry["height"]] * 2, float)
    shares = np.clip(sides / size, 0, 1)
    if not (shares[2] > shares[0] and shares[3] > shares[1]):
        raise PenjingError(
            f"{file}: annotation {annotation.get('id')} has the box {annotation['bbox']}, which has "
            f"no area inside {entry['file_name']} ({entry['width']} x {entry['height']}); correct it."
        )
    return [*shares.tolist(), 0.0 if annotation.get("iscrowd") else 1.0]


def _annotated(
    file: Path, folder: Path, entry: dict[str, Any], boxes: list[list[float]]
) -> Annotated:
    path = folder / entry["file_name"]
    if not path.is_file():
        raise PenjingError(
            f"{path}: no such file, but {file} lists {entry['file_name']!r}; name the folder of "
            "these images."
        )
    array = np.array(boxes, np.float32).reshape(-1, 5)
    return Annotated(path, array, int(entry["width"]), int(entry["height"]))
