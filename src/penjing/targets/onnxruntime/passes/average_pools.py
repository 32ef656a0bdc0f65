"""Write global averages as the pooling for which there is an integer kernel."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from penjing.targets.onnxruntime import initializers


class AveragePools(InPlacePass):
    """Replace ``ReduceMean`` over all spatial axes by ``GlobalAveragePool`` (and ``Flatten``)."""

    def call(self, model: ir.Model) -> PassResult:
        means = [node for node in model.graph if _is_global_average(node)]
        for node in means:
            _replace(model.graph, node)
        return PassResult(model, bool(means))


def _is_global_average(node: ir.Node) -> bool:
    if node.op_type != "ReduceMean" or len(node.inputs) < 2 or node.inputs[0].shape is None:  # type: ignore[union-attr]
        return False
    axes = initializers.constant(node.inputs[1])
    rank = len(node.inputs[0].shape)  # type: ignore[union-attr, arg-type]
    spatial = set(range(2, rank))
    return rank > 2 and axes is not None and {int(a) % rank for a in axes} == spatial


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    pool = ir.node("GlobalAveragePool", [node.inputs[0]])
    new = [pool]
    if node.attributes.get_int("keepdims", 1) == 0:
        new.append(ir.node("Flatten", pool.outputs, {"axis": 1}))
    graph.insert_after(node, new)
    old, result = node.outputs[0], new[-1].outputs[0]
    result.name, result.shape, result.type = f"{old.name}_pooled", old.shape, old.type
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
