"""The lowering passes, in the order in which they run; one file a pass.

A pass is a small class with one ``call`` that changes the graph in place and returns whether it did.
Passes exchange data through ``meta`` of nodes and values, never through the file: a node's ``"layer"``
is its ``DeployedLayer``, a value's ``"group"`` the set of values that share one scale and zero point,
which ``ChooseGrids`` chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx_ir.passes import InPlacePass
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    DeduplicateInitializersPass,
    RemoveUnusedNodesPass,
)

from penjing.targets.onnxruntime.deployed_layer import DeployedLayer
from penjing.targets.onnxruntime.exported_graph import Parameter
from penjing.targets.onnxruntime.passes.average_pools import AveragePools
from penjing.targets.onnxruntime.passes.choose_grids import ChooseGrids
from penjing.targets.onnxruntime.passes.codebook_weights import CodebookWeightsPass
from penjing.targets.onnxruntime.passes.flattens import Flattens
from penjing.targets.onnxruntime.passes.fold_pads import FoldPads
from penjing.targets.onnxruntime.passes.insert_quantizers import InsertQuantizers
from penjing.targets.onnxruntime.passes.integer_layers import IntegerLayers
from penjing.targets.onnxruntime.passes.mark_integer_edges import MarkIntegerEdges
from penjing.targets.onnxruntime.passes.match_layers import MatchLayers
from penjing.targets.onnxruntime.passes.plain_graph import PlainGraph
from penjing.targets.onnxruntime.passes.stored_weights import StoredWeights
from penjing.targets.onnxruntime.passes.zero_biases import ZeroBiases

__all__ = ["PlainGraph", "lowering"]


def lowering(
    layers: Sequence[DeployedLayer],
    sources: Mapping[str, Parameter],
    calibration: Sequence[np.ndarray],
    notes: list[str],
) -> list[InPlacePass]:
    """Return the passes that lower a float graph of ``layers``, whose initializers come from
    ``sources``; the passes add sentences for the user to ``notes``."""
    return [
        MatchLayers(layers, sources, notes),
        ZeroBiases(),
        AveragePools(),
        Flattens(),
        FoldPads(),
        MarkIntegerEdges(),
        ChooseGrids(calibration),
        InsertQuantizers(),
        IntegerLayers(notes),
        StoredWeights(notes),
        CodebookWeightsPass(notes),
        RemoveUnusedNodesPass(),
        DeduplicateInitializersPass(size_limit=1 << 30),
        ClearMetadataAndDocStringPass(),
    ]
