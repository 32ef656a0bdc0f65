"""Remove what a runtime does not read from the file: in a tiny net it is most of the bytes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

LIST_DEFAULTS = {"dilations": 1, "strides": 1, "pads": 0}
"""Defaults of convolutions and poolings that operator schemas state in words only."""


class PlainGraph(InPlacePass):
    """Shorten the names of values between nodes, and remove names of nodes, types and shapes of
    values, which every runtime infers, the exporter's remarks, and attributes equal to their default.

    Inputs, outputs and weights keep their names. This pass runs last: others read shapes.
    """

    def call(self, model: ir.Model) -> PassResult:
        for index, node in enumerate(model.graph):
            node.name = None
            _drop_defaults(node, model.opset_imports.get(node.domain, 1))
            for place, value in enumerate(node.outputs):
                value.metadata_props.clear()
                if not value.is_graph_output():
                    value.name = _free_name(model.graph, f"{index}{'_' * place}")
                    value.type = value.shape = None
        for value in (*model.graph.inputs, *model.graph.initializers.values()):
            value.metadata_props.clear()
            if not value.is_graph_input() and not value.is_graph_output():
                value.type = value.shape = None
        model.producer_name, model.producer_version = "penjing", None
        return PassResult(model, True)


def _free_name(graph: ir.Graph, name: str) -> str:
    taken = {*graph.initializers, *(value.name for value in (*graph.inputs, *graph.outputs))}
    while name in taken:
        name += "_"
    return name


def _drop_defaults(node: ir.Node, version: int) -> None:
    if not onnx.defs.has(node.op_type, version, node.domain):
        return
    known = onnx.defs.get_schema(node.op_type, version, node.domain).attributes
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref() or name not in known:
            continue
        default = known[name].default_value
        if _says_default(name, attribute.value, default):
            del node.attributes[name]


def _says_default(name: str, value: object, default: onnx.AttributeProto) -> bool:
    if default.type != onnx.AttributeProto.UNDEFINED:
        known = onnx.helper.get_attribute_value(default)
        return value == (known.decode() if isinstance(known, bytes) else known)
    if name not in LIST_DEFAULTS or not isinstance(value, Sequence):
        return False
    return all(number == LIST_DEFAULTS[name] for number in value)
