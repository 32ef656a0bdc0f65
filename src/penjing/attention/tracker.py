"""Track objects from frame to frame, also those on which the detector does not run."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from penjing.tasks.detection_metrics import overlaps

Frame = NDArray[np.uint8]
Boxes = NDArray[np.float32]

WIDTH = 320
"""Width of the grey picture in which points are followed, px."""
POINTS = 5
"""Number of followed points along each side of a box."""
SAME = 0.3
"""Smallest IoU of a detection with the track it is assigned to, as in SORT (arXiv:1602.00763)."""
LOST_AFTER = 3
"""Number of detector runs without a match after which a track ends."""
FARTHEST = 1.0
"""Largest forward-backward error of a followed point, px."""


@dataclass
class Track:
    """One object over time."""

    identity: int
    box: Boxes
    """Left, top, right, bottom in the frame's pixels, and the score of the last detection."""
    missed: int = 0
    frames: int = 0
    """Number of frames since the last detection."""
    velocity: NDArray[np.float32] = field(default_factory=lambda: np.zeros(2, np.float32))
    """Horizontal and vertical velocity, pixels a frame."""


class Tracker:
    """Tracker by median flow between detections (Kalal et al. 2010, "Forward-Backward Error"), and
    greedy assignment by overlap when the detector has run.

    Args:
        flow: whether to measure motion; if not, as for a detector that runs on every frame, objects
            keep their velocity.
    """

    def __init__(self, flow: bool = True) -> None:
        self.flow = flow
        self.tracks: list[Track] = []
        self._next = 1
        self._grey: NDArray[np.uint8] | None = None

    def follow(self, frame: Frame) -> list[Track]:
        """Move every track to its place in ``frame`` uint8 ``[H, W, 3]``, without detections."""
        self._move(frame)
        return self.visible()

    def update(self, frame: Frame, detections: Boxes) -> list[Track]:
        """Assign ``detections`` float32 ``[n, 5]`` of ``frame``, as of ``Detector``, to tracks."""
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
        """Return the objects that the last run of the detector found."""
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
        """Pair tracks and detections that overlap, the best pair first, each used once."""
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
    """Return the median motion of points in ``box``, px; None if too few can be followed forward and
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
