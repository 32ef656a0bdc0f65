"""Decide which values of the graph are 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from penjing.targets.onnxruntime import initializers
from penjing.targets.onnxruntime.deployed_layer import DeployedLayer, Grid

PASS_ON = {
    "DepthToSpace", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth", "Split",
    "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
"""Operators that move values without changing them: input and output share scale and zero point."""

COMPUTE = {
    "Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid",
}  # fmt: skip
"""Operators with an integer kernel, whose output has its own scale and zero point."""

CURVES = {"Elu", "Gelu", "HardSigmoid", "HardSwish", "Mish", "PRelu", "Softplus", "Swish", "Tanh"}
"""Elementwise operators that run in float between a dequantizer and a quantizer."""


@dataclass
class Group:
    """Values that share one scale and zero point, which are unknown until ``ChooseGrids``."""

    values: list[ir.Value] = field(default_factory=list)
    grid: Grid | None = None


class MarkIntegerEdges(InPlacePass):
    """Give every value that becomes an 8-bit integer its ``meta["group"]``.

    These are the inputs of integer layers, the outputs of convolutions (their kernel writes
    integers only), and the values between: results of operators with an integer kernel whose inputs
    are all integers. A result that only float operators or the graph's output read stays float.
    """

    def call(self, model: ir.Model) -> PassResult:
        wanted = {id(node.inputs[0]) for node in model.graph if is_integer_layer(node)}
        marked: dict[int, ir.Value] = {}
        for value in model.graph.inputs:
            if id(value) in wanted:
                marked[id(value)] = value
        for node in model.graph:
            for value in _results(node, wanted, marked):
                marked[id(value)] = value
        _drop_unread(model.graph, marked, wanted)
        _group(marked)
        return PassResult(model, bool(marked))


def is_integer_layer(node: ir.Node) -> bool:
    """Whether ``node`` multiplies by the weight of a layer that an integer kernel can run."""
    layer: DeployedLayer | None = node.meta.get("layer")
    return layer is not None and layer.integer


def activated(value: ir.Value) -> ir.Value:
    """Return the output of the ``Relu`` or ``Clip`` that alone reads ``value``, or ``value`` itself.

    Writing integers saturates, so that these two cost nothing.
    """
    users = list(value.uses())
    if len(users) == 1 and not value.is_graph_output() and is_clamp(users[0].node):
        return users[0].node.outputs[0]
    return value


def is_clamp(node: ir.Node) -> bool:
    """Whether ``node`` is a ``Relu`` or a ``Clip`` with constant limits."""
    if node.op_type == "Clip":
        return all(i is None or initializers.constant(i) is not None for i in node.inputs[1:])
    return node.op_type == "Relu"


def _results(node: ir.Node, wanted: set[int], marked: dict[int, ir.Value]) -> list[ir.Value]:
    passes_on = node.op_type in PASS_ON
    from_integers = bool(node.inputs) and all(id(i) in marked for i in _data(node))
    kernel = node.op_type in PASS_ON | COMPUTE | CURVES and from_integers
    conv = node.op_type == "Conv" and is_integer_layer(node)
    results = []
    for place, output in enumerate(node.outputs):
        result = output if passes_on else activated(output)
        made = (conv or kernel) and (place == 0 or passes_on)
        if made or not wanted.isdisjoint((id(result), id(output))):
            results.append(result)
    return results


def _data(node: ir.Node) -> list[ir.Value]:
    """Return the inputs of ``node`` that are images or features, not shapes or limits."""
    count = 1 if node.op_type in PASS_ON | CURVES else len(node.inputs)
    return [value for value in node.inputs[:count] if value is not None]


def _drop_unread(graph: ir.Graph, marked: dict[int, ir.Value], wanted: set[int]) -> None:
    for node in reversed(graph):
        for output in node.outputs:
            value = marked.get(id(output))
            if value is None or id(value) in wanted or _from_integer_conv(value):
                continue
            reads = any(id(o) in marked for use in value.uses() for o in _reached(use.node))
            if not reads or value.is_graph_output():
                del marked[id(value)]


def _reached(node: ir.Node) -> list[ir.Value]:
    if node.op_type not in PASS_ON | COMPUTE | CURVES:
        return []
    return [activated(output) for output in node.outputs]


def _from_integer_conv(value: ir.Value) -> bool:
    node = value.producer()
    if node is not None and is_clamp(node) and activated(node.inputs[0]) is value:  # type: ignore[arg-type]
        node = node.inputs[0].producer()  # type: ignore[union-attr]
    return node is not None and node.op_type == "Conv" and is_integer_layer(node)


def _group(marked: dict[int, ir.Value]) -> None:
    for value in marked.values():  # in the graph's order: the source of a group comes first
        node = value.producer()
        source = node.inputs[0] if node is not None and node.op_type in PASS_ON else None
        group = source.meta["group"] if source is not None and id(source) in marked else Group()
        group.values.append(value)
        value.meta["group"] = group
