"""Store the integer weights of layers that run in float."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from penjing.net.layers import IntegerWeights
from penjing.targets.onnxruntime import initializers, weight_codes
from penjing.targets.onnxruntime.passes.mark_integer_edges import is_integer_layer


class StoredWeights(InPlacePass):
    """Replace weights by integers, ``Cast`` and ``Mul``, which run once, when the file is loaded.

    ``DequantizeLinear`` would compute the same, but ONNX Runtime runs it at every inference.
    """

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def call(self, model: ir.Model) -> PassResult:
        nodes = [node for node in model.graph if _is_stored(node)]
        for node in nodes:
            _lower(model.graph, node)
        self._note(nodes)
        return PassResult(model, bool(nodes))

    def _note(self, nodes: list[ir.Node]) -> None:
        for bits in sorted({node.meta["layer"].format.bits for node in nodes}):
            names = [n.meta["layer"].name for n in nodes if n.meta["layer"].format.bits == bits]
            self.notes.append(
                f"{bits}-bit weights of {', '.join(names)} run dequantized, in float32"
            )


def _is_stored(node: ir.Node) -> bool:
    layer = node.meta.get("layer")
    is_integers = layer is not None and isinstance(layer.format, IntegerWeights)
    return is_integers and not is_integer_layer(node)


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    layer = node.meta["layer"]
    codes, scale = weight_codes.codes_and_scale(layer)
    if (scale == scale[0]).all():
        scale = scale[:1]  # one for the layer: the product broadcasts it
    scale = scale.reshape(-1, *[1] * (codes.ndim - 1))
    if layer.transposed:
        codes, scale = codes.T, scale.T
    name = str(node.inputs[1].name)  # type: ignore[union-attr]
    floats = weight_codes.stored(graph, node, name, codes, layer.format.bits, ir.DataType.FLOAT)
    factor = initializers.add(graph, f"{name}_scale", scale)
    multiply = ir.node("Mul", [floats, factor])
    graph.insert_before(node, multiply)
    node.replace_input_with(1, multiply.outputs[0])
