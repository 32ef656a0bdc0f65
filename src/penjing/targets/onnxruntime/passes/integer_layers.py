"""Store the weights and biases of integer layers as integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from penjing.net.layers import IntegerWeights
from penjing.targets.onnxruntime import initializers, weight_codes
from penjing.targets.onnxruntime.deployed_layer import DeployedLayer
from penjing.targets.onnxruntime.passes.mark_integer_edges import is_integer_layer


class IntegerLayers(InPlacePass):
    """Replace weights by integers and a ``DequantizeLinear``, biases by int32 and another.

    ONNX Runtime fuses a layer in this form with the quantizers around it into one integer kernel.
    The scale of the bias must be the accumulator's, ``input scale * weight scale``.
    """

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def call(self, model: ir.Model) -> PassResult:
        nodes = [node for node in model.graph if is_integer_layer(node)]
        for node in nodes:
            _lower(model.graph, node)
        self._note(nodes)
        return PassResult(model, bool(nodes))

    def _note(self, nodes: list[ir.Node]) -> None:
        for bits in (4, 2, 1):
            names = [n.meta["layer"].name for n in nodes if n.meta["layer"].format.bits == bits]
            if names:
                self.notes.append(
                    f"{bits}-bit weights of {', '.join(names)} run as 8-bit integers: they are "
                    "widened once, when the model is loaded"
                )


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    layer: DeployedLayer = node.meta["layer"]
    codes, scale = weight_codes.codes_and_scale(layer)
    bias = initializers.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None:
        codes, scale = _room_for_bias(codes, scale, bias, layer)
    factor = _lower_weight(graph, node, codes, scale)
    if bias is not None:
        node.replace_input_with(2, _integer_bias(graph, node, bias, scale, factor))


def _lower_weight(graph: ir.Graph, node: ir.Node, codes: np.ndarray, scale: np.ndarray) -> ir.Value:
    """Let ``node`` read its weight from integers; returns their scale."""
    layer: DeployedLayer = node.meta["layer"]
    assert isinstance(layer.format, IntegerWeights)
    axis = 1 if layer.transposed else 0
    name = str(node.inputs[1].name)  # type: ignore[union-attr]
    integers = weight_codes.stored(
        graph, node, name, codes.T if axis else codes, layer.format.bits, ir.DataType.INT8
    )
    factor = initializers.add(graph, f"{name}_scale", scale)
    # ONNX allows to leave the zero points out; some of ONNX Runtime's kernels do not.
    zeros = initializers.add(graph, f"{name}_zero_point", np.zeros(scale.shape, np.int8))
    dequantize = ir.node("DequantizeLinear", [integers, factor, zeros], {"axis": axis})
    graph.insert_before(node, dequantize)
    node.replace_input_with(1, dequantize.outputs[0])
    return factor


def _room_for_bias(
    codes: np.ndarray, scale: np.ndarray, bias: np.ndarray, layer: DeployedLayer
) -> tuple[np.ndarray, np.ndarray]:
    """Raise the scale of channels whose weights are so small that their bias would overflow 32 bits."""
    assert layer.input is not None
    needed = np.abs(bias) / (2.0**30 * layer.input.scale)
    wide = np.maximum(scale, needed).astype(np.float32)
    if np.array_equal(wide, scale):
        return codes, scale
    factor = (scale / wide).reshape(-1, *[1] * (codes.ndim - 1))
    return np.rint(codes * factor).astype(codes.dtype), wide


def _integer_bias(
    graph: ir.Graph, node: ir.Node, values: np.ndarray, scale: np.ndarray, factor: ir.Value
) -> ir.Value:
    """Store the bias as int32 with the accumulator's scale, which the runtime computes at load."""
    layer: DeployedLayer = node.meta["layer"]
    assert layer.input is not None
    step = np.float32(layer.input.scale) * scale
    integers = np.rint(values.astype(np.float64) / step).astype(np.int32)
    stored = initializers.add(graph, f"{layer.name}.bias_int32", integers)
    dequantize_input = node.inputs[0].producer()  # type: ignore[union-attr]
    assert dequantize_input is not None
    steps = ir.node("Mul", [dequantize_input.inputs[1], factor])
    dequantize = ir.node("DequantizeLinear", [stored, steps.outputs[0]], {"axis": 0})
    graph.insert_before(node, [steps, dequantize])
    return dequantize.outputs[0]
