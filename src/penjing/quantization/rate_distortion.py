"""One integer grid a layer for a whole network: the least damage for the bits that are spent.

A step of the grid costs a weight's share of the divergence, ``step² / 12`` times its sensitivity
given that later weights make good what they can, and a bit less halves the step twice over. So all
weights of the network shall do the same damage, ``distortion``: that is the one number that sets all
steps (the λ of the rate-distortion trade-off is ``2 ln 2 * distortion``). The integers are chosen
with error compensation, and on a trellis where a weight is not to be trained any more.

Sources: Cover & Thomas 2006, "Elements of information theory", section 10.3.3, for equal damage;
Frantar et al. 2023, "GPTQ"; Wiedemann et al. 2020, "DeepCABAC", for the aim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.container import streams
from penjing.container.arithmetic import Memory
from penjing.container.planes import Content, element_type
from penjing.net import patches
from penjing.net.layers import Layer
from penjing.quantization import dependent_rounding, error_compensation, grids
from penjing.quantization.rate_distortion_sensitivity import Sensitivity

_WIDEST = {8: 100, 16: 20_000}
"""Integers of the largest weight at most, by their bits: compensation needs some room."""
_TYPES = {8: (3, torch.int8), 16: (5, torch.int16)}
"""ONNX's number of the type, and PyTorch's name."""
INSIDE = 0.45
"""Where a weight starts in training: at most so many steps from its integer."""
FINEST, FIRST, WIDEST = -40.0, -24.0, -8.0
"""Octaves of distortion: the range of the search and where it starts."""
TRIES, CLOSE, FINE = 16, 0.002, 0.005
"""Limits of the search for a size: attempts at most, the share of the size that may stay free, and the
octaves by which it is not worth going on."""
HALVINGS = 9
ROUGHLY_CLOSE, ROUGH_HALVINGS = 0.05, 6
"""Share of the size that may stay free, and halvings, where only the region is wanted."""


@dataclass(frozen=True)
class GridWeights:
    """A layer's weights as ``codes * step``; ``codes`` float, whole numbers, shaped like the weight,
    signed integers of ``bits`` bits. ``dependent`` ones follow the container's trellis."""

    codes: Tensor
    step: float
    bits: int
    dependent: bool = False

    @property
    def spacing(self) -> float:
        """Distance between the values that a weight may take."""
        return (2 if self.dependent else 1) * self.step

    @property
    def weight(self) -> Tensor:
        """Weights that the layer computes with, float32."""
        return self.codes * self.step


def choose(
    found: dict[str, Layer],
    sensitivity: dict[str, Sensitivity],
    distortion: float,
    *,
    dependent: bool,
) -> dict[str, GridWeights]:
    """Return steps and integers of the layers ``found`` at equal ``distortion`` of all weights.

    Layers without a sensitivity (they never ran) get the finest grid. Exact zeros stay zero. Integers
    that are ``dependent`` follow a trellis, where the container can code that.
    """
    return {
        name: _on_grid(layer, sensitivity.get(name), distortion, dependent=dependent)
        for name, layer in found.items()
    }


def _on_grid(
    layer: Layer, known: Sensitivity | None, distortion: float, *, dependent: bool
) -> GridWeights:
    weight = layer.weight.detach()
    largest = float(weight.abs().max())
    wanted = 0.0 if known is None else _step(known, distortion)
    # Folded norms leave some small layers with weights a thousand steps long: 8 bits don't do there.
    bits = 8 if known is None or largest <= _WIDEST[8] * wanted else 16
    step = max(wanted, largest / _WIDEST[bits], grids.SMALLEST_SCALE)
    if known is None:
        return GridWeights((weight / step).round(), step, bits)
    matrix = patches.matrix(layer, weight)
    half = wanted / 2
    if dependent and largest <= _WIDEST[8] * half and patches.coding_order(layer) is not None:
        rounded = dependent_rounding.compensated(matrix, known.elimination, half)
        return GridWeights(
            patches.from_matrix(layer, rounded, weight.shape), half, 8, dependent=True
        )
    scale = weight.new_full(matrix.shape[:2], step)
    found = error_compensation.compensated(
        matrix, known.moments, scale, lambda steps: grids.to_codes(steps, bits), known.elimination
    )
    codes = (patches.from_matrix(layer, found, weight.shape) / step).round()
    return GridWeights(codes, step, bits)


def predicted(layer: Layer, known: Sensitivity, one: GridWeights) -> float:
    """Return the divergence that putting ``layer`` on its grid should cause, by ``known``."""
    return layer.weight.numel() * one.spacing**2 / 24 * known.weight_gain


def _step(known: Sensitivity, distortion: float) -> float:
    """0 for a layer that does not matter: it gets the finest grid, which its zeros make cheap."""
    mean = known.weight_gain
    return math.sqrt(12 * distortion / mean) if mean > 0 else 0.0


def start(weight: Tensor, one: GridWeights) -> Tensor:
    """Return where training starts from: the weight as it was, or the nearest value that rounds to its
    integer (Nagel et al. 2020, "Up or down? Adaptive rounding")."""
    inside = (weight / one.step).clamp(one.codes - INSIDE, one.codes + INSIDE)
    return torch.where(weight == 0, 0.0, inside * one.step)


def coded_bytes(chosen: Iterable[GridWeights]) -> int:
    """Return the bytes that the container's adaptive coder spends on whole tensors of integers."""
    memory: Memory = {}
    total = 0
    for one in chosen:
        number, kind = _TYPES[one.bits]
        data = one.codes.to("cpu", kind).numpy().tobytes()
        content = Content(element_type(number), tuple(one.codes.shape), (len(data),))
        total += len(streams.encode(data, content, "arithmetic", memory, seed=0))
    return total


def rounded_bias(bias: Tensor, gain: float, distortion: float) -> Tensor:
    """``bias`` on the coarsest grid of a power of two that does no more than ``distortion``."""
    if gain <= 0:
        return bias
    step = 2.0 ** math.floor(math.log2(math.sqrt(12 * distortion / gain)))
    return grids.multiples(bias, step)


def for_size(
    bytes_at: Callable[[float], int],
    wanted: float,
    weights: int,
    first: float = FIRST,
    *,
    roughly: bool = False,
) -> float | None:
    """Find the distortion at which ``bytes_at`` is just below ``wanted``, by secants over its logarithm,
    from the octave ``first``; None if nothing is small enough. ``weights`` is how many there are."""
    close = ROUGHLY_CLOSE if roughly else CLOSE
    best, before = None, (math.nan, math.nan)
    # At high rates an octave of distortion is half a bit a weight.
    at, slope = first, -weights / 16
    for _ in range(TRIES):
        excess = bytes_at(2.0**at) - wanted
        if excess <= 0:
            best = at if best is None else min(at, best)
        if -close * wanted <= excess <= 0 or (best is not None and abs(at - before[0]) < FINE):
            break
        if before[1] != excess and not math.isnan(before[0]):
            slope = min((excess - before[1]) / (at - before[0]), -weights / 160)
        before = at, excess
        at = min(max(at - (excess + close / 2 * wanted) / slope, FINEST), WIDEST)
    return None if best is None else 2.0**best


def for_score(good: Callable[[float], bool], *, roughly: bool = False) -> float:
    """Find the largest distortion that is ``good``, by bisection of its logarithm; the finest if
    none."""
    low, high = FINEST, WIDEST
    for _ in range(ROUGH_HALVINGS if roughly else HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if good(2.0**middle) else (low, middle)
    return 2.0**low
