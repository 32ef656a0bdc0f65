"""Find which node runs which layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from penjing.deploy import initializers
from penjing.deploy.deployed_layer import DeployedLayer


class MatchLayers(InPlacePass):
    """Put each layer on the nodes that multiply by its weights, as ``node.meta["layer"]``.

    The exporter names a weight after the layer, except when it stores it transposed: those are
    found by their values.
    """

    def __init__(self, layers: Sequence[DeployedLayer], notes: list[str]) -> None:
        self.by_name = {f"{layer.name}.weight": layer for layer in layers}
        self.by_value = {layer.weight.tobytes(): layer for layer in layers}
        self.notes = notes

    def call(self, model: ir.Model) -> PassResult:
        found = False
        for node in model.graph:
            if node.op_type in ("Conv", "Gemm", "MatMul") and (layer := self._layer(node)):
                node.meta["layer"] = layer
                found = True
        return PassResult(model, found)

    def _layer(self, node: ir.Node) -> DeployedLayer | None:
        weight = initializers.constant(node.inputs[1])
        if weight is None:
            return None
        named = self.by_name.get(str(node.inputs[1].name))  # type: ignore[union-attr]
        if named is None:
            flipped = np.ascontiguousarray(weight.T)
            return self.by_value.get(weight.tobytes()) or self.by_value.get(flipped.tobytes())
        if np.array_equal(weight, named.weight) or named.format is None:
            return dataclasses.replace(named, weight=weight)
        self.notes.append(
            f"{named.name} is stored as float32: the exporter merged its batch norm into its weights"
        )
        return dataclasses.replace(named, weight=weight, format=None, input=None)
