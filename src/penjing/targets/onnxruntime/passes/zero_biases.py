"""Remove biases that are all zeros."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from penjing.targets.onnxruntime import initializers


class ZeroBiases(InPlacePass):
    """Remove the third input of ``Conv`` or ``Gemm`` if it is a constant of zeros."""

    def call(self, model: ir.Model) -> PassResult:
        nodes = [node for node in model.graph if _adds_nothing(node)]
        for node in nodes:
            node.resize_inputs(2)
        return PassResult(model, bool(nodes))


def _adds_nothing(node: ir.Node) -> bool:
    if node.op_type not in ("Conv", "Gemm") or len(node.inputs) != 3:
        return False
    bias = initializers.constant(node.inputs[2])
    return bias is not None and not bias.any()
