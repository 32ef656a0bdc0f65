"""The .penjing file: an ONNX model with entropy-coded weights, back bit for bit.

It needs NumPy and constriction only, so that a device unpacks without PyTorch or onnx.
"""

from penjing.container.contents import Contents, PackedTensor, inspect
from penjing.container.format import weight_bytes
from penjing.container.packing import pack, unpack
from penjing.container.tensors import read_tensor

__all__ = ["Contents", "PackedTensor", "inspect", "pack", "read_tensor", "unpack", "weight_bytes"]
