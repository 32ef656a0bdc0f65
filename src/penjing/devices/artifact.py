"""Build artifacts: the ONNX file, its packed form, and a card with their measurements."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from onnx_ir.passes import InPlacePass
from pydantic import Field
from torch import Tensor, nn

from penjing import container, files
from penjing.devices import measurement
from penjing.devices.comparison import Original
from penjing.devices.device import Device
from penjing.devices.local import HERE
from penjing.errors import PenjingError
from penjing.net import layers
from penjing.net.input_quantizer import InputQuantizer
from penjing.net.plain import plain
from penjing.net.profiling import LayerProfile, profile
from penjing.targets.onnxruntime import runtime
from penjing.targets.onnxruntime.export import lower
from penjing.targets.onnxruntime.stored_layers import StoredLayer, floats_sentence, stored_layers
from penjing.tasks import Task, outputs_of
from penjing.tasks.interval import Comparison

CALIBRATION = 128
"""Number of calibration images for the ranges of the exported graph and the comparison with
PyTorch."""
FARTHEST = 1e-3
"""Largest distance (``measurement.Agreement``) of a float file from its model; at most 8e-4 in the zoo
(docs/zoo.md)."""
FEW_ROUNDINGS, ROUNDINGS, UNLIKE = 0.05, 3.0, 1.2
"""Limits of the distance of a file with 8-bit activations, which rounds about as many results more as
the model does: 3 times the distance that the model's own rounding makes, but at least 0.05 and at most
1.2; unrelated outputs have a distance of 1.4."""
PACKAGES = ("penjing", "torch", "onnxruntime", "numpy")


class Card(Comparison):
    """Measurements of an artifact on a device, and its comparison with the reference file, if any.

    Attributes:
        name: name of the recipe.
        recipe: recipe as a dictionary; None when the model was made otherwise.
        params, macs: parameters, and multiply-accumulates for one image.
        onnx_bytes, packed_bytes: sizes of ``model.onnx`` and ``model.penjing``.
        latency_ms, latency_p10_ms, latency_p90_ms: latency of one image, on ``threads`` threads.
        reference_latency_ms: latency of the reference file, timed in turns with this one.
        peak_rss_bytes: peak memory of a process that does nothing but run ``model.onnx``.
        score, split: the task's score of ``model.onnx`` and the split it was measured on.
        export_max_error, export_distance, export_top1_agreement: difference of ``model.onnx`` from
            the PyTorch model, as in ``measurement.Agreement``; measured before finishing passes.
        kernels: number of each operator in the runtime's optimized graph.
        notes: one sentence for every group of layers that does not run on its stored integers.
        layers: name, kind, shape (of the weight), params, macs, format, kernel, sparsity. The
            format of the weights is read from ``model.onnx``, the kernel (``int8`` or ``float32``)
            from the runtime's optimized graph.
        figures: further measurements on the split, by name.
    """

    name: str
    recipe: dict[str, Any] | None = None
    params: int
    macs: int
    onnx_bytes: int
    packed_bytes: int
    latency_ms: float
    latency_p10_ms: float
    latency_p90_ms: float
    reference_latency_ms: float | None = None
    peak_rss_bytes: int
    score: float
    split: str
    export_max_error: float
    export_distance: float = 0.0
    export_top1_agreement: float
    kernels: dict[str, int] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    layers: list[dict[str, Any]] = Field(default_factory=list)
    figures: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    cpu: str = ""
    threads: int = 1


def build(
    model: nn.Module,
    task: Task,
    folder: Path,
    *,
    recipe: dict[str, Any] | None,
    split: str = "validation",
    reference: Original | None = None,
    finish: Sequence[InPlacePass] = (),
    figures: Callable[[Path], dict[str, float]] | None = None,
    device: Device = HERE,
) -> Card:
    """Write ``model.onnx``, ``model.penjing`` and ``card.json`` to ``folder`` (made if missing).

    Args:
        model: a baked model, on any device.
        recipe: the recipe of the model, as a dictionary; None for other models.
        split: split that the file is scored on.
        reference: the original's file: timed in turns with this one, and compared with it image by
            image.
        finish: passes that run on the exported graph at the end.
        figures: makes further measurements of ``model.onnx``, for the card.
        device: device that the file is measured on.

    Raises:
        PenjingError: the model cannot be exported, the runtime cannot run it, or the file's outputs
            differ from the model's. Nothing is kept then.
    """
    parameter = next(model.parameters(), task.example)
    model = plain(model, task.example.to(parameter.device)).cpu()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as place:
        card = _made(model, task, Path(place), recipe, split, reference, finish, figures, device)
        for name in ("model.onnx", "model.penjing"):
            Path(place, name).replace(folder / name)
    write(card, folder)
    return card


def _made(
    model: nn.Module,
    task: Task,
    folder: Path,
    recipe: dict[str, Any] | None,
    split: str,
    reference: Original | None,
    finish: Sequence[InPlacePass],
    figures: Callable[[Path], dict[str, float]] | None,
    device: Device,
) -> Card:
    path, packed = folder / "model.onnx", folder / "model.penjing"
    batches = task.calibration(CALIBRATION)
    lowered = lower(model, task.example, path, calibration=batches)
    agreement = measurement.agreement(model, path, batches, device)
    check_agreement(model, agreement, batches)
    if finish:
        lowered = lower(model, task.example, path, calibration=batches, finish=finish)
    form = outputs_of(model, task.batches("train", 1, limit=1))[0]
    costs = profile(model, task.example)
    optimized = runtime.optimized(path)
    stored = stored_layers(path, lowered.places, optimized)
    floats = floats_sentence(stored.values())
    return Card(
        name=str((recipe or {}).get("name", type(model).__name__)),
        recipe=recipe,
        params=costs.params,
        macs=costs.macs,
        onnx_bytes=path.stat().st_size,
        packed_bytes=container.pack(path, packed),
        **_measurements(task, path, split, reference, form, device, _trains(recipe)),
        kernels=dict(Counter(node.op_type for node in optimized.graph.node)),
        export_max_error=agreement.max_error,
        export_distance=agreement.distance,
        export_top1_agreement=agreement.top1,
        figures=figures(path) if figures else {},
        notes=[*([floats] if floats else []), *lowered.notes],
        layers=[_describe(model, layer, stored) for layer in costs.layers],
        versions={package: metadata.version(package) for package in PACKAGES},
        cpu=device.name,
        threads=device.threads,
    )


def check_agreement(
    model: nn.Module, agreement: measurement.Agreement, batches: Sequence[Tensor]
) -> None:
    """Raise ``PenjingError`` if the ``agreement`` of a file on ``batches`` (float32 ``[N, ...]``) shows
    that it does not compute what ``model`` does."""
    rounding = _rounding(model, batches)
    limit = FARTHEST
    if rounding is not None:
        limit = min(max(FEW_ROUNDINGS, ROUNDINGS * rounding), UNLIKE)
    if agreement.distance <= limit:
        return
    advice = "report it as a fault of the export, and deploy the model as it was"
    if rounding is not None:
        advice = "leave activations in float (activation_bits: null), since 8 bits are too few here"
    raise PenjingError(
        f"the ONNX file of {type(model).__name__} disagrees with the model: on training images its "
        f"outputs are off by {agreement.distance:.1%} of their spread, at most {limit:.1%} is "
        f"expected of rounding; {advice}."
    )


def _rounding(model: nn.Module, batches: Sequence[Tensor]) -> float | None:
    """Return the distance of the outputs of ``model`` from those without its 8-bit activations; None
    if it has none."""
    exact = copy.deepcopy(model)
    found = [
        m
        for m in exact.modules()
        if isinstance(getattr(m, "input_quantizer", None), InputQuantizer)
    ]
    if not found:
        return None
    for module in found:
        module.input_quantizer = nn.Identity()
    return measurement.distance(exact, model, batches)


def write(card: Card, folder: Path) -> None:
    """Write ``card`` to ``folder`` as ``card.json``."""
    files.write_text(folder / "card.json", card.model_dump_json(indent=1) + "\n")


def original(model: nn.Module, task: Task, folder: Path) -> Original:
    """Make a reference for other files of the one that ``build`` made of ``model`` in ``folder``."""
    form = outputs_of(model, task.batches("train", 1, limit=1))[0]
    return Original(folder / "model.onnx", task, form)


def _trains(recipe: dict[str, Any] | None) -> bool:
    """Whether a model made by ``recipe`` may have learned from the labels of training images."""
    return recipe is None or any("train" in stage for stage in recipe.get("stages", []))


def _measurements(
    task: Task,
    path: Path,
    split: str,
    reference: Original | None,
    form: Any,
    device: Device,
    trained: bool,
) -> dict[str, Any]:
    timed = device.latency([path, *([reference.path] if reference else [])])
    found = measurement.outputs(path, task, split, form=form, device=device)
    compared = (
        reference.compared_outputs(path, split, found, trained=trained) if reference else None
    )
    return {
        **(compared.model_dump() if compared else {}),
        "latency_ms": timed[0].median_ms,
        "latency_p10_ms": timed[0].p10_ms,
        "latency_p90_ms": timed[0].p90_ms,
        "reference_latency_ms": timed[1].median_ms if reference else None,
        "peak_rss_bytes": device.peak_rss(path),
        "score": float(task.score(*found)),
        "split": split,
    }


def _describe(
    model: nn.Module, layer: LayerProfile, stored: dict[str, StoredLayer]
) -> dict[str, Any]:
    module = layers.compressible(model).get(layer.name)
    weight = module.weight.detach() if module is not None else None
    found = stored.get(layer.name)
    return {
        "name": layer.name,
        "kind": layer.kind,
        "shape": list(weight.shape) if weight is not None else layer.shape,
        "params": layer.params,
        "macs": layer.macs,
        "format": found.format if found else "float32",
        "kernel": "int8" if found and found.integer else "float32",
        "sparsity": float((weight == 0).double().mean()) if weight is not None else 0.0,
    }
