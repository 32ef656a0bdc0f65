"""Store integer weights in a file with 16, 8, 4, 2 or 1 bits each."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import nn

from penjing.errors import PenjingError
from penjing.net.layers import IntegerWeights
from penjing.quantization.grids import limits
from penjing.targets.onnxruntime import initializers
from penjing.targets.onnxruntime.deployed_layer import DeployedLayer

STORAGE = {
    16: ir.DataType.INT16,
    8: ir.DataType.INT8,
    4: ir.DataType.INT4,
    2: ir.DataType.INT2,
}


def codes_and_scale(layer: DeployedLayer) -> tuple[np.ndarray, np.ndarray]:
    """Return the integers of ``layer`` (int32, shaped like its weight) and their scale (float32
    ``[out]``).

    Raises ``PenjingError`` when the weights are not integers times the scale of the layer's format.
    """
    assert isinstance(layer.format, IntegerWeights)
    scale = layer.format.scale.detach().cpu().numpy().astype(np.float32).reshape(-1)
    steps = layer.weight / scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    codes = np.rint(steps)
    low, high = limits(layer.format.bits)
    is_off = np.abs(steps - codes).max() > 0.02 or codes.min() < low or codes.max() > high
    if is_off or (layer.format.bits == 1 and not codes.all()):
        raise PenjingError(
            f"the weights of {layer.name} are not {layer.format.bits}-bit integers times their scale; "
            "train with quantize attached, or apply it last."
        )
    return codes.astype(np.int32), scale


def stored_tensors(model: nn.Module) -> list[np.ndarray]:
    """Return what the file of ``model``, which has no parametrizations, stores: the integers of its
    layers (int8, or int16 for grids of 16 bits), then all that is float32; a scale that all channels
    share is one value.

    Raises what ``codes_and_scale`` raises.
    """
    integers, floats, scales = [], [], []
    for name, module in model.named_modules():
        held = dict(module.named_parameters(recurse=False)) | dict(
            module.named_buffers(recurse=False)
        )
        kind = getattr(module, "weight_format", None)
        if isinstance(kind, IntegerWeights):
            weight = held.pop("weight").detach().cpu().numpy()
            codes, scale = codes_and_scale(DeployedLayer(name, weight, kind, None))
            integers.append(codes.astype(np.int16 if kind.bits == 16 else np.int8))
            scales.append(scale[:1] if (scale == scale[0]).all() else scale)
        floats += [value.detach().cpu().numpy().astype(np.float32) for value in held.values()]
    return [*integers, *floats, *scales]


def stored(
    graph: ir.Graph, node: ir.Node, name: str, codes: np.ndarray, bits: int, dtype: ir.DataType
) -> ir.Value:
    """Add ``codes`` to ``graph`` with ``bits`` bits each, and nodes before ``node`` that convert them to
    ``dtype``. ONNX Runtime runs these once, when it loads the file."""
    if bits == 1:
        return _unpacked(graph, node, name, codes, dtype)
    integers = initializers.add(graph, f"{name}_int{bits}", codes, STORAGE[bits])
    return integers if STORAGE[bits] == dtype else _cast(graph, node, integers, dtype)


def _unpacked(
    graph: ir.Graph, node: ir.Node, name: str, codes: np.ndarray, dtype: ir.DataType
) -> ir.Value:
    """Store signs eight a byte, the first in the lowest bit, and unpack them; no ONNX type has 1 bit."""
    packed = np.packbits(codes.reshape(-1) > 0, bitorder="little")
    byte = initializers.add(graph, f"{name}_bits", packed.reshape(-1, 1))
    shift = initializers.add(graph, f"{name}_shift", np.arange(8, dtype=np.uint8))
    one = initializers.add(graph, f"{name}_one", np.array(1, np.uint8))
    shifted = ir.node("BitShift", [byte, shift], {"direction": "RIGHT"})
    bit = ir.node("BitwiseAnd", [shifted.outputs[0], one])
    graph.insert_before(node, [shifted, bit])
    signs = _signs(graph, node, name, _cast(graph, node, bit.outputs[0], dtype), dtype)
    return _shaped(graph, node, name, signs, codes.shape)


def _signs(
    graph: ir.Graph, node: ir.Node, name: str, bits: ir.Value, dtype: ir.DataType
) -> ir.Value:
    """Map bits to signs: 0 to -1, 1 to 1."""
    one = initializers.add(graph, f"{name}_unit", np.array(1), dtype)
    double = ir.node("Add", [bits, bits])
    signs = ir.node("Sub", [double.outputs[0], one])
    graph.insert_before(node, [double, signs])
    return signs.outputs[0]


def _shaped(
    graph: ir.Graph, node: ir.Node, name: str, flat: ir.Value, shape: tuple[int, ...]
) -> ir.Value:
    count = initializers.add(graph, f"{name}_count", np.array([int(np.prod(shape))]))
    start = initializers.add(graph, f"{name}_start", np.array([0]))
    target = initializers.add(graph, f"{name}_shape", np.array(shape))
    line = initializers.add(graph, f"{name}_line", np.array([-1]))
    flatten = ir.node("Reshape", [flat, line])
    cut = ir.node("Slice", [flatten.outputs[0], start, count])
    reshape = ir.node("Reshape", [cut.outputs[0], target])
    graph.insert_before(node, [flatten, cut, reshape])
    return reshape.outputs[0]


def _cast(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    cast = ir.node("Cast", [value], {"to": int(dtype)})
    graph.insert_before(node, cast)
    return cast.outputs[0]
