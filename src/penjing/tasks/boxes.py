"""Training images with boxes: read once, then cropped, mixed and recoloured in every epoch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from penjing.errors import PenjingError
from penjing.tasks.augment import SHIFT
from penjing.tasks.coco import Annotated
from penjing.tasks.frames import read, to_input

Pixels = NDArray[Any]
"""An image, uint8 ``[h, w, channels]``."""
Boxes = NDArray[np.float32]

LARGEST_IN_MEMORY = 2**31
"""Largest split that stays in memory, bytes."""
KEPT_SCALE = 2
"""Size of the images in memory relative to the input's, so that views can zoom in."""
ZOOM = (0.6, 2.0)
STRETCH = 1.25
MOSAIC = 0.4
"""Share of the training images that are mosaics of four views (Bochkovskiy et al. 2020,
arXiv:2004.10934)."""
VISIBLE = 0.6
"""Smallest share of a box in view that counts as an object; less is left out of the loss."""
AIMED = 2 / 3
"""Share of the views that are aimed at an object; a random window of a zoomed image would mostly
miss its few objects."""
AIMED_WRONG = 1 / 6
"""Share of the views that are aimed at a hard negative, in images that have some."""
SMALLEST = (4.0, 2.5)
"""Smallest width and height of an object, input pixels; smaller ones are left out of the loss."""


class BoxImages:
    """Images of one split with their boxes, a ``penjing.tasks.task.Split``.

    Pixels are uint8 ``[n, C, height, width]``: each image stretched to the input. Targets are
    float32 ``[n, m, 5]`` as in ``Annotated.boxes``, padded with boxes of -1.

    Args:
        hard: hard negatives of each image: boxes ``[n, 4]`` as shares of its size that an earlier
            detector wrongly found. Views show them more often than other background, and mosaics
            use images that have some more often.
    """

    def __init__(
        self,
        images: Sequence[Annotated],
        height: int,
        width: int,
        channels: int,
        hard: Sequence[Boxes] | None = None,
    ) -> None:
        self.images = images
        self.hard = hard or [np.empty((0, 4), np.float32)] * len(images)
        chances = np.array([1 + len(boxes) for boxes in self.hard], np.float64)
        self._chances = chances / max(chances.sum(), 1)
        self.height, self.width, self.channels = height, width, channels
        self._kept: dict[tuple[int, int], Pixels] = {}
        needed = len(images) * height * width * 3 * KEPT_SCALE**2
        self._keeps = needed <= LARGEST_IN_MEMORY
        most = max((len(image.boxes) for image in images), default=0)
        self.slots = max(1, 4 * most)

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self,
        order: Tensor,
        batch_size: int,
        generator: Generator | None = None,
        shift: float = SHIFT,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels and targets of the images at ``order``; with a generator, a random view of
        each, or a mosaic of it with three others. ``shift`` has no effect."""
        for part in order.split(batch_size):
            if generator is None:
                made = [self._plain(index) for index in part.tolist()]
            else:
                made = [self._changed(index, generator) for index in part.tolist()]
            pixels = torch.from_numpy(np.stack([p for p, _ in made]))
            boxes = torch.stack([self._filled(b) for _, b in made])
            yield pixels.permute(0, 3, 1, 2), boxes

    def digest(self) -> bytes:
        """Return the SHA-256 of input size, file names and sizes, and boxes. Hard negatives do not
        count: they follow from the model that found them."""
        shape = (self.height, self.width, self.channels)
        digest = hashlib.sha256(repr(shape).encode())
        for image in self.images:
            digest.update(f"{image.path.name}\0{image.path.stat().st_size}\0".encode())
            digest.update(image.boxes.tobytes())
        return digest.digest()

    def _plain(self, index: int) -> tuple[Pixels, Boxes]:
        pixels = self._stretched(index, 1)
        if self.channels == 1:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
        return pixels, self.images[index].boxes

    def _changed(self, index: int, generator: Generator) -> tuple[Pixels, Boxes]:
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        if random.random() < MOSAIC:
            pixels, boxes = self._mosaic(index, random)
        else:
            pixels, boxes = self._view(index, self.height, self.width, random)
        return recolour(pixels, self.channels, random), boxes

    def _mosaic(self, index: int, random: np.random.Generator) -> tuple[Pixels, Boxes]:
        """Make a mosaic of four views, one of them of the image at ``index``."""
        canvas = np.empty((self.height, self.width, 3), np.uint8)
        middle_x = int(self.width * random.uniform(0.3, 0.7))
        middle_y = int(self.height * random.uniform(0.3, 0.7))
        others = random.choice(len(self.images), size=3, p=self._chances).tolist()
        indices = random.permutation([index, *others]).tolist()
        spans_x = [(0, middle_x), (middle_x, self.width)]
        spans_y = [(0, middle_y), (middle_y, self.height)]
        found = []
        for place, chosen in enumerate(indices):
            (left, right), (top, bottom) = spans_x[place % 2], spans_y[place // 2]
            view, boxes = self._view(chosen, bottom - top, right - left, random)
            canvas[top:bottom, left:right] = view
            size = np.array([right - left, bottom - top] * 2)
            whole = np.array([self.width, self.height] * 2)
            boxes[:, :4] = (boxes[:, :4] * size + [left, top, left, top]) / whole
            found.append(boxes)
        return canvas, np.concatenate(found)

    def _view(
        self, index: int, height: int, width: int, random: np.random.Generator
    ) -> tuple[Pixels, Boxes]:
        """Cut a window of ``height`` x ``width`` out of the image at a random zoom, RGB, with its
        boxes as shares of the window."""
        source = self._stretched(index, KEPT_SCALE)
        zoom = math.exp(random.uniform(*np.log(ZOOM)))
        stretch = math.exp(random.uniform(-1, 1) * math.log(STRETCH) / 2)
        scale = np.array([zoom * stretch, zoom / stretch])
        shown = np.array([self.width, self.height]) * scale
        slack = np.array([width, height]) - shown
        offset = slack * random.uniform(-0.1, 1.1, 2)
        boxes = self.images[index].boxes.copy()
        aim = self._aim(index, random)
        if aim is not None:
            offset = np.array([width, height]) * random.uniform(0.1, 0.9, 2) - aim * shown
        mirrored = random.random() < 0.5
        matrix = np.zeros((2, 3))
        matrix[[0, 1], [0, 1]] = scale / KEPT_SCALE
        matrix[:, 2] = offset
        boxes[:, :4] = boxes[:, :4] * np.tile(shown, 2) + np.tile(offset, 2)
        if mirrored:
            matrix[0] = -matrix[0]
            matrix[0, 2] += width
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        grey = int(random.integers(256))
        if zoom < 1:  # bilinear sampling alone would skip pixels
            source = cv2.resize(source, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            matrix[:, :2] *= 2
        pixels = _warp(source, matrix, height, width, grey)
        return pixels, _in_view(boxes, height, width)

    def _aim(self, index: int, random: np.random.Generator) -> Boxes | None:
        """Choose the centre of an object or of a hard negative to aim at; None for anywhere."""
        chance = random.random()
        boxes = self.images[index].boxes if chance < AIMED else self.hard[index]
        if not len(boxes) or chance >= AIMED + AIMED_WRONG:
            return None
        left, top, right, bottom = boxes[random.integers(len(boxes)), :4]
        return np.array([(left + right) / 2, (top + bottom) / 2], np.float32)

    def _stretched(self, index: int, scale: int) -> Pixels:
        """Return the image at ``scale`` times the input's size, RGB."""
        if (index, scale) in self._kept:
            return self._kept[index, scale]
        size = (scale * self.height, scale * self.width)
        pixels = to_input(self._frame(index), *size, 3)[0]
        if self._keeps:
            self._kept[index, scale] = pixels
        return pixels

    def _frame(self, index: int) -> Pixels:
        image = self.images[index]
        frame = read(image.path)
        if frame.shape[:2] != (image.height, image.width):
            raise PenjingError(
                f"{image.path}: is {frame.shape[1]} x {frame.shape[0]}, but its annotations are for "
                f"{image.width} x {image.height}; are they of another image of the same name, or of "
                "this one before it was turned (EXIF)?"
            )
        return frame

    def _filled(self, boxes: Boxes) -> Tensor:
        target = torch.full((self.slots, 5), -1.0)
        target[: len(boxes)] = torch.from_numpy(boxes)
        return target


