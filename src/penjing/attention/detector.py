"""A detector at work: a frame in, boxes in the frame's pixels out. Needs no PyTorch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penjing import container
from penjing.attention.frames import to_input
from penjing.deploy import runtime_onnxruntime as runtime
from penjing.errors import PenjingError

METADATA = "penjing.threshold"
"""Key of the file's metadata that holds the score from which an object counts as found."""


class Detector:
    """A trained detector on the CPU.

    Attributes:
        source: the ONNX file it runs.
        input_height, input_width, channels: of its input.
        threshold: score from which an object counts as found.
    """

    def __init__(
        self, source: bytes, *, threads: int = 1, threshold: float | None = None, name: str = "file"
    ) -> None:
        self._session = runtime.session(source, threads)
        image, *more = self._session.get_inputs()
        outputs = [output.name for output in self._session.get_outputs()]
        stored = self._session.get_modelmeta().custom_metadata_map.get(METADATA)
        if more or image.type != "tensor(uint8)" or outputs != ["detections"] or stored is None:
            raise PenjingError(
                f"{name} is not a detector (it takes {image.type} {image.shape} and gives "
                f"{', '.join(outputs)}); make one with penjing attend train."
            )
        self.source = source
        self._name = image.name
        self.input_height, self.input_width, self.channels = (int(s) for s in image.shape[1:])
        self.threshold = float(stored) if threshold is None else threshold

    @classmethod
    def load(
        cls, path: str | Path, *, threads: int = 1, threshold: float | None = None
    ) -> Detector:
        """The detector in a ``.penjing`` or ``.onnx`` file.

        Args:
            threshold: None takes the one in the file, set in training.

        Raises:
            PenjingError: the file cannot be read, or holds no detector.
        """
        source = onnx_bytes(Path(path))
        return cls(source, threads=threads, threshold=threshold, name=str(path))

    def __call__(self, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Objects in ``frame`` uint8 ``[H, W, 3]``, best first: float32 ``[n, 5]`` of left, top,
        right, bottom in the frame's pixels, and score."""
        pixels = to_input(frame, self.input_height, self.input_width, self.channels)
        found = self._session.run(None, {self._name: pixels})[0][0]
        found = found[(found[:, 4] >= self.threshold) & (found[:, 4] > 0)]
        height, width = frame.shape[:2]
        size = np.array([width, height, width, height], np.float32)
        found[:, :4] = np.clip(found[:, :4], 0, 1) * size
        return found


def onnx_bytes(path: Path) -> bytes:
    """The ONNX file in ``path``, unpacked if it is a ``.penjing`` file."""
    if path.suffix != ".penjing":
        try:
            return path.read_bytes()
        except OSError as error:
            raise PenjingError(f"{path} cannot be read: {error.strerror}.") from error
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "model.onnx")
        container.unpack(path, target)
        return target.read_bytes()
