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
        return self._measured(model, self._weights(model))

    def estimated(self, model: nn.Module) -> int:
        """Return an estimate of the file's bytes; measured if it is the first."""
        weights = self._weights(model)
        return self._measured(model, weights) if self._graph is None else self._graph + weights

    def at_most(self, model: nn.Module, most: int) -> tuple[bool, int]:
        """Return whether the file has at most ``most`` bytes, and its bytes: measured if the estimate is
        at most ``most``, else estimated."""
        weights = self._weights(model)
        if self._graph is None or self._graph + weights <= most:
            size = self._measured(model, weights)
        else:
            size = self._graph + weights
        return size <= most, size

    def _weights(self, model: nn.Module) -> int:
        return container.weight_bytes(self.target.tensors(model))

    def _measured(self, model: nn.Module, weights: int) -> int:
        size = self.target.packed_bytes(model, self.example)
        self._graph = size - weights
        return size
