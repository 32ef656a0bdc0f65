"""The target ONNX Runtime."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from penjing import container
from penjing.targets.onnxruntime import weight_codes
from penjing.targets.onnxruntime.export import export


@dataclass(frozen=True)
class OnnxRuntime:
    """Target of ONNX files that ONNX Runtime runs."""

    name: str = "ONNX Runtime"

    def packed_bytes(self, model: nn.Module, example: Tensor) -> int:
        """Make the ``.penjing`` file of ``model`` and return its bytes; the file is not kept."""
        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder, "model.onnx")
            export(model, example, graph)
            return container.pack(graph, Path(folder, "model.penjing"))

    def tensors(self, model: nn.Module) -> list[np.ndarray]:
        """Return the integers of the layers, then all that is stored as float32."""
        return weight_codes.stored_tensors(model)
