"""Quantization: weights and layer inputs with few bits, post-training (PTQ) or in training (QAT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing.errors import PenjingError
from penjing.net import input_quantizer, layers, patches
from penjing.net.input_quantizer import InputQuantizer
from penjing.net.layers import CodebookWeights, IntegerWeights, Layer
from penjing.net.norms import fold_batch_norm
from penjing.net.observation import LayerStatistics, Observer, collect
from penjing.quantization import grids
from penjing.quantization.error_compensation import compensated
from penjing.quantization.grids import WeightQuantizer
from penjing.quantization.output_correction import correct_outputs
from penjing.quantization.saturation import safe_scale
from penjing.targets.target import STANDARD, Target
from penjing.tasks import Task
from penjing.techniques import by_layer
from penjing.techniques.by_layer import ByLayer
from penjing.techniques.technique import Attached, Kind, Technique, apply


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # which equals 1
        raise ValueError(f"must be 16, 8, 4, 2 or 1, found {value}")
    return value


WeightBits = Annotated[Literal[16, 8, 4, 2, 1], BeforeValidator(_number)]


class Quantize(Technique):
    """Put weights on a symmetric integer grid for every output channel (or layer), and layer inputs
    on an affine one.

    Batch norms are folded first. At 8 bits and less the weights are rounded with error compensation
    on the calibration images; at 4 bits and less every channel of a layer's output also gets its
    former mean and spread back. Exact zeros stay zero. In quantization-aware training, rounding lets
    gradients pass and the scales learn.
    """

    name: ClassVar[str] = "quantize"
    kind: ClassVar[Kind] = Kind.GRID

    weight_bits: ByLayer[WeightBits] = 8
    """Bits of a weight. Given by layer, None leaves a layer in float, its input too."""
    activation_bits: ByLayer[Literal[16, 8]] | None = 8
    """Bits of every layer's input; None leaves activations in float."""
    first_last_bits: WeightBits = 8
    """Weight bits of the first and the last layer, where ``weight_bits`` is less for all layers; given
    by layer, it holds for these two as well."""
    scales: ByLayer[Literal["channel", "layer"]] = "channel"
    """Whether each output channel has a scale, or each layer one. In a file of a few kilobytes,
    scales of channels are a large part."""
    observer: Observer = "mse"
    """Method that finds the range of an input: see ``LayerStatistics.range``."""
    calibration: int = Field(default=256, ge=1)
    """Number of calibration images, on which ranges and second moments are found."""

    @property
    def changes(self) -> Kind:
        return Kind.SIGNS if 1 in by_layer.values(self.weight_bits) else Kind.GRID

    def attach(self, model: nn.Module, task: Task, target: Target = STANDARD) -> Attached:
        """Fold, calibrate, round, correct what rounding did to the outputs.

        Raises ``PenjingError`` for NaN or infinity in a layer's weights or inputs, and for a sparse
        layer at 1 bit.
        """
        found = layers.compressible(model)
        bits = {n: one for n, one in self.each("weight_bits", found).items() if one is not None}
        found = {name: found[name] for name in bits}
        layers.check_finite(found)
        for layer in found.values():
            input_quantizer.take_off(layer)
        device = next(model.parameters()).device
        example = task.example.to(device)
        collect(model, found, [example], moments=False)  # complains of NaN before folding meets it
        fold_batch_norm(model, example)
        batches = [batch.to(device) for batch in task.calibration(self.calibration)]
        fewest = min(bits.values(), default=16)
        statistics = collect(model, found, batches, moments=fewest <= 8)
        if not isinstance(self.weight_bits, dict):
            order = list(statistics)
            bits |= {n: max(bits[n], self.first_last_bits) for n in (*order[:1], *order[-1:])}
        quantizers = self._quantize(found, bits, statistics)
        if fewest <= 4:  # at 8 bits, one batch's means are off by more than the rounding
            correct_outputs(model, quantizers, found, statistics, batches[0])
        return Quantized(self, quantizers)

    def _quantize(
        self, found: dict[str, Layer], bits: dict[str, int], statistics: dict[str, LayerStatistics]
    ) -> dict[nn.Module, WeightQuantizer]:
        quantizers: dict[nn.Module, WeightQuantizer] = {}
        inputs, scales = self.each("activation_bits", found), self.each("scales", found)
        for name, layer in found.items():
            seen = statistics.get(name)
            if seen is not None and inputs[name] is not None:
                low, high = seen.range(self.observer, inputs[name])
                quantizer = InputQuantizer(low, high, inputs[name])
                input_quantizer.put_on(layer, quantizer.to(layer.weight.device))
                seen.samples.clear()
            moments = seen.moments if seen else None
            quantizers[layer] = _quantize_weight(name, layer, bits[name], moments, scales[name])
        return quantizers


