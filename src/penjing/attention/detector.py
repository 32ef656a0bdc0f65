"""Run a detector: from a frame to boxes in the frame's pixels. Needs no PyTorch."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penjing import container
from penjing.errors import PenjingError
from penjing.targets.onnxruntime import runtime
from penjing.tasks.frames import check, to_input

METADATA = "penjing.threshold"
"""Key of the file's metadata that holds the score threshold of detections."""
LARGEST = 10**8
"""Largest size of a detector's ONNX file, bytes, also after unpacking."""


class Detector:
    """A trained detector on the CPU.

    Attributes:
        source: bytes of the ONNX file.
        input_height, input_width, channels: size of the input, px, and its channels.
        threshold: smallest score of a detection.
    """

    def __init__(
        self, source: bytes, *, threads: int = 1, threshold: float | None = None, name: str = "file"
    ) -> None:
        self._session = runtime.session(source, threads)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        stored = self._session.get_modelmeta().custom_metadata_map.get(METADATA, "")
        if not _is_detector(inputs, outputs, stored):
            raise PenjingError(
                f"{name} is not a detector (it takes {_described(inputs)} and gives "
                f"{_described(outputs)}); make one with penjing attend train."
            )
        self.source = source
        self._name = inputs[0].name
        self.input_height, self.input_width, self.channels = inputs[0].shape[1:]
        self.threshold = float(stored) if threshold is None else threshold

    @classmethod
    def load(
        cls, path: str | Path, *, threads: int = 1, threshold: float | None = None
    ) -> Detector:
        """Load the detector in a ``.penjing`` or ``.onnx`` file.

        Args:
            threshold: smallest score of a detection; None takes the one in the file, set in training.

        Raises:
            PenjingError: the file cannot be read, or holds no detector.
        """
        source = onnx_bytes(Path(path), LARGEST)
        return cls(source, threads=threads, threshold=threshold, name=str(path))

    def __call__(self, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Find the objects in ``frame`` uint8 ``[H, W, 3]``, best first: float32 ``[n, 5]`` of left,
        top, right, bottom in the frame's pixels, and score.

        Raises:
            PenjingError: ``frame`` has another type or shape.
        """
        check(frame)
        pixels = to_input(frame, self.input_height, self.input_width, self.channels)
        found = self._session.run(None, {self._name: pixels})[0][0]
        found = found[(found[:, 4] >= self.threshold) & (found[:, 4] > 0)]
        height, width = frame.shape[:2]
        size = np.array([width, height, width, height], np.float32)
        found[:, :4] = np.clip(found[:, :4], 0, 1) * size
        return found


def _is_detector(inputs: list, outputs: list, threshold: str) -> bool:
    if len(inputs) != 1 or len(outputs) != 1 or outputs[0].name != "detections":
        return False
    shape = inputs[0].shape
    sizes = len(shape) == 4 and all(isinstance(side, int) for side in shape[1:])
    number = re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", threshold) is not None
    return inputs[0].type == "tensor(uint8)" and sizes and shape[3] in (1, 3) and number


def _described(values: list) -> str:
    return ", ".join(f"{value.type} {value.shape}" for value in values) or "nothing"


def onnx_bytes(path: Path, most: int) -> bytes:
    """Read the ONNX file in ``path``, unpacked if it is a ``.penjing`` file.

    Raises:
        PenjingError: the file cannot be read, is damaged, or has or declares more than ``most`` bytes.
    """
    if path.suffix != ".penjing":
        try:
            size = path.stat().st_size
            if size > most:
                raise PenjingError(f"{path} has {size:,} bytes; such a file has at most {most:,}.")
            return path.read_bytes()
        except OSError as error:
            raise PenjingError(f"{path} cannot be read: {error.strerror}.") from error
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "model.onnx")
        container.unpack(path, target, most=most)
        return target.read_bytes()
