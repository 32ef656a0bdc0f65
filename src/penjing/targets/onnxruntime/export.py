"""Export a compressed PyTorch model to an ONNX file that runs on integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import InPlacePass
from torch import Tensor, nn

from penjing.net import layers
from penjing.net.layers import IntegerWeights
from penjing.net.norms import fold_batch_norm
from penjing.net.plain import plain
from penjing.targets.onnxruntime.deployed_layer import DeployedLayer, take_layers
from penjing.targets.onnxruntime.exported_graph import exported
from penjing.targets.onnxruntime.passes import PlainGraph, lowering


@dataclass(frozen=True)
class Lowered:
    """Record of a written file.

    Attributes:
        notes: one sentence for every group of layers that does not run on its stored integers.
        places: positions in the file of the nodes that multiply by each layer's weight.
    """

    notes: list[str]
    places: dict[str, list[int]]


def export(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    calibration: Sequence[Tensor] = (),
    finish: Sequence[InPlacePass] = (),
) -> list[str]:
    """Write ``model`` to ``path`` as ONNX, with weights stored in their formats.

    Args:
        model: a baked model, on any device; it is not changed.
        example: one input, float32 ``[1, C, H, W]`` (or what ``model`` takes); the batch axis of the
            file is free.
        path: the ``.onnx`` file to write.
        calibration: calibration images, batches like ``example``. Needed when a layer has an 8-bit
            input: results that no layer's own quantizer describes (of additions, poolings...) get
            their ranges from them.
        finish: passes that run on the lowered graph, before unread values are removed.

    Returns:
        One sentence for every group of layers that does not run on its stored integers.

    Raises:
        PenjingError: a layer needs calibration and there is none, or the model cannot be exported.
    """
    return lower(model, example, path, calibration=calibration, finish=finish).notes


def lower(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    calibration: Sequence[Tensor] = (),
    finish: Sequence[InPlacePass] = (),
) -> Lowered:
    """Write ``model`` to ``path`` as ``export`` does, and return the places of its layers, too."""
    device = next((p.device for p in model.parameters()), example.device)
    model = plain(model, example.to(device)).cpu()
    example = example.cpu()
    if not any(hasattr(m, "weight_format") for m in layers.compressible(model).values()):
        fold_batch_norm(model, example)
    taken = take_layers(model)
    made = exported(model, example, _opset(taken))
    notes: list[str] = []
    batches = [batch.cpu().numpy() for batch in calibration]
    lowered = lowering(taken, made.sources, batches, notes)
    for step in (*lowered, *finish, PlainGraph()):
        step(made.graph)
    ir.save(made.graph, str(path))
    return Lowered(notes, _places(model, made.graph.graph))


def _places(model: nn.Module, graph: ir.Graph) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for index, node in enumerate(graph):
        if "layer" in node.meta:
            places.setdefault(node.meta["layer"].name, []).append(index)
    first: dict[int, str] = {}
    for name, layer in layers.compressible(model).items():
        same = first.setdefault(id(layer.weight), name)  # several layers may share one weight
        if same in places:
            places.setdefault(name, places[same])
    return places


def _opset(taken: list[DeployedLayer]) -> int:
    """Choose the oldest operator set that can store the weights: more runtimes read an older one."""
    two_bits = any(isinstance(t.format, IntegerWeights) and t.format.bits == 2 for t in taken)
    return 25 if two_bits else 21
