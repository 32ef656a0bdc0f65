"""Write reshapes that only flatten as ``Flatten``, which needs no constant."""

from __future__ import annotations

import math

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from penjing.targets.onnxruntime import initializers


class Flattens(InPlacePass):
    """Replace ``Reshape`` of ``[batch, ...]`` to ``[-1, product of the rest]`` by ``Flatten``."""

    def call(self, model: ir.Model) -> PassResult:
        nodes = [node for node in model.graph if _only_flattens(node)]
        for node in nodes:
            _replace(model.graph, node)
        return PassResult(model, bool(nodes))


def _only_flattens(node: ir.Node) -> bool:
    if node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[0].shape is None:
        return False
    target = initializers.constant(node.inputs[1])
    sizes = [size for size in node.inputs[0].shape if isinstance(size, int)]
    rest = list(node.inputs[0].shape)[1:]
    if target is None or not rest or not all(isinstance(size, int) for size in rest):
        return False
    return target.tolist() == [-1, math.prod(sizes[-len(rest) :])]


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    flatten = ir.node("Flatten", [node.inputs[0]], {"axis": 1})
    graph.insert_after(node, flatten)
    old, result = node.outputs[0], flatten.outputs[0]
    result.name, result.shape, result.type = f"{old.name}_flat", old.shape, old.type
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
