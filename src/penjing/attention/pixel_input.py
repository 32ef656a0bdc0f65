"""Make the deployed file take a camera's uint8 pixels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from penjing.targets.onnxruntime import initializers


class PixelInput(InPlacePass):
    """Change the graph's input to uint8 ``[batch, height, width, channels]``.

    If the first layer's input has scale 1/255 and zero point 0, pixels reach its kernel unchanged;
    otherwise they are converted to float32 in [0, 1].
    """

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        image = graph.inputs[0]
        batch, channels, height, width = image.shape  # type: ignore[misc]
        pixels = ir.Value(
            name=image.name,
            shape=ir.Shape([batch, height, width, channels]),
            type=ir.TensorType(ir.DataType.UINT8),
        )
        planes = ir.node("Transpose", [pixels], {"perm": [0, 3, 1, 2]})
        graph.insert_before(graph[0], planes)
        for use in list(image.uses()):
            if _is_on_pixels(use.node):
                ir.convenience.replace_all_uses_with(use.node.outputs[0], planes.outputs[0])
                graph.remove(use.node, safe=True)
        if list(image.uses()):
            ir.convenience.replace_all_uses_with(image, _as_float(graph, planes))
        image.name = "float_image"
        graph.inputs[0] = pixels
        return PassResult(model, True)


def _is_on_pixels(node: ir.Node) -> bool:
    if node.op_type != "QuantizeLinear":
        return False
    scale, zero = (initializers.constant(value) for value in node.inputs[1:3])
    assert scale is not None and zero is not None
    return bool(np.isclose(scale, 1 / 255, rtol=1e-5)) and int(zero) == 0 and zero.dtype == np.uint8


def _as_float(graph: ir.Graph, planes: ir.Node) -> ir.Value:
    cast = ir.node("Cast", planes.outputs, {"to": ir.DataType.FLOAT})
    share = initializers.add(graph, "pixel_share", np.array(1 / 255, np.float32))
    scaled = ir.node("Mul", [cast.outputs[0], share])
    graph.insert_after(planes, [cast, scaled])
    return scaled.outputs[0]
