"""Read frames from images, videos and cameras, and write the objects found in them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import cv2
import numpy as np
from numpy.typing import NDArray

from penjing.attention.pipeline import Found
from penjing.errors import PenjingError
from penjing.progress import say
from penjing.tasks import frames

IMAGES = {
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"),
    *(".jp2", ".avif", ".ppm", ".pgm"),
}
MOST_VALUES = 256
"""Largest number of values of a model's output that a JSON line holds whole."""
FASTEST = 1000.0
"""Largest plausible frame rate, frames a second; streams of unknown rate state more."""
COLOUR = (0, 220, 0)


@dataclass(frozen=True)
class Shot:
    """A frame and its source.

    Attributes:
        source: file or camera.
        index: number of the frame in its source, from 0.
        seconds: time since the source's start, by its frame rate; None for images.
        rate: frames a second; None for images and if it is unknown.
        frame: pixels, uint8 RGB ``[H, W, 3]``.
    """

    source: str
    index: int
    seconds: float | None
    rate: float | None
    frame: NDArray[np.uint8]


def read(source: str | Path) -> Iterator[Shot]:
    """Yield the frames of an image, a folder of images (by name), a video file, or a camera by its
    number or address (``0``, ``rtsp://...``). The number of files of a folder that are not read is
    written on standard error.

    Raises:
        PenjingError: the source does not exist, or cannot be decoded.
    """
    path = Path(source)
    camera = str(source).isdigit() or "://" in str(source)
    if camera:
        return _video(str(source), int(str(source)) if str(source).isdigit() else str(source), True)
    if path.is_dir():
        present = [p for p in path.iterdir() if not p.name.startswith(".")]
        files = sorted(p for p in present if p.suffix.lower() in IMAGES)
        if len(present) > len(files) > 0:
            endings = ", ".join(sorted(IMAGES))
            say(f"{source}: {len(present) - len(files)} not read, which are no images ({endings})")
        if not files:
            raise PenjingError(f"{source}: has no images ({', '.join(sorted(IMAGES))}) in it.")
        return (_image(file) for file in files)
    if path.suffix.lower() in IMAGES:
        return iter([_image(path)])
    if not path.is_file():
        raise PenjingError(
            f"{source}: no such file; give an image, a folder, a video, a camera's number or address."
        )
    return _video(str(source), str(source), False)


def _image(path: Path) -> Shot:
    return Shot(str(path), 0, None, None, frames.read(path))


def _video(name: str, address: int | str, camera: bool) -> Iterator[Shot]:
    name = re.sub(r"//[^/@]*@", "//", name)  # without the password
    capture = cv2.VideoCapture(address)
    try:
        if not capture.isOpened():
            raise PenjingError(
                f"{name}: cannot be opened as a video; is it complete, and its codec known?"
            )
        told = capture.get(cv2.CAP_PROP_FPS)
        rate = told if 0 < told <= FASTEST else None
        index = 0
        while True:
            good, frame = capture.read()
            if not good:
                break
            seconds = index / rate if rate else None
            rgb = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            yield Shot(name, index, seconds, rate, rgb)  # type: ignore[arg-type]
            index += 1
        if camera:
            raise PenjingError(
                f"{name}: the camera gave no more frames after {index}; start again."
            )
        if not index:
            raise PenjingError(f"{name}: holds no frame that can be decoded; is it complete?")
    finally:
        capture.release()


def draw(frame: NDArray[np.uint8], found: Sequence[Found]) -> NDArray[np.uint8]:
    """Draw each object's box, and its output if that is text, else its track and score, on a copy of
    ``frame`` uint8 RGB ``[H, W, 3]``."""
    picture = frame.copy()
    thick = max(1, round(frame.shape[1] / 480))
    for item in found:
        left, top, right, bottom = (round(side) for side in item.box)
        cv2.rectangle(picture, (left, top), (right, bottom), COLOUR, thick)
        text = item.output if isinstance(item.output, str) else f"{item.track}: {item.score:.2f}"
        place = (left, max(top - 3 * thick, 12 * thick))
        cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45 * thick, COLOUR, thick)
    return picture


class VideoWriter:
    """Write frames to an MP4 video, which can be played once it is closed; a ``with`` block closes it,
    after Ctrl-C, too."""

    def __init__(self, path: Path, rate: float = 25.0) -> None:
        self.path, self.rate = path, rate
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def __enter__(self) -> Self:
        return self

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Add ``frame`` uint8 RGB; one of another size than the first is scaled to it.

        Raises:
            PenjingError: the file cannot be written.
        """
        if self._writer is None:
            self._size = (frame.shape[1], frame.shape[0])
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self.path), code, self.rate, self._size)
            if not self._writer.isOpened():
                raise PenjingError(f"{self.path}: cannot be written as a video; name a .mp4 file.")
        if (frame.shape[1], frame.shape[0]) != self._size:
            frame = cv2.resize(frame, self._size)  # type: ignore[assignment]
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.release()


def write_line(file: TextIO, shot: Shot, found: Sequence[Found]) -> None:
    """Write one line of JSON for a frame, and flush it, so that a killed run leaves its lines."""
    file.write(json.dumps(line(shot, found)) + "\n")
    file.flush()


def line(shot: Shot, found: Sequence[Found]) -> dict[str, Any]:
    """Return a frame's source, number, time and objects as plain data for JSON."""
    return {
        "source": shot.source,
        "frame": shot.index,
        "seconds": shot.seconds,
        "found": [
            {
                "box": [round(side, 1) for side in item.box],
                "score": round(item.score, 4),
                "track": item.track,
                "output": _plain(item.output),
            }
            for item in found
        ],
    }


def _plain(output: Any) -> Any:
    """Convert ``output`` for JSON: arrays to lists, large ones to their shape and argmax."""
    if isinstance(output, dict):
        return {str(key): _plain(part) for key, part in output.items()}
    if isinstance(output, list | tuple):
        return [_plain(part) for part in output]
    if isinstance(output, np.generic):
        return _plain(output.item())
    if isinstance(output, float) and not math.isfinite(output):
        return None  # JSON has no NaN and no infinity
    if not isinstance(output, np.ndarray):
        return output
    if output.size <= MOST_VALUES:
        return _plain(output.tolist())
    return {"shape": list(output.shape), "argmax": output.argmax(axis=-1).tolist()}


def watch(
    sources: Sequence[str | Path],
    pipeline: Callable[[NDArray[np.uint8]], list[Found]],
    report: Callable[[Shot, list[Found]], None],
) -> int:
    """Run ``pipeline`` on every frame of ``sources`` and call ``report`` on each; returns their number.

    A pipeline with ``reset`` is reset at the start of each video and each image.
    """
    count = 0
    reset = getattr(pipeline, "reset", None)
    for source in sources:
        for shot in read(source):
            if reset is not None and shot.index == 0:
                reset()
            report(shot, pipeline(shot.frame))
            count += 1
    return count
