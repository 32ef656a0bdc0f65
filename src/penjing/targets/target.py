"""The interface of a target, a file format with its runtime, and the size of its files."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor, nn

from penjing import container
from penjing.targets.onnxruntime.target import OnnxRuntime


class Target(Protocol):
    """A file format and the runtime that reads it."""

    @property
    def name(self) -> str:
        """Name of the runtime."""

    def packed_bytes(self, model: nn.Module, example: Tensor) -> int:
        """Make the ``.penjing`` file of ``model`` and return its bytes; the file is not kept.

        ``example`` is one input, float32 ``[1, C, H, W]``.
        """

    def tensors(self, model: nn.Module) -> list[np.ndarray]:
        """Return the parameters of ``model`` as its file stores them: integers, scales, biases ..."""


STANDARD: Target = OnnxRuntime()
"""Default target."""


class FileSize:
    """Sizes of the ``.penjing`` files of a model and its variants for a ``target``.

    Making a file is slow. The first one gives the bytes that are not weights; later sizes are
    estimated by the container's coder on the weights alone.
    """

    def __init__(self, target: Target, example: Tensor) -> None:
        self.target, self.example = target, example
        self._graph: int | None = None

    def measured(self, model: nn.Module) -> int:
        """Return the bytes of the real file, and correct later estimates by it."""
        size = self.target.packed_bytes(model, self.example)
        self._graph = size - container.weight_bytes(self.target.tensors(model))
        return size

    def estimated(self, model: nn.Module) -> int:
        """Return an estimate of the file's bytes; measured if it is the first."""
        if self._graph is None:
            return self.measured(model)
        return self._graph + container.weight_bytes(self.target.tensors(model))

    def at_most(self, model: nn.Module, most: int) -> tuple[bool, int]:
        """Return whether the file has at most ``most`` bytes, and its bytes: measured if the estimate is
        at most ``most``, else estimated."""
        size = self.estimated(model)
        if size <= most:
            size = self.measured(model)
        return size <= most, size
