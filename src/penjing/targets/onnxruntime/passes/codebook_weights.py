"""Store shared weights as indices into their codebook."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from penjing.errors import PenjingError
from penjing.net.layers import CodebookWeights
from penjing.targets.onnxruntime import initializers


class CodebookWeightsPass(InPlacePass):
    """Replace weights by indices of 4 or 8 bits and a ``Gather``, which runs once, at load."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def call(self, model: ir.Model) -> PassResult:
        nodes = [node for node in model.graph if _has_codebook(node)]
        for node in nodes:
            _lower(model.graph, node)
        if nodes:
            names = ", ".join(node.meta["layer"].name for node in nodes)
            self.notes.append(f"shared weights of {names} run dequantized, in float32")
        return PassResult(model, bool(nodes))


def _has_codebook(node: ir.Node) -> bool:
    layer = node.meta.get("layer")
    return layer is not None and isinstance(layer.format, CodebookWeights)


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    layer = node.meta["layer"]
    values = np.sort(layer.format.values.detach().cpu().numpy())
    weight = node.inputs[1].const_value.numpy()  # type: ignore[union-attr]
    indices = np.searchsorted(values, weight).clip(max=len(values) - 1)
    if not np.array_equal(values[indices], weight):
        raise PenjingError(
            f"the weights of {layer.name} take values that its codebook of {len(values)} lacks; "
            "train with share_weights attached, or apply it last."
        )
    name = str(node.inputs[1].name)  # type: ignore[union-attr]
    dtype = ir.DataType.UINT4 if len(values) <= 16 else ir.DataType.UINT8
    stored = initializers.add(graph, f"{name}_indices", indices, dtype)
    codebook = initializers.add(graph, f"{name}_codebook", values)
    # Gather takes no index type smaller than 32 bits.
    wide = ir.node("Cast", [stored], {"to": int(ir.DataType.INT32)})
    gather = ir.node("Gather", [codebook, wide.outputs[0]])
    graph.insert_before(node, [wide, gather])
    node.replace_input_with(1, gather.outputs[0])
