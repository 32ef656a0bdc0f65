"""Quantize and dequantize every integer value."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from penjing.targets.onnxruntime import initializers
from penjing.targets.onnxruntime.deployed_layer import Grid
from penjing.targets.onnxruntime.passes.choose_grids import groups_of
from penjing.targets.onnxruntime.passes.mark_integer_edges import is_clamp, is_integer_layer


class InsertQuantizers(InPlacePass):
    """Insert ``QuantizeLinear`` and ``DequantizeLinear`` after every integer value.

    A ``Relu`` or ``Clip`` that produces one is replaced by the saturation of the quantizer, and by a
    ``Clip`` of integers where the quantizer's range is wider.
    """

    def call(self, model: ir.Model) -> PassResult:
        groups = groups_of(model.graph)
        for group in groups:
            assert group.grid is not None
            constants = _constants(model.graph, str(group.values[0].name), group.grid)
            for value in group.values:
                _insert(model.graph, value, group.grid, constants)
        return PassResult(model, bool(groups))


def _constants(graph: ir.Graph, name: str, grid: Grid) -> tuple[ir.Value, ir.Value]:
    return (
        initializers.add(graph, f"{name}_scale", np.array(grid.scale, np.float32)),
        initializers.add(graph, f"{name}_zero_point", np.array(grid.zero_point, np.uint8)),
    )


def _insert(
    graph: ir.Graph, value: ir.Value, grid: Grid, constants: tuple[ir.Value, ir.Value]
) -> None:
    source, limits = _unclamped(value)
    quantize = ir.node("QuantizeLinear", [source, *constants])
    new = [quantize]
    if limits is not None:
        new += _integer_clip(graph, quantize.outputs[0], grid, limits)
    dequantize = ir.node("DequantizeLinear", [new[-1].outputs[0], *constants])
    new.append(dequantize)
    result = dequantize.outputs[0]
    result.shape, result.type = value.shape, value.type
    _splice(graph, value, new)
    _requantize_for_others(graph, result, grid)


def _unclamped(value: ir.Value) -> tuple[ir.Value, tuple[float, float] | None]:
    """Return the value to quantize instead of ``value``: the input of its clamp, and the limits, if
    any."""
    node = value.producer()
    if node is None or not is_clamp(node):
        return value, None
    if node.op_type == "Relu":
        return node.inputs[0], (0.0, math.inf)  # type: ignore[return-value]
    low, high = (
        initializers.constant(node.inputs[i]) if i < len(node.inputs) else None for i in (1, 2)
    )
    return node.inputs[0], (  # type: ignore[return-value]
        -math.inf if low is None else float(low),
        math.inf if high is None else float(high),
    )


def _integer_clip(
    graph: ir.Graph, value: ir.Value, grid: Grid, limits: tuple[float, float]
) -> list[ir.Node]:
    """Make a ``Clip`` of integers, or no node if the quantizer's range rounds to within ``limits``."""
    low, high = (np.clip(limit / grid.scale + grid.zero_point, 0, 255) for limit in limits)
    low, high = round(float(low)), round(float(high))
    if low <= 0 and high >= 255:
        return []
    bounds = [
        initializers.add(graph, f"{value.name or 'clip'}_{kind}", np.array(bound, np.uint8))
        for kind, bound in (("low", low), ("high", high))
    ]
    return [ir.node("Clip", [value, *bounds])]


def _splice(graph: ir.Graph, value: ir.Value, new: list[ir.Node]) -> None:
    """Insert ``new`` after ``value`` and let all other readers of it read their result."""
    result = new[-1].outputs[0]
    uses = [use for use in value.uses() if use.node is not new[0]]
    node = value.producer()
    if node is None:
        graph.insert_before(graph[0], new)
    else:
        graph.insert_after(node, new)
    for use in uses:
        use.node.replace_input_with(use.idx, result)
    for index, output in enumerate(graph.outputs):
        if output is value:
            result.name, value.name = value.name, f"{value.name}_float"
            graph.outputs[index] = result


def _requantize_for_others(graph: ir.Graph, value: ir.Value, grid: Grid) -> None:
    """Requantize the value for layers whose inputs have another scale or zero point."""
    for use in list(value.uses()):
        own = use.node.meta["layer"].input if is_integer_layer(use.node) and use.idx == 0 else None
        if own is None or own == grid:
            continue
        constants = _constants(graph, f"{use.node.meta['layer'].name}_input", own)
        quantize = ir.node("QuantizeLinear", [value, *constants])
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *constants])
        graph.insert_before(use.node, [quantize, dequantize])
        use.node.replace_input_with(0, dequantize.outputs[0])
