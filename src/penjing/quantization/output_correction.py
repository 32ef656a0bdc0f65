"""Restore the mean and spread of every output channel after quantization, and the sharpness of logits.

Sources: Nagel et al. 2019, "Data-free quantization through weight equalization and bias
correction", section 4.2, for the mean; Banner et al. 2019, "Post training 4-bit quantization of
convolutional networks", section 4, for mean and spread (of the weights there). Here both are
measured on images. Rounding for the least squared error shrinks weights a little, and for few bits
more; over fifty layers that leaves logits nearly flat. The spread costs nothing to restore: it goes
into the scale. Part of it is the error's by then, so that the outputs are still less confident than
they were: the last scale is the temperature of Guo et al. 2017, "On calibration of modern neural
networks", and costs nothing either."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from penjing.net import layers
from penjing.net.layers import Layer
from penjing.net.observation import (
    LayerStatistics,
    channel_statistics,
    hooked,
    per_channel,
)
from penjing.quantization.grids import WeightQuantizer
from penjing.tasks import outputs
from penjing.tasks.divergence import columns
from penjing.tasks.outputs import evaluating

LARGEST_GAIN = 2.0
HALVINGS = 20
"""Number of times that ``sharpen`` halves its range of gains."""


def correct_outputs(
    model: nn.Module,
    quantizers: dict[nn.Module, WeightQuantizer],
    found: dict[str, Layer],
    statistics: dict[str, LayerStatistics],
    batch: Tensor,
) -> None:
    """Adapt scales and biases of the layers ``found``, in place, until the means and standard
    deviations of their channels on ``batch`` are those in ``statistics``.

    One pass does: a layer sees the corrected output of those before it. Layers that run more than
    once are left alone, and the spread where all channels share one scale.
    """
    once = {n: layer for n, layer in found.items() if n in statistics and statistics[n].calls == 1}

    def correct(name: str, layer: Layer, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        mean, deviation = channel_statistics(layer, output)
        expected = cast(Tensor, statistics[name].output_deviations)
        if len(quantizers[layer].scale) < len(mean):
            deviation, expected = (one.norm().expand_as(mean) for one in (deviation, expected))
        gain = _gain(expected, deviation)
        _scale_weight(layer, quantizers[layer], gain)
        shift = cast(Tensor, statistics[name].output_means) - mean * gain
        bias = layer.bias if layer.bias is not None else torch.zeros_like(shift)
        corrected = (bias * gain + shift).detach()
        if layer.bias is None:
            layer.bias = nn.Parameter(corrected)
        else:
            layers.set_original(layer, "bias", corrected)
        return output * per_channel(layer, gain, output) + per_channel(layer, shift, output)

    with hooked(once, correct), evaluating(model):
        model(batch.contiguous())


def sharpen(
    model: nn.Module,
    quantizers: dict[nn.Module, WeightQuantizer],
    found: dict[str, Layer],
    images: Tensor,
    expected: Any,
) -> None:
    """Scale the logits of ``model``, in place, so that its outputs diverge least from ``expected``:
    the output that it should give for ``images``, best of which no statistic has seen. Its first
    tensor holds the logits ``[N, classes]``, or one logit ``[N]`` or ``[N, 1]``. Their order stays.

    Does nothing where no layer's output, as it is, is the network's.
    """
    wanted = outputs.logits(expected)
    kept: dict[str, Tensor] = {}

    def keep(name: str, _layer: Layer, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.numel() == wanted.numel():
            kept[name] = output

    with hooked(found, keep), evaluating(model):
        logits = outputs.logits(model(images.contiguous()))
    for name, output in kept.items():
        if output.data_ptr() == logits.data_ptr():
            sharpness = _sharpness(columns(logits), columns(wanted))
            layer, gain = found[name], logits.new_tensor([sharpness])
            _scale_weight(layer, quantizers[layer], gain.expand(len(layer.weight)))
            if layer.bias is not None:
                layers.set_original(layer, "bias", layer.bias.detach() * gain)


def _sharpness(logits: Tensor, expected: Tensor) -> float:
    """Find the factor at which the divergence, convex in it, has no slope: the logits' mean is the
    same in the outputs that are found and in those expected."""
    wanted = (expected.softmax(1) * logits).sum()
    low, high = -math.log(LARGEST_GAIN), math.log(LARGEST_GAIN)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = ((math.exp(middle) * logits).softmax(1) * logits).sum()
        low, high = (middle, high) if found < wanted else (low, middle)
    return math.exp(low)


def _gain(expected: Tensor, found: Tensor) -> Tensor:
    gain = (expected / found).clamp(1 / LARGEST_GAIN, LARGEST_GAIN)
    return torch.where((expected > 0) & (found > 0), gain, 1.0)


def _scale_weight(layer: Layer, quantizer: WeightQuantizer, gain: Tensor) -> None:
    """Multiply weight and scale by ``gain``, which leaves the integers as they are."""
    former = layers.original(layer).detach()
    layers.set_original(layer, "weight", former * gain.reshape(-1, *[1] * (former.dim() - 1)))
    scale = quantizer.scale * gain[: len(quantizer.scale)]
    quantizer.scale = nn.Parameter(scale.detach())
