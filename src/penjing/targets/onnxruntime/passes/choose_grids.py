"""Choose the scale and zero point of every integer value."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from penjing.errors import PenjingError
from penjing.net.input_quantizer import SMALLEST_INPUT_SCALE
from penjing.targets.onnxruntime import initializers, runtime
from penjing.targets.onnxruntime.deployed_layer import Grid
from penjing.targets.onnxruntime.passes.mark_integer_edges import Group, is_integer_layer

LARGEST_RATIO = 200
"""Largest ratio of a pooling's input scale to its output scale; ONNX Runtime's limit is 256."""


class ChooseGrids(InPlacePass):
    """Give each value that feeds a layer the scale and zero point of that layer's input, and the others
    those of their range on the calibration images."""

    def __init__(self, calibration: Sequence[np.ndarray]) -> None:
        self.calibration = calibration

    def call(self, model: ir.Model) -> PassResult:
        groups = groups_of(model.graph)
        for group in groups:
            group.grid = next((_layer_grid(v) for v in group.values if _layer_grid(v)), None)
        open_groups = [group for group in groups if group.grid is None]
        if open_groups:
            for group, limits in zip(open_groups, self._ranges(model, open_groups), strict=True):
                group.grid = _covering(*limits)
        for node in model.graph:
            if node.op_type in ("AveragePool", "GlobalAveragePool"):
                _limit_ratio(node)
        return PassResult(model, bool(groups))

    def _ranges(self, model: ir.Model, groups: list[Group]) -> list[tuple[float, float]]:
        """Return the range of each group's first value on the calibration images."""
        if not self.calibration:
            others = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
            raise PenjingError(
                f"export needs calibration images to find the range of {groups[0].values[0].name}"
                f"{others}; pass calibration=task.calibration()."
            )
        probe = _with_ranges(model, [str(group.values[0].name) for group in groups])
        limits = np.array(runtime.run(probe, self.calibration), dtype=np.float64)
        limits = limits.reshape(len(self.calibration), len(groups), 2)
        return list(zip(limits[..., 0].min(0), limits[..., 1].max(0), strict=True))


def groups_of(graph: ir.Graph) -> list[Group]:
    """Return the groups of ``graph``, each once, in the graph's order."""
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    found = {id(v.meta["group"]): v.meta["group"] for v in values if "group" in v.meta}
    return list(found.values())


def _limit_ratio(pool: ir.Node) -> None:
    """Raise the scale of the output of ``pool`` if the kernel would reject its ratio to the input's."""
    source, result = (v.meta.get("group") if v else None for v in (pool.inputs[0], pool.outputs[0]))
    if source is None or result is None:
        return
    if source.grid.scale > LARGEST_RATIO * result.grid.scale:
        scale = source.grid.scale / LARGEST_RATIO
        result.grid = dataclasses.replace(result.grid, scale=scale)


def _layer_grid(value: ir.Value) -> Grid | None:
    for use in value.uses():
        if use.idx == 0 and is_integer_layer(use.node):
            return use.node.meta["layer"].input
    return None


def _covering(low: float, high: float) -> Grid:
    """Return the 8-bit quantization of ``[low, high]`` that represents 0 exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, SMALLEST_INPUT_SCALE)
    return Grid(float(np.float32(scale)), round(-low / scale))


def _with_ranges(model: ir.Model, names: list[str]) -> bytes:
    """Serialize the float graph with the minimum and maximum of each named value as its outputs."""
    probe = model.clone()
    graph = probe.graph
    values = {v.name: v for node in graph for v in node.outputs} | {v.name: v for v in graph.inputs}
    graph.outputs.clear()
    # Flattened to one axis: reducing over the axis of images alone would give a shape without rank.
    keep = initializers.add(graph, "penjing_flat", np.array([-1], np.int64))
    for name in names:
        flat = ir.node("Reshape", [values[name], keep])
        graph.append(flat)
        for kind in ("ReduceMin", "ReduceMax"):
            reduced = ir.node(kind, flat.outputs, {"keepdims": 0})
            reduced.outputs[0].name = f"{name}_{kind}"
            reduced.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            graph.append(reduced)
            graph.outputs.append(reduced.outputs[0])
    return ir.serde.serialize_model(probe).SerializeToString()