@dataclass(eq=False)
class Quantized(Attached):
    """Layers with their ``quantizers``, whose scales learn if there is a training."""

    quantizers: dict[nn.Module, WeightQuantizer]

    def bake(self, model: nn.Module) -> None:
        """Leave the weights on their grid and the input quantizers with fixed scales."""
        for layer in layers.compressible(model).values():
            quantizer = self.quantizers.get(layer)
            if quantizer is not None:
                layers.fold(layer, WeightQuantizer)  # or a technique attached later did it already
                _fix_weight(layer, quantizer)
            if hasattr(layer, "input_quantizer"):
                cast(InputQuantizer, layer.input_quantizer).freeze()


def quantize(model: nn.Module, task: Task, **settings: object) -> nn.Module:
    """Return a copy of ``model`` with quantized weights and layer inputs, post-training.

    ``settings`` are the fields of ``Quantize``. Raises what ``Quantize.attach`` raises.
    """
    return apply(Quantize(**settings), model, task)  # type: ignore[arg-type]


def _quantize_weight(
    name: str, layer: Layer, bits: int, moments: Tensor | None, scales: str
) -> WeightQuantizer:
    weight = layer.weight.detach()
    if bits == 1 and layers.is_sparse(layer):
        raise PenjingError(
            f"layer {name} is sparse, and a 1-bit grid has no zero; use weight_bits=2 or do not "
            "prune single weights."
        )
    scale = _scale(layer, weight, bits, scales)
    if bits == 8:
        # Error compensation moves a weight by more than half a step.
        scale = _unsaturated(layer, weight, scale, slack=3)
    if bits <= 8 and moments is not None:
        _compensate(layer, weight, scale, bits, moments)
    quantizer = WeightQuantizer(scale.clone(), bits)
    parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
    return quantizer


def _fix_weight(layer: Layer, quantizer: WeightQuantizer) -> None:
    scale = quantizer.positive_scale().detach().clone()
    if quantizer.bits == 8:
        # A scale that has learned may have become too small.
        scale = _unsaturated(layer, layer.weight.detach(), scale)
        layer.weight = nn.Parameter(WeightQuantizer(scale, 8)(layer.weight).detach())
    scales = scale.expand(len(layer.weight)).clone()
    layer.weight_format = IntegerWeights(quantizer.bits, scales)  # type: ignore[assignment]


def _unsaturated(layer: Layer, weight: Tensor, scale: Tensor, slack: int = 1) -> Tensor:
    """``scale``, made safe for integer kernels; one scale of all channels stays one."""
    quantizer = getattr(layer, "input_quantizer", None)
    if quantizer is None or quantizer.bits != 8:
        return scale  # it will run in float
    safe = safe_scale(layer, weight, scale.expand(len(weight)), slack)
    return safe if len(scale) > 1 else safe.amax(0, keepdim=True)


def _scale(layer: Layer, weight: Tensor, bits: int, scales: str) -> Tensor:
    known = getattr(layer, "weight_format", None)
    if isinstance(known, IntegerWeights) and known.bits == bits:
        return known.scale.to(weight.device)  # already on this grid: leave it there
    if isinstance(known, CodebookWeights) or scales == "layer":
        # One scale for all channels keeps equal weights equal.
        return grids.choose_scale(weight.reshape(1, -1), bits)
    return grids.choose_scale(weight.flatten(1), bits)


def _compensate(layer: Layer, weight: Tensor, scale: Tensor, bits: int, moments: Tensor) -> None:
    """Start from error-compensated weights, unless an earlier technique fixes the values."""
    if isinstance(getattr(layer, "weight_format", None), CodebookWeights):
        return
    matrix = patches.matrix(layer, weight)
    rows = scale.expand(len(weight)).reshape(-1, matrix.shape[1])
    row_scale = rows.expand(matrix.shape[:2])
    rounded = compensated(matrix, moments, row_scale, lambda steps: grids.to_codes(steps, bits))
    value = patches.from_matrix(layer, rounded, weight.shape)
    # Where an earlier technique hides a weight its own value is kept, for it may come back.
    former = layers.original(layer).detach()
    layers.set_original(layer, "weight", torch.where(weight == 0, former, value))