def recolour(pixels: Pixels, channels: int, random: np.random.Generator) -> Pixels:
    """Change the colours of ``pixels`` RGB uint8 ``[h, w, 3]`` at random: uint8 ``[h, w, channels]``.

    Gain, gamma and offset differ for each colour; some images become grey, blurred or noisy, as
    cameras and lighting differ.
    """
    grey = channels == 1 or random.random() < 0.1
    if grey:
        pixels = np.repeat(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    gamma = math.exp(random.uniform(-0.5, 0.5))
    gain = math.exp(random.uniform(-0.4, 0.4)) * np.exp(random.uniform(-0.15, 0.15, 3))
    offset = random.uniform(-0.1, 0.1)
    ramp = np.linspace(0, 1, 256)[:, None] ** gamma * gain + offset
    table = np.clip(np.rint(ramp * 255), 0, 255).astype(np.uint8)
    pixels = cv2.LUT(pixels, table[:, None, :])
    if random.random() < 0.15:
        pixels = cv2.GaussianBlur(pixels, (0, 0), random.uniform(0.4, 1.2))
    if random.random() < 0.2:
        noise = random.normal(0, random.uniform(2, 12), pixels.shape)
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return pixels if channels == 3 else np.ascontiguousarray(pixels[..., :1])


def _warp(source: Pixels, matrix: NDArray, height: int, width: int, grey: int) -> Pixels:
    # OpenCV counts from the centres of pixels, boxes from their corners.
    matrix = matrix.copy()
    matrix[:, 2] += matrix[:, :2].sum(axis=1) / 2 - 0.5
    return cv2.warpAffine(
        source,
        matrix,
        (width, height),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(grey, grey, grey),
    )


def _in_view(boxes: Boxes, height: int, width: int) -> Boxes:
    """Clip ``boxes`` in pixels to the window, as shares of it; mark those hardly in view with 0."""
    size = np.array([width, height] * 2, np.float32)
    cut = np.clip(boxes[:, :4], 0, size)
    area = _sides(boxes).prod(axis=1)
    sides = _sides(cut)
    visible = sides.prod(axis=1) / np.maximum(area, 1e-9)
    whole = (visible >= VISIBLE) & (sides >= SMALLEST).all(axis=1)
    kept = np.concatenate([cut / size, (boxes[:, 4:] * whole[:, None])], axis=1)
    return kept[visible > 0.02].astype(np.float32)


def _sides(boxes: Boxes) -> NDArray:
    return boxes[:, 2:4] - boxes[:, :2]
