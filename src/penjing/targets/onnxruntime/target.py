"""ONNX Runtime as a target."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from penjing import container

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX files, run by ONNX Runtime."""

    name: str = "ONNX Runtime"

    # Imported late: whoever only runs a file needs no PyTorch.
    def packed_bytes(self, model: nn.Module, example: Tensor) -> int:
        """Make the ``.penjing`` file of ``model`` and return its bytes; the file is not kept."""
        from penjing.targets.onnxruntime.export import export

        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder, "model.onnx")
            export(model, example, graph)
            return container.pack(graph, Path(folder, "model.penjing"))

    def tensors(self, model: nn.Module) -> list[np.ndarray]:
        """Return the integers of the layers, then scales and all that is stored as float32."""
        from penjing.targets.onnxruntime.weight_codes import stored_tensors

        return stored_tensors(model)
