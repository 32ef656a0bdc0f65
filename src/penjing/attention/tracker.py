"""Keeps objects apart and follows them over the frames in which the detector rests."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from penjing.tasks.detection_metrics import overlaps

Frame = NDArray[np.uint8]
Boxes = NDArray[np.float32]

WIDTH = 320
"""Of the grey picture in which points are followed, pixels."""
POINTS = 5
"""Points a side of the grid inside a box that are followed."""
SAME = 0.3
"""IoU from which a detection is the object that was expected there, as in SORT (arXiv:1602.00763)."""
LOST_AFTER = 3
"""Detector runs without a match after which an object is gone."""
FARTHEST = 1.0
"""Error in pixels between a point and where it returns to, beyond which it is not trusted."""


@dataclass
class Track:
    """One object over time."""

    identity: int
    box: Boxes
    """Left, top, right, bottom in the frame's pixels, and the score of the last detection."""
    missed: int = 0
    frames: int = 0
    """Since the last detection."""
    velocity: NDArray[np.float32] = field(default_factory=lambda: np.zeros(2, np.float32))
    """Pixels a frame."""


class Tracker:
    """Median flow between detections (Kalal et al. 2010, "Forward-Backward Error"), and greedy
    assignment by overlap when the detector has run.

    Args:
        flow: whether motion is measured; without it, as for a detector that runs on every frame,
            objects go on as they moved.
    """

    def __init__(self, flow: bool = True) -> None:
        self.flow = flow
        self.tracks: list[Track] = []
        self._next = 1
        self._grey: NDArray[np.uint8] | None = None

    def follow(self, frame: Frame) -> list[Track]:
        """Move every track to where it is in ``frame`` uint8 ``[H, W, 3]``; the detector rests."""
        self._move(frame)
        return self.visible()

    def update(self, frame: Frame, detections: Boxes) -> list[Track]:
        """Take ``detections`` float32 ``[n, 5]`` of ``frame``, as ``Detector`` gives them."""
        self._move(frame)
        pairs = self._pairs(detections)
        for track in self.tracks:
            track.missed += 1
        for track, index in pairs:
            error = _centre(detections[index]) - _centre(track.box)
            track.velocity = track.velocity + error / (2 * max(1, track.frames))
            track.box = detections[index].astype(np.float32)
            track.missed = track.frames = 0
        self.tracks = [track for track in self.tracks if track.missed <= LOST_AFTER]
        taken = {index for _, index in pairs}
        for index in range(len(detections)):
            if index not in taken:
                self.tracks.append(Track(self._next, detections[index].astype(np.float32)))
                self._next += 1
        if self._grey is None and self.flow and self.tracks:
            self._grey = _small(frame)
        return self.visible()

    def visible(self) -> list[Track]:
        """The objects that the last run of the detector saw."""
        return [track for track in self.tracks if track.missed == 0]

    def _move(self, frame: Frame) -> None:
        before, self._grey = self._grey, _small(frame) if self.flow and self.tracks else None
        for track in self.tracks:
            if before is not None and self._grey is not None and before.shape == self._grey.shape:
                scale = self._grey.shape[1] / frame.shape[1]
                shift = _flow(before, self._grey, track.box[:4] * scale)
                track.velocity = track.velocity if shift is None else shift / scale
            track.box[:4] += np.tile(track.velocity, 2)
            track.frames += 1
        self.tracks = [track for track in self.tracks if _inside(track.box, frame)]

    def _pairs(self, detections: Boxes) -> list[tuple[Track, int]]:
        """Tracks and detections that overlap, the best pair first, each used once."""
        pairs: list[tuple[Track, int]] = []
        if not self.tracks or not len(detections):
            return pairs
        shared = overlaps(np.stack([track.box for track in self.tracks]), detections)
        while shared.max() >= SAME:
            row, column = np.unravel_index(shared.argmax(), shared.shape)
            pairs.append((self.tracks[row], int(column)))
            shared[row], shared[:, column] = -1, -1
        return pairs


def _small(frame: Frame) -> NDArray[np.uint8]:
    height = max(1, round(frame.shape[0] * WIDTH / frame.shape[1]))
    small = cv2.resize(frame, (WIDTH, height), interpolation=cv2.INTER_LINEAR)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)  # type: ignore[return-value]


def _flow(before: Frame, after: Frame, box: NDArray) -> NDArray[np.float32] | None:
    """Median motion of a grid of points in ``box``; None when too few can be followed there and
    back."""
    share = (np.arange(POINTS) + 0.5) / POINTS
    x = box[0] + share * (box[2] - box[0])
    y = box[1] + share * (box[3] - box[1])
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 1, 2).astype(np.float32)
    there, found, _ = cv2.calcOpticalFlowPyrLK(before, after, points, None)  # type: ignore[call-overload]
    back, returned, _ = cv2.calcOpticalFlowPyrLK(after, before, there, None)  # type: ignore[call-overload]
    error = np.linalg.norm(back - points, axis=2)[:, 0]
    trusted = (found[:, 0] == 1) & (returned[:, 0] == 1) & (error <= FARTHEST)
    if trusted.sum() < POINTS:
        return None
    return np.median((there - points)[trusted, 0], axis=0).astype(np.float32)


def _centre(box: NDArray) -> NDArray:
    return (box[:2] + box[2:4]) / 2


def _inside(box: NDArray, frame: Frame) -> bool:
    x, y = _centre(box)
    return bool(0 <= x < frame.shape[1] and 0 <= y < frame.shape[0])
