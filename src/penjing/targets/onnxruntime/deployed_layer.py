"""Layers as the lowering passes see them, read from the PyTorch model before export."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from penjing.net import layers
from penjing.net.layers import IntegerWeights, WeightFormat


@dataclass(frozen=True)
class Grid:
    """Affine quantization: ``value = scale * (integer - zero_point)``, unsigned integers of ``bits``
    bits."""

    scale: float
    zero_point: int
    bits: int = 8

    @property
    def low(self) -> float:
        """Smallest representable value."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """Largest representable value."""
        return (2**self.bits - 1 - self.zero_point) * self.scale


@dataclass(frozen=True)
class DeployedLayer:
    """A layer's weights (float32, representable in ``format``) and the quantization of its input, if
    any; the graph may read the weight ``transposed``."""

    name: str
    weight: np.ndarray
    format: WeightFormat | None
    input: Grid | None
    transposed: bool = False

    @property
    def stored(self) -> np.ndarray:
        """Weight as the graph reads it."""
        return self.weight.T if self.transposed else self.weight

    @property
    def integer(self) -> bool:
        """Whether an 8-bit integer kernel can run the layer: 8-bit input, weights of at most 8 bits."""
        return (
            self.input is not None
            and self.input.bits == 8
            and isinstance(self.format, IntegerWeights)
            and self.format.bits <= 8
        )


def take_layers(model: nn.Module) -> list[DeployedLayer]:
    """Describe every compressible layer of ``model`` and switch its input quantizer off, in place."""
    taken = []
    for name, module in layers.compressible(model).items():
        weight = module.weight.detach().numpy().copy()
        kind = getattr(module, "weight_format", None)
        taken.append(DeployedLayer(name, weight, kind, _input_grid(module)))
        if hasattr(module, "input_quantizer"):
            # The forward pre-hook still calls it; Identity leaves no trace in the exported graph.
            module.input_quantizer = nn.Identity()
    return taken


def _input_grid(module: nn.Module) -> Grid | None:
    quantizer = getattr(module, "input_quantizer", None)
    if quantizer is None:
        return None
    return Grid(float(quantizer.scale), int(quantizer.zero_point), int(quantizer.bits))
