"""Ways to run a net on a device: file formats with their kernels."""

from penjing.targets.onnxruntime.target import OnnxRuntime
from penjing.targets.target import FileSize, Target

__all__ = ["STANDARD", "FileSize", "Target"]

STANDARD: Target = OnnxRuntime()
"""The target for which models are made where none is named."""
