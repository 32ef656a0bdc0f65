"""Find the nodes that run each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from penjing.targets.onnxruntime import initializers
from penjing.targets.onnxruntime.deployed_layer import DeployedLayer
from penjing.targets.onnxruntime.exported_graph import PRODUCTS, Parameter


class MatchLayers(InPlacePass):
    """Put each layer on the nodes that multiply by its weight, as ``node.meta["layer"]``.

    ``sources`` gives the parameter behind an initializer, and whether it is transposed. Layers that
    no node runs, and products with weights of no layer, are named in a note.
    """

    def __init__(
        self,
        layers: Sequence[DeployedLayer],
        sources: Mapping[str, Parameter],
        notes: list[str],
    ) -> None:
        self.layers = {f"{layer.name}.weight": layer for layer in layers}
        self.sources, self.notes = sources, notes

    def call(self, model: ir.Model) -> PassResult:
        found: dict[str, DeployedLayer] = {}
        foreign: list[str] = []
        for node in model.graph:
            if node.op_type not in PRODUCTS or len(node.inputs) < 2:
                continue
            layer = self._layer(node)
            if layer is not None:
                node.meta["layer"] = layer
                found[layer.name] = layer
            elif initializers.constant(node.inputs[1]) is not None:
                foreign.append(_name(node))
        self._note(found, foreign)
        return PassResult(model, bool(found))

    def _layer(self, node: ir.Node) -> DeployedLayer | None:
        weight = initializers.constant(node.inputs[1])
        source = self.sources.get(str(node.inputs[1].name))  # type: ignore[union-attr]
        if weight is None or source is None or source.name not in self.layers:
            return None
        layer = dataclasses.replace(self.layers[source.name], transposed=source.transposed)
        if layer.format is None or np.array_equal(weight, layer.stored):
            return layer
        self.notes.append(
            f"{layer.name} is stored as float32: the exporter merged its batch norm into its weights"
        )
        return dataclasses.replace(layer, format=None, input=None)

    def _note(self, found: dict[str, DeployedLayer], foreign: list[str]) -> None:
        formats = [layer for layer in self.layers.values() if layer.format is not None]
        if not formats:
            return
        self._note_activations(found.values())
        unused = [layer.name for layer in formats if layer.name not in found]
        if unused:
            self.notes.append(
                f"{', '.join(unused)}: no convolution or matrix product of the file reads their "
                "weights as they are, so that nothing of their format is in it"
            )
        if foreign:
            self.notes.append(
                f"{', '.join(dict.fromkeys(foreign))}: weights stored and run in float32, since no "
                "technique works on layers of this kind"
            )

    def _note_activations(self, found: Iterable[DeployedLayer]) -> None:
        for bits in (16, 8):
            names = [
                layer.name
                for layer in found
                if layer.input is not None and layer.input.bits == bits and not layer.integer
            ]
            if names:
                self.notes.append(
                    f"activations of {', '.join(names)} stay in float32, though {bits} bits were asked "
                    "for: integer kernels take 8-bit activations and integer weights of at most 8 bits"
                )


def _name(node: ir.Node) -> str:
    """Return the name of the layer that ``node`` came from, by its weight or the exporter."""
    weight = str(node.inputs[1].name)  # type: ignore[union-attr]
    if weight.endswith((".weight", "_weight")):
        return weight.removesuffix(".weight")
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    modules = [part.strip(" '\"[]") for part in scopes.split(",")]
    return next((part for part in reversed(modules[:-1]) if part), weight)
